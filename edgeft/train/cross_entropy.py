"""Cross-entropy over a large vocabulary without ever holding all logits.

Only learned positions go through the head, a few rows at a time. The gradient of a mean of cross-entropies is
`(softmax - onehot) W` up to a scalar, so it is made chunk by chunk in the forward pass, while the logits are at hand.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Float32 logits of one chunk; 16 MB stay near the caches, and larger chunks are not faster.
CHUNK_BYTES = 16 << 20


def summed_nll(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """Sum of negative log-likelihoods in nats, a float32 scalar.

    Args:
        hidden: (positions, width), the last hidden states of the learned positions.
        weight: (vocabulary, width) of the output head; gets a gradient only if it is trained.
        bias: (vocabulary,) or None; frozen.
        targets: (positions,) next token ids.
    """
    result: Tensor = _ChunkedNll.apply(hidden, weight, bias, targets)
    return result


def chunk_rows(vocabulary: int) -> int:
    return max(1, CHUNK_BYTES // (4 * vocabulary))


class _ChunkedNll(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        head = weight.to(hidden.dtype)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        size = chunk_rows(len(weight))
        for begin in range(0, len(hidden), size):
            rows = slice(begin, begin + size)
            logits = (hidden[rows] @ head.t()).float()
            if bias is not None:
                logits += bias
            chosen = logits.gather(1, targets[rows, None])
            # log-sum-exp by hand and in place: the exponentials are what the gradient needs next.
            top = logits.amax(1, keepdim=True)
            exponentials = logits.sub_(top).exp_()
            norm = exponentials.sum(1, keepdim=True)
            total += (norm.log() + top - chosen).sum()
            if grad_hidden is None:
                continue
            grad = exponentials.div_(norm)
            grad.scatter_add_(1, targets[rows, None], torch.full_like(chosen, -1.0))
            narrow = grad.to(hidden.dtype)
            torch.mm(narrow, head, out=grad_hidden[rows])
            if grad_weight is not None:
                grad_weight += narrow.t() @ hidden[rows]
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        scaled_hidden = None if grad_hidden is None else grad_hidden * grads[0].to(grad_hidden.dtype)
        scaled_weight = None if grad_weight is None else (grad_weight * grads[0]).to(ctx.weight_dtype)
        return scaled_hidden, scaled_weight, None, None
