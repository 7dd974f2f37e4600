"""ggml's grids as torch formulas: the same codes and scales on every block (tests/test_quantization_aware.py).

The C sources (`ggml/src/ggml-quants.c` of llama.cpp, quantize_row_*_ref) say, per block of 32 weights x:

    Q4_0   m the weight of largest magnitude, the first of several; d = m / -8; q = min(15, trunc(x · 1/d + 8.5))
           value fp16(d) · (q - 8)
    Q4_1   d = (max - min) / 15; q = min(15, trunc((x - min) · 1/d + 0.5)); value fp16(d) · q + fp16(min)
    Q8_0   d = max|x| / 127; q = round(x · 1/d), half away from zero; value fp16(d) · q

1/d is 0 where d is 0, and a block whose 1/d overflows is all zeros. Codes are made with the float32 scale, values with
the scale rounded to float16.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from edgeft.errors import UnsupportedModel

BLOCK = 32


def values(kind: str, weights: Tensor) -> Tensor:
    """What a runtime reads back of (rows, columns) float32 weights stored as `kind`. Raises: UnsupportedModel."""
    if kind not in FORMULAS:
        raise UnsupportedModel(f"{kind} is not computed on {weights.device}", f"Here: {', '.join(FORMULAS)}.")
    return FORMULAS[kind](weights.reshape(-1, BLOCK)).view(weights.shape)


def _q4_0(blocks: Tensor) -> Tensor:
    scale = blocks.gather(1, blocks.abs().argmax(1, keepdim=True)) / -8
    codes = (blocks * _inverse(scale)).add_(8.5).trunc_().clamp_(max=15)
    return codes.sub_(8).mul_(_stored(scale))


def _q4_1(blocks: Tensor) -> Tensor:
    least = blocks.amin(1, keepdim=True)
    scale = (blocks.amax(1, keepdim=True) - least) / 15
    codes = (blocks - least).mul_(_inverse(scale)).add_(0.5).trunc_().clamp_(max=15)
    return codes.mul_(_stored(scale)).add_(_stored(least))


def _q8_0(blocks: Tensor) -> Tensor:
    scale = blocks.abs().amax(1, keepdim=True) / 127
    scaled = blocks * _inverse(scale)
    # torch rounds half to even, C's roundf away from zero; 0.5 is added where that is exact.
    whole = scaled.trunc()
    codes = whole + (scaled - whole).mul_(2).trunc_()
    return codes.mul_(_stored(scale))


def _inverse(scale: Tensor) -> Tensor:
    # Below 3e-39 it overflows; such a scale is 0 in float16, and so is every value.
    return (1.0 / scale).nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)


def _stored(scale: Tensor) -> Tensor:
    return scale.half().float()


FORMULAS: Mapping[str, Callable[[Tensor], Tensor]] = {"Q4_0": _q4_0, "Q4_1": _q4_1, "Q8_0": _q8_0}
