"""From encoded examples to the tensors of one forward pass, and the loss on them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from edgeft.data.example import Encoded
from edgeft.train.attention import Documents
from edgeft.train.cross_entropy import summed_nll

# Rows are filled up to a multiple of this, for the same reason as lengths in edgeft.train.attention: with rows of any
# length the memory of a run grew by half.
_ROUND = 64

Batch = dict[str, Any]
"""`input_ids` and `position_ids` (1, tokens); `rows` (learned,): positions whose next token is learned; `targets`
(learned,): those tokens; `documents`: see edgeft.train.attention."""


def collate(examples: Sequence[Encoded]) -> Batch:
    """Documents end to end in one row, positions counted from the start of each; filling at the end of the row."""
    tokens: list[int] = []
    positions: list[int] = []
    rows: list[int] = []
    targets: list[int] = []
    for example in examples:
        start = len(tokens)
        tokens += example.tokens
        positions += range(len(example.tokens))
        for place in range(1, len(example.tokens)):
            if example.learned[place]:
                rows.append(start + place - 1)
                targets.append(example.tokens[place])
    filling = -len(tokens) % _ROUND
    tokens += [0] * filling
    positions += [0] * filling
    return {
        "input_ids": torch.tensor([tokens]),
        "position_ids": torch.tensor([positions]),
        "rows": torch.tensor(rows, dtype=torch.long),
        "targets": torch.tensor(targets, dtype=torch.long),
        "documents": Documents.of([len(example.tokens) for example in examples], len(tokens)),
    }


def learned_count(example: Encoded) -> int:
    """Tokens the loss is computed on: the learned ones, except the first of a text, which nothing predicts."""
    return sum(example.learned[1:])


def batch_nll(model: Any, batch: Batch) -> Tensor:
    """Sum of the negative log-likelihoods of the learned tokens, in nats; a float32 scalar with a gradient.

    Args:
        model: a transformers causal model loaded with `attn_implementation=attention.NAME`, with or without adapter.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    device = batch["input_ids"].device
    inputs = {
        "input_ids": batch["input_ids"],
        "position_ids": batch["position_ids"],
        "documents": batch["documents"].to(device),
        "use_cache": False,
    }
    if not _plain_head(inner.config):
        logits = inner(**inputs, logits_to_keep=batch["rows"]).logits[0].float()
        return torch.nn.functional.cross_entropy(logits, batch["targets"], reduction="sum")
    learned = inner.base_model(**inputs).last_hidden_state[0].index_select(0, batch["rows"])
    head = inner.get_output_embeddings()
    narrow = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else learned.dtype
    with torch.autocast(device.type, enabled=False):
        return summed_nll(learned.to(narrow), head.weight, head.bias, batch["targets"])


def _plain_head(config: Any) -> bool:
    """Whether logits are nothing but hidden states times the head (no soft cap, no scale)."""
    scales = ("logit_scale", "logits_scaling", "output_multiplier", "lm_head_multiplier")
    text = config.get_text_config()
    return not getattr(text, "final_logit_softcapping", None) and all(
        getattr(text, name, None) in (None, 1, 1.0) for name in scales
    )
