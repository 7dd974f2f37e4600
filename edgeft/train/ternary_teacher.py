"""A loss that also asks ternary weights to say what the original model says.

Per learned token (1 - share) · NLL + share · KL(original ‖ ternary), so its gradient with respect to the logits is
softmax - ((1 - share) · onehot + share · original). Logits are made a few rows at a time, as in
edgeft.train.cross_entropy; here the head may be trained, and the teacher has its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from edgeft.train.batch import Batch, learned_states
from edgeft.train.cross_entropy import chunk_rows


def taught_nll(model: Any, teacher: Any, batch: Batch, share: float) -> Tensor:
    """Sum over the learned tokens, in nats; a float32 scalar with a gradient.

    Args:
        teacher: the original model, frozen, with the same vocabulary.

    Raises:
        UnsupportedModel: logits are more than hidden states times the head.
    """
    with torch.no_grad():
        said, known = learned_states(teacher, batch)
    states, head = learned_states(model, batch)
    with torch.autocast(states.device.type, enabled=False):
        result: Tensor = _Taught.apply(
            states, head.weight, said.to(states.dtype), known.weight, batch["targets"], share
        )
        return result


class _Taught(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(
        ctx: Any, states: Tensor, weight: Tensor, said: Tensor, known: Tensor, targets: Tensor, share: float
    ) -> Tensor:
        head, other = weight.to(states.dtype), known.to(states.dtype)
        total = torch.zeros((), dtype=torch.float32, device=states.device)
        grad_states = torch.empty_like(states)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        size = chunk_rows(2 * len(weight))
        for begin in range(0, len(states), size):
            rows = slice(begin, begin + size)
            mine = torch.log_softmax((states[rows] @ head.t()).float(), 1)
            theirs = torch.log_softmax((said[rows] @ other.t()).float(), 1)
            wanted = theirs.exp().mul_(share)
            total += (wanted * theirs).sum()  # minus the teacher's entropy: what makes a KL of a cross-entropy
            wanted.scatter_add_(1, targets[rows, None], torch.full_like(wanted[:, :1], 1 - share))
            total -= (wanted * mine).sum()
            grad = mine.exp_().sub_(wanted).to(states.dtype)
            torch.mm(grad, head, out=grad_states[rows])
            if grad_weight is not None:
                grad_weight += grad.t() @ states[rows]
        ctx.save_for_backward(grad_states, grad_weight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        grad_states, grad_weight = ctx.saved_tensors
        scaled = None if grad_weight is None else (grad_weight * grads[0]).to(ctx.weight_dtype)
        return grad_states * grads[0].to(grad_states.dtype), scaled, None, None, None, None
