"""Attention over documents that lie end to end in one row, each seeing only itself.

The usual ways cost too much on a CPU: padding wastes every other layer too, and a block-diagonal mask makes attention
quadratic in the length of the row. Here all other layers see one row without padding, and attention runs per
document, in batches of documents of similar length. Causal attention needs no mask for padding at the right end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from edgeft.errors import UnsupportedModel

NAME = "edgeft_documents"

# Below this length two matrix products and a softmax beat torch's fused CPU kernel (measured with AMX: 4 x at 85).
_SHORT = 256
# Lengths and numbers of documents are rounded up to these: each new shape of a matrix product costs oneDNN a
# compilation and memory.
_ROUND, _ROUND_COUNT = 16, 4
# Documents attend together when the shorter is at least this share of the longer.
_SIMILAR = 0.75


@dataclass(frozen=True)
class Documents:
    """Where the documents of a row begin and end, and which of them attend together.

    `groups` holds one (documents, longest) tensor of row positions per group; rows shorter than the longest are
    filled with position 0. `inverse` (tokens,) puts the concatenated results of the prefix and all groups back in row
    order; filling at the end of the row belongs to no document and gets some other token's result.
    """

    groups: tuple[Tensor, ...]
    inverse: Tensor
    prefix: int = 0
    """The row begins with this many tokens that all documents begin with; a document's length is that of its rest."""

    @classmethod
    def of(cls, lengths: Sequence[int], tokens: int | None = None, prefix: int = 0) -> Documents:
        """Documents of these lengths behind a shared prefix, in a row of `tokens` tokens (default: their sum)."""
        order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
        starts = [prefix]
        for length in lengths:
            starts.append(starts[-1] + length)
        groups: list[Tensor] = []
        inverse = torch.zeros(tokens or starts[-1], dtype=torch.long)
        inverse[:prefix] = torch.arange(prefix)
        offset = prefix
        for members in _similar(order, lengths):
            longest = -(-lengths[members[0]] // _ROUND) * _ROUND
            positions = torch.zeros(-(-len(members) // _ROUND_COUNT) * _ROUND_COUNT, longest, dtype=torch.long)
            for row, member in enumerate(members):
                begin, length = starts[member], lengths[member]
                positions[row, :length] = torch.arange(begin, begin + length)
                inverse[begin : begin + length] = torch.arange(length) + offset + row * longest
            offset += positions.numel()
            groups.append(positions)
        return cls(tuple(groups), inverse, prefix)

    def to(self, device: torch.device) -> Documents:
        return Documents(tuple(group.to(device) for group in self.groups), self.inverse.to(device), self.prefix)


def _similar(order: Sequence[int], lengths: Sequence[int]) -> list[list[int]]:
    """Documents, longest first, cut where the next one is much shorter than its group's first."""
    groups: list[list[int]] = []
    for index in order:
        if groups and lengths[index] >= _SIMILAR * lengths[groups[-1][0]]:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def register() -> None:
    """Make `attn_implementation=NAME` known to transformers."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, documents_attention)
    AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)


def install(model: Any) -> None:
    """Let documents reach every attention of a model, also where its layers keep such arguments to themselves.

    A hook, because it runs again when gradient checkpointing computes a layer again.
    """
    for layer in model.modules():
        if hasattr(layer, "self_attn"):
            layer.register_forward_pre_hook(_hand_on, with_kwargs=True)


def _hand_on(layer: Any, args: Any, kwargs: dict[str, Any]) -> None:
    layer.self_attn.documents = kwargs.get("documents")


class Reached:
    """Whether attention got the documents it was meant to get."""

    last: Documents | None = None


def check_reached(documents: Documents, model: Any) -> None:
    """After a forward pass.

    Raises:
        UnsupportedModel: the model's attention was computed without regard to documents.
    """
    if Reached.last is not documents:
        raise UnsupportedModel(
            f"the attention of {type(model).__name__} does not keep documents apart",
            "Only models whose attention goes through transformers' AttentionInterface can be trained.",
        )


def documents_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    documents: Documents | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each document, and to the prefix that all of them share.

    Args:
        query: (1, heads, tokens, width); key and value (1, key-value heads, tokens, width).
        softcap: scores are bent to stay within it: softcap · tanh(score / softcap), as Gemma 2 does.
        documents: the row's documents; None means that each batch row is one document.

    Returns:
        (1, tokens, heads, width), and no attention weights.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    documents = getattr(module, "documents", None) if documents is None else documents
    Reached.last = documents
    if documents is None:
        return _causal(query, key, value, scale, sliding_window, softcap).transpose(1, 2).contiguous(), None
    rows = [tensor.transpose(1, 2)[0] for tensor in (query, key, value)]
    first_q, first_k, first_v = (tensor[:, :, : documents.prefix] for tensor in (query, key, value))
    parts = []
    if documents.prefix:
        parts.append(_causal(first_q, first_k, first_v, scale, sliding_window, softcap).transpose(1, 2)[0])
    for positions in documents.groups:
        queries, keys, values = (row[positions].transpose(1, 2) for row in rows)
        if documents.prefix:
            keys = torch.cat((first_k.expand(len(positions), -1, -1, -1), keys), dim=2)
            values = torch.cat((first_v.expand(len(positions), -1, -1, -1), values), dim=2)
        attended = _causal(queries, keys, values, scale, sliding_window, softcap)
        parts.append(attended.transpose(1, 2).reshape(-1, *rows[0].shape[1:]))
    joined = parts[0] if len(parts) == 1 else torch.cat(parts)
    return joined.index_select(0, documents.inverse)[None], None


def _causal(
    query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    """(documents, heads, length, width) each; key and value heads are repeated to match the query's.

    Where there are more keys than queries, the first ones come before all queries.
    """
    repeats, length, before = query.shape[1] // key.shape[1], key.shape[2], key.shape[2] - query.shape[2]
    if repeats > 1:
        key, value = (tensor.repeat_interleave(repeats, dim=1) for tensor in (key, value))
    banded = window is not None and length > window
    fused = length > _SHORT and not banded and not softcap
    if fused and not before:
        return functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)
    mask = torch.full((length - before, length), float("-inf"), dtype=query.dtype, device=query.device)
    mask = mask.triu(1 + before)
    if banded and window is not None:
        mask += torch.full_like(mask, float("-inf")).tril(before - window)
    if fused:
        return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    flat = [tensor.reshape(-1, *tensor.shape[2:]) for tensor in (query, key, value)]
    if softcap:
        scores = torch.tanh(torch.bmm(flat[0], flat[1].transpose(1, 2)) * (scale / softcap)) * softcap + mask
    else:
        scores = torch.baddbmm(mask, flat[0], flat[1].transpose(1, 2), alpha=scale)
    return torch.bmm(torch.softmax(scores, dim=-1), flat[2]).view(query.shape)
