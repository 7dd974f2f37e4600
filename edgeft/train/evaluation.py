"""Mean negative log-likelihood on a held-out split, through the very graph that is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from edgeft.data.example import Encoded
from edgeft.train.batch import batch_nll, collate, learned_count, shared_prefix
from edgeft.train.packing import best_fit_decreasing


@dataclass(frozen=True)
class Evaluation:
    nll: float
    """Nats per learned token."""
    tokens: int
    """Learned tokens that were scored."""


def evaluate(model: Any, examples: Sequence[Encoded], micro_tokens: int, autocast: torch.dtype | None) -> Evaluation:
    """Score every learned token of the examples; leaves the model in the mode it was in.

    Args:
        micro_tokens: tokens per forward pass.
        autocast: dtype of mixed precision, or None when the model computes in its own.
    """
    device = next(model.parameters()).device
    prefix = shared_prefix(examples)
    lengths = [len(example.tokens) - prefix for example in examples]
    training = model.training
    model.eval()
    total = 0.0
    with torch.no_grad(), torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
        for pack in best_fit_decreasing(lengths, micro_tokens - prefix, range(len(examples))):
            batch = collate([examples[index] for index in pack], prefix)
            batch = {key: value.to(device) for key, value in batch.items()}
            total += float(batch_nll(model, batch))
    model.train(training)
    tokens = sum(learned_count(example) for example in examples)
    return Evaluation(total / max(tokens, 1), tokens)
