"""Linear layers that compute with rounded weights while what is trained stays exact.

Straight-through estimator (Bengio et al. 2013, arXiv 1308.3432): the loss is that of the rounded weights, its gradient
is handed on as if rounding were the identity. So the gradients of A and B are LoRA's own, with the rounded weights in
place of W + s·B·A, and no matrix of the layer's size is needed for them.

Weights change once per optimizer step and are rounded once per step, however many passes it has.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from edgeft.train.grids import Grid

_AT_ONCE = 1 << 23
"""Weights merged at once: 32 MB of float32."""

_FEWEST, _ONE_IN = 128, 4
"""Tokens that dL/dW is estimated from: a quarter of them, but not fewer than so many."""


class Merged:
    """W + s·B·A of one layer, and its rounded values as of the last time somebody asked."""

    def __init__(
        self, grid: Grid, weight: Tensor, a: Tensor, b: Tensor, scale: float, change: Tensor | None = None
    ) -> None:
        """
        Args:
            weight: (out, in), frozen, in the dtype that is computed in.
            a, b: (rank, in) and (out, rank), float32, trained.
            change: (out, blocks per row), float32, trained: a block's scale is the grid's times 1 + change.
        """
        self.grid, self.weight, self.a, self.b, self.scale, self.change = grid, weight, a, b, scale, change
        self.together: Sequence[Merged] = (self,)
        """Layers that are rounded when this one is: those that the same forward pass needs."""
        self._values: Tensor | None = None
        self.current = False
        """Whether the values are those of what is trained as it is."""

    def moved(self) -> None:
        """What is trained was changed. (Version counters do not tell: torch's fused AdamW leaves them as they are.)"""
        self.current = False

    def rounded(self) -> Tensor:
        """(out, in) in the weight's dtype; the same tensor until `moved`."""
        if not self.current:
            round_all(self.together)
        return self.values

    @property
    def values(self) -> Tensor:
        """What `rounded` returns, current or not."""
        if self._values is None:
            self._values = torch.empty_like(self.weight, memory_format=torch.contiguous_format)
        return self._values

    def pack(self) -> Tensor:
        """As the file stores it: the same sums in the same parts as in `rounded`."""
        with torch.no_grad():
            return torch.cat([self.grid.pack(self.exact(part, 0), self.factors(part)) for part in self.parts()])

    def parts(self) -> Iterator[slice]:
        """Rows that are merged at once."""
        rows, columns = self.weight.shape
        step = max(1, _AT_ONCE // columns)
        for start in range(0, rows, step):
            yield slice(start, min(start + step, rows))

    def exact(self, part: slice, begin: int) -> Tensor:
        """These rows of W + s·B·A, float32, in the shared buffer from number `begin` on."""
        weight = self.weight[part]
        place = _buffer(begin + weight.numel(), weight.device)[begin:].view(weight.shape)
        return place.copy_(weight).addmm_(self.b[part], self.a, alpha=self.scale)

    def factors(self, part: slice) -> Tensor | None:
        """Of the scales of these rows' blocks."""
        return None if self.change is None else 1 + self.change.detach()[part]


def round_all(layers: Sequence[Merged]) -> None:
    """Round layers; as many are merged as the buffer holds before these are rounded.

    torch's threads merge, threads of our own round, and at each change between them torch's still spin on the cores
    for a while (edgeft.openmp): after every single layer, that took as long as the rounding itself.
    """
    waiting: list[tuple[Tensor, Tensor, Tensor | None]] = []
    grid, used = layers[0].grid, 0
    with torch.no_grad():
        for layer in layers:
            for part in layer.parts():
                out = layer.values[part]
                if waiting and (layer.grid is not grid or used + out.numel() > _AT_ONCE):
                    grid.values_of(waiting)
                    waiting, used = [], 0
                grid = layer.grid
                waiting.append((layer.exact(part, used), out, layer.factors(part)))
                used += out.numel()
        grid.values_of(waiting)
    for layer in layers:
        layer.current = True


_BUFFERS: dict[torch.device, Tensor] = {}


def _buffer(count: int, device: torch.device) -> Tensor:
    """Float32 numbers that all layers take in turn: fresh pages for each would cost as much as the sums."""
    held = _BUFFERS.get(device)
    if held is None or held.numel() < count:
        held = _BUFFERS[device] = torch.empty(max(count, _AT_ONCE), device=device)
    return held[:count]


class RoundedLinear(torch.autograd.Function):  # type: ignore[misc]
    """`x Q(W + s·B·A)^T + bias`; keeps x only."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, merged: Merged, a: Tensor, b: Tensor, change: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        weight = merged.rounded().to(x.dtype)
        ctx.save_for_backward(x, a, b, change)
        ctx.weight, ctx.scale = weight, merged.scale
        return functional.linear(x, weight, None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, a, b, change = ctx.saved_tensors
        flat, grad = x.reshape(-1, x.shape[-1]), grads[0].reshape(-1, grads[0].shape[-1])
        down = flat @ a.to(x.dtype).t()
        grad_down = (grad @ b.to(grad.dtype)).mul_(ctx.scale)
        grad_a = (grad_down.t() @ flat).to(a.dtype)
        grad_b = (grad.t() @ down).to(b.dtype).mul_(ctx.scale)
        grad_change = None if change is None else scale_gradient(grad, flat, ctx.weight, change)
        grad_x = (grad @ ctx.weight).view(x.shape) if ctx.needs_input_grad[0] else None
        return grad_x, None, grad_a, grad_b, grad_change, None


def scale_gradient(grad: Tensor, x: Tensor, weight: Tensor, change: Tensor) -> Tensor:
    """Of t in d = d₀ · (1 + t), the scales of blocks: d₀ · code · dL/dW summed over each; of many tokens, an estimate.

    Args:
        grad: (tokens, out), of the layer's output.
        x: (tokens, in), its input.
        weight: (out, in), as computed with: d₀ · code · (1 + t).
        change: t, (out, blocks per row), float32.
    """
    rows, blocks = change.shape
    grad, x = sampled(grad, x)
    products = (grad.t() @ x).mul_(weight).view(rows * blocks, -1)
    # A product with ones sums bfloat16 in float32, in a fifth of the time of `sum`.
    summed = products @ products.new_ones(products.shape[1], 1)
    return summed.view(rows, blocks).float().div_(1 + change)


def sampled(grad: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Some rows of both, weighted so that gradᵀ x of them is on average that of all rows.

    dL/dW of all tokens costs as much as the forward pass. Half of the chance to be drawn goes by |grad|, as Drineas,
    Kannan and Mahoney have it (2006, SIAM J. Comput. 36(1), section 4), half is the same for all, so that no weight is
    large. Without their |x|: in some layers a few tokens have twenty times the activations of others, in few columns,
    and would be most of what is drawn. Draws are at even distances from a random start, which torch's generator gives:
    checkpoints keep its state.
    """
    count = max(_FEWEST, len(grad) // _ONE_IN)
    if count >= len(grad):
        return grad, x
    sizes = torch.linalg.vector_norm(grad, dim=1, dtype=torch.float32)
    sizes = (sizes + sizes.mean()).clamp_min_(1e-30)  # none is 0 / 0
    summed = sizes.cumsum(0)
    distance = summed[-1] / count
    places = (torch.arange(count, device=grad.device) + torch.rand(())) * distance
    drawn = torch.searchsorted(summed, places).clamp_(max=len(grad) - 1)
    return grad[drawn].mul_((distance / sizes[drawn]).to(grad.dtype)[:, None]), x[drawn]
