"""Inputs of ternary layers in 8 bits, as llama.cpp computes with them: it multiplies ternary blocks by blocks of Q8_K.

Per 256 inputs x with m the one of largest magnitude (`quantize_row_q8_K_ref` in ggml-quants.c): q = min(127,
round(x · -127 / m)), value q · m / -127. Rounding counts as the identity in the backward pass. The values are rounded
to the dtype that is computed in, which in bfloat16 keeps the 8 bits but not the last digit of the scale.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

BLOCK = 256


def install(model: Any, weights: Iterable[str]) -> None:
    """Round the inputs of these layers, named by their weights."""
    for name in weights:
        layer = model.get_submodule(name.removesuffix(".weight"))
        if isinstance(layer, torch.nn.Linear):
            layer.register_forward_pre_hook(_round_input)


def _round_input(_: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return _Rounded.apply(inputs[0]), *inputs[1:]


def values(x: Tensor) -> Tensor:
    """What llama.cpp makes of inputs (..., columns); the same shape and dtype."""
    blocks = x.float().reshape(-1, BLOCK)
    largest = blocks.gather(1, blocks.abs().argmax(1, keepdim=True))
    inverse = (-127.0 / largest).nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
    codes = (blocks * inverse).round_().clamp_(max=127)
    return (codes * (largest / -127.0)).to(x.dtype).view(x.shape)


class _Rounded(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return values(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0]
