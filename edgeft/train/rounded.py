"""Linear layers that compute with rounded weights while what is trained stays exact.

Straight-through estimator (Bengio et al. 2013, arXiv 1308.3432): the loss is that of the rounded weights, its gradient
is handed on as if rounding were the identity. So the gradients of A and B are LoRA's own, with the rounded weights in
place of W + s·B·A, and no matrix of the layer's size is needed for them.

Weights change once per optimizer step and are rounded once per step, however many passes it has.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from edgeft.train.grids import Grid

_AT_ONCE = 1 << 22
"""Weights merged at once: 16 MB of float32."""


class Merged:
    """W + s·B·A of one layer, and its rounded values as of the last time somebody asked."""

    def __init__(self, grid: Grid, weight: Tensor, a: Tensor, b: Tensor, scale: float) -> None:
        """
        Args:
            weight: (out, in), frozen, in the dtype that is computed in.
            a, b: (rank, in) and (out, rank), float32, trained.
        """
        self.grid, self.weight, self.a, self.b, self.scale = grid, weight, a, b, scale
        self._rounded: Tensor | None = None
        self._current = False

    def moved(self) -> None:
        """A or B is another one now. (Version counters do not tell: torch's fused AdamW leaves them as they are.)"""
        self._current = False

    def rounded(self) -> Tensor:
        """(out, in) in the weight's dtype; the same tensor until `moved`."""
        if self._rounded is None:
            self._rounded = torch.empty_like(self.weight, memory_format=torch.contiguous_format)
        if not self._current:
            with torch.no_grad():
                for start, stop, exact in self._exact():
                    self.grid.values(exact, self._rounded[start:stop])
            self._current = True
        return self._rounded

    def pack(self) -> Tensor:
        """As the file stores it: the same sums in the same parts as in `rounded`."""
        with torch.no_grad():
            return torch.cat([self.grid.pack(exact) for _, _, exact in self._exact()])

    def _exact(self) -> Any:
        """(first row, end, float32 rows); a part is valid until the next."""
        rows, columns = self.weight.shape
        step = max(1, _AT_ONCE // columns)
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            part = _buffer((stop - start, columns), self.weight.device).copy_(self.weight[start:stop])
            yield start, stop, part.addmm_(self.b[start:stop], self.a, alpha=self.scale)


_BUFFERS: dict[torch.device, Tensor] = {}


def _buffer(shape: tuple[int, int], device: torch.device) -> Tensor:
    """Float32 numbers that all layers take in turn: fresh pages for each would cost as much as the sums."""
    count, held = shape[0] * shape[1], _BUFFERS.get(device)
    if held is None or held.numel() < count:
        held = _BUFFERS[device] = torch.empty(count, device=device)
    return held[:count].view(shape)


class RoundedLinear(torch.autograd.Function):  # type: ignore[misc]
    """`x Q(W + s·B·A)^T + bias`; keeps x only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, merged: Merged, a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
        weight = merged.rounded().to(x.dtype)
        ctx.save_for_backward(x, a, b)
        ctx.weight, ctx.scale = weight, merged.scale
        return functional.linear(x, weight, None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, a, b = ctx.saved_tensors
        flat, grad = x.reshape(-1, x.shape[-1]), grads[0].reshape(-1, grads[0].shape[-1])
        down = flat @ a.to(x.dtype).t()
        grad_down = (grad @ b.to(grad.dtype)).mul_(ctx.scale)
        grad_a = (grad_down.t() @ flat).to(a.dtype)
        grad_b = (grad.t() @ down).to(b.dtype).mul_(ctx.scale)
        grad_x = (grad @ ctx.weight).view(x.shape) if ctx.needs_input_grad[0] else None
        return grad_x, None, grad_a, grad_b, None
