"""Scale-only tuning: the codes of a rounded base stay, the scale of every block is trained.

The idea of PEQA (Kim et al. 2023, arXiv 2305.14152) on ggml's blocks: a block's value is fp16(d) · code, and what is
trained is t in d = d₀ · (1 + t), so that one learning rate suits all layers. Nothing is rounded but d to float16: the
gradient of t is d₀ · code · dL/dW summed over the block, through the float16 rounding as if it were not there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from edgeft.errors import UnsupportedModel
from edgeft.models.ggml_grid import GgmlGrid
from edgeft.models.packed import write_packed
from edgeft.train.rounded import scale_gradient

SCALED = ("Q4_0", "Q8_0")
"""Types whose blocks begin with their one float16 scale (`ggml-common.h`)."""

_SCALE_BYTES = 2


def check_scaled(name: str, kinds: Mapping[str, str]) -> str:
    """The tensor's type. Raises: UnsupportedModel when its blocks have more than one scale."""
    if kinds[name] not in SCALED:
        raise UnsupportedModel(
            f"{name} is stored as {kinds[name]}, whose blocks have more than a scale",
            "Leave out --tune, or train for gguf-q4_0.",
        )
    return kinds[name]


class ScaledLinear(torch.nn.Module):  # type: ignore[misc]
    """A linear layer over packed blocks, with a trained factor per block."""

    def __init__(self, layer: torch.nn.Linear, grid: GgmlGrid) -> None:
        super().__init__()
        rows, columns = layer.weight.shape
        self.grid, self.columns, self.bias = grid, columns, layer.bias
        packed = grid.pack(layer.weight.detach().float().contiguous())
        blocks = packed.view(rows, columns // grid.block, grid.block_bytes)
        self.first = blocks[:, :, :_SCALE_BYTES].contiguous().view(torch.float16).squeeze(-1)
        self.blocks, self.dtype = blocks, layer.weight.dtype
        self.change = torch.nn.Parameter(torch.zeros(self.first.shape))
        self._dense: Tensor | None = None

    def moved(self) -> None:
        """The scales are others now."""
        self._dense = None

    def packed(self) -> Tensor:
        """(rows, bytes per row) as the file stores them."""
        scales = (self.first.float() * (1 + self.change.detach())).half()
        self.blocks[:, :, :_SCALE_BYTES] = scales.unsqueeze(-1).view(torch.uint8)
        return self.blocks.view(len(self.blocks), -1)

    def dense(self) -> Tensor:
        """(out, in) in the dtype that is computed in; the same tensor until `moved`."""
        if self._dense is None:
            self._dense = self.grid.unpack(self.packed(), self.columns).to(self.dtype)
        return self._dense

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = _ScaledProduct.apply(x, self, self.change)
        return result


class _ScaledProduct(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: ScaledLinear, change: Tensor) -> Tensor:
        weight = layer.dense()
        ctx.save_for_backward(x, change)
        ctx.weight = weight
        return functional.linear(x, weight.to(x.dtype), None if layer.bias is None else layer.bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, change = ctx.saved_tensors
        weight = ctx.weight.to(x.dtype)
        flat, grad = x.reshape(-1, x.shape[-1]), grads[0].reshape(-1, grads[0].shape[-1])
        grad_change = scale_gradient(grad, flat, weight, change)
        grad_x = (grad @ weight).view(x.shape) if ctx.needs_input_grad[0] else None
        return grad_x, None, grad_change


class TunedScales:
    """See `edgeft.train.aware.Aware`; made before the trainer, which then finds the scales to train."""

    ships = True

    def __init__(self, target: str, kinds: Mapping[str, str], model: Any) -> None:
        """Raises: UnsupportedModel when a layer's type has more than one scale per block."""
        self.target, self._kinds = target, kinds
        self._layers: dict[str, ScaledLinear] = {}
        self._constants: dict[str, Tensor] = {}
        self._step = -1
        model.requires_grad_(False)
        linear = {f"{name}.weight": name for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)}
        parameters = dict(model.named_parameters())
        for name, kind in kinds.items():
            if name in linear and ".layers." in name:
                self._scale(model, name, linear[name])
            else:
                self._constants[name] = self._round(parameters[name], GgmlGrid(kind))

    def _scale(self, model: Any, name: str, path: str) -> None:
        parent, _, attribute = path.rpartition(".")
        layer = ScaledLinear(model.get_submodule(path), GgmlGrid(check_scaled(name, self._kinds)))
        setattr(model.get_submodule(parent), attribute, layer)
        self._layers[name] = layer

    def _round(self, parameter: Tensor, grid: GgmlGrid) -> Tensor:
        packed = grid.pack(parameter.detach().float().contiguous())
        with torch.no_grad():
            parameter.copy_(grid.unpack(packed, parameter.shape[1]))
        return packed

    @contextlib.contextmanager
    def exact(self) -> Iterator[None]:
        """See `edgeft.train.aware.Aware`; there are no unrounded weights."""
        yield

    def install(self, model: Any) -> None:
        """See `edgeft.train.aware.Aware`."""

    def at_step(self, step: int) -> None:
        """See `edgeft.train.aware.Aware`."""
        if step != self._step:
            self.moved()
            self._step = step

    def moved(self) -> None:
        """See `edgeft.train.aware.Aware`."""
        for layer in self._layers.values():
            layer.moved()

    def save(self, folder: Path) -> None:
        """See `edgeft.train.aware.Aware`."""
        packed = {name: layer.packed() for name, layer in self._layers.items()} | self._constants
        write_packed(folder, self.target, {name: (self._kinds[name], packed[name]) for name in self._kinds})
