"""A loss that also asks rounded weights to say what they say unrounded.

The teacher is the same model with the same adapter, computed with W + s·B·A as it is: there is nothing to keep, and it
learns along. Per learned token the loss is (1 - share) · NLL + share · KL(teacher ‖ rounded); its gradient with respect
to the logits is softmax - ((1 - share) · onehot + share · teacher).
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from edgeft.train.batch import Batch, learned_states
from edgeft.train.cross_entropy import chunk_rows


def distilled_nll(model: Any, batch: Batch, exact: AbstractContextManager[None], share: float) -> Tensor:
    """Sum over the learned tokens, in nats; a float32 scalar with a gradient.

    Args:
        exact: within it, the model computes with unrounded weights.

    Raises:
        UnsupportedModel: logits are more than hidden states times the head.
    """
    with torch.no_grad(), exact:
        teacher, _ = learned_states(model, batch)
    student, head = learned_states(model, batch)
    with torch.autocast(student.device.type, enabled=False):
        result: Tensor = _ChunkedMixture.apply(student, teacher, head.weight, head.bias, batch["targets"], share)
        return result


class _ChunkedMixture(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, other: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, share: float
    ) -> Tensor:
        head = weight.to(hidden.dtype)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden)
        size = chunk_rows(2 * len(weight))
        for begin in range(0, len(hidden), size):
            rows = slice(begin, begin + size)
            known, said = (_log_probs(states[rows], head, bias) for states in (hidden, other))
            wanted = said.exp().mul_(share)
            total += (wanted * said).sum()  # minus the teacher's entropy: what makes a KL of a cross-entropy
            wanted.scatter_add_(1, targets[rows, None], torch.full_like(wanted[:, :1], 1 - share))
            total -= (wanted * known).sum()
            torch.mm(known.exp_().sub_(wanted).to(hidden.dtype), head, out=grad_hidden[rows])
        ctx.save_for_backward(grad_hidden)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (grad_hidden,) = ctx.saved_tensors
        return grad_hidden * grads[0].to(grad_hidden.dtype), None, None, None, None, None


def _log_probs(states: Tensor, head: Tensor, bias: Tensor | None) -> Tensor:
    logits = (states @ head.t()).float()
    return torch.log_softmax(logits if bias is None else logits + bias, 1)
