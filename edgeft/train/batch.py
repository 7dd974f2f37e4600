"""From encoded examples to the tensors of one forward pass, and the loss on them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from edgeft.data.example import Encoded
from edgeft.errors import UnsupportedModel
from edgeft.train.attention import Documents, check_reached
from edgeft.train.cross_entropy import summed_nll

# Rows are filled up to a multiple of this, for the same reason as lengths in edgeft.train.attention: with rows of any
# length the memory of a run grew by half.
_ROUND = 64
# Sharing a prefix pays when it is at least this part of a mean example.
_WORTH = 0.1

Batch = dict[str, Any]
"""`input_ids` and `position_ids` (1, tokens); `rows` (learned,): positions whose next token is learned; `targets`
(learned,): those tokens; `tokens`: how many the examples have, shared ones counted in each of them; `documents`: see
edgeft.train.attention."""


def shared_prefix(examples: Sequence[Encoded]) -> int:
    """How many tokens all examples begin with and none of them learns; 0 where sharing them would save little.

    A system prompt and the head of a chat template are the same in every conversation of most data sets. Causal
    attention gives them the same hidden states too, so one copy per pass does for all.
    """
    if len(examples) < 2:
        return 0
    first, last = (pick(examples, key=lambda example: example.tokens).tokens for pick in (min, max))
    # Of sorted lists, the first and the last differ the earliest.
    same = next((at for at, pair in enumerate(zip(first, last, strict=False)) if pair[0] != pair[1]), len(first))
    # The token that predicts a document's first learned one is its own.
    same = min([same, *(_first_learned(example) - 1 for example in examples)])
    mean = sum(len(example.tokens) for example in examples) / len(examples)
    return same if same >= _WORTH * mean else 0


def _first_learned(example: Encoded) -> int:
    return example.learned.index(True) if any(example.learned) else len(example.tokens)


def collate(examples: Sequence[Encoded], prefix: int = 0) -> Batch:
    """Documents end to end in one row, positions counted from the start of each; filling at the end of the row.

    Args:
        prefix: tokens that all examples begin with (`shared_prefix`); the row has them once.
    """
    tokens = examples[0].tokens[:prefix]
    positions = list(range(prefix))
    rows: list[int] = []
    targets: list[int] = []
    for example in examples:
        start = len(tokens) - prefix
        tokens += example.tokens[prefix:]
        positions += range(prefix, len(example.tokens))
        for place in range(prefix + 1, len(example.tokens)):
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
        "tokens": torch.tensor(sum(len(example.tokens) for example in examples)),
        "documents": Documents.of([len(example.tokens) - prefix for example in examples], len(tokens), prefix),
    }


def learned_count(example: Encoded) -> int:
    """Tokens the loss is computed on: the learned ones, except the first of a text, which nothing predicts."""
    return sum(example.learned[1:])


def batch_nll(model: Any, batch: Batch) -> Tensor:
    """Sum of the negative log-likelihoods of the learned tokens, in nats; a float32 scalar with a gradient.

    Args:
        model: a transformers causal model loaded with `attn_implementation=attention.NAME`, with or without adapter.
    """
    inner = _inner(model)
    if not _plain_head(inner.config):
        inputs = _inputs(batch)
        logits = inner(**inputs, logits_to_keep=batch["rows"]).logits[0].float()
        check_reached(inputs["documents"], inner)
        return torch.nn.functional.cross_entropy(logits, batch["targets"], reduction="sum")
    learned, head = learned_states(model, batch)
    with torch.autocast(learned.device.type, enabled=False):
        return summed_nll(learned, head.weight, head.bias, batch["targets"])


def learned_states(model: Any, batch: Batch) -> tuple[Tensor, Any]:
    """Last hidden states of the learned rows, (learned, width), and the head that makes logits of them.

    Raises:
        UnsupportedModel: logits are more than that product.
    """
    inner, kind = _inner(model), batch["input_ids"].device.type
    if not _plain_head(inner.config):
        raise UnsupportedModel(f"the logits of {type(inner).__name__} are capped or scaled", "Leave out --teacher.")
    inputs = _inputs(batch)
    learned = inner.base_model(**inputs).last_hidden_state[0].index_select(0, batch["rows"])
    check_reached(inputs["documents"], inner)
    narrow = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else learned.dtype
    return learned.to(narrow), inner.get_output_embeddings()


def _inner(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _inputs(batch: Batch) -> dict[str, Any]:
    return {
        "input_ids": batch["input_ids"],
        "position_ids": batch["position_ids"],
        "documents": batch["documents"].to(batch["input_ids"].device),
        "use_cache": False,
    }


def _plain_head(config: Any) -> bool:
    """Whether logits are nothing but hidden states times the head (no soft cap, no scale)."""
    scales = ("logit_scale", "logits_scaling", "output_multiplier", "lm_head_multiplier")
    text = config.get_text_config()
    return not getattr(text, "final_logit_softcapping", None) and all(
        getattr(text, name, None) in (None, 1, 1.0) for name in scales
    )
