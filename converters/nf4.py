"""The base as QLoRA trained on it: weights rounded to NF4 with double quantization, and back.

An adapter trained over a 4-bit base also learns to make up for that base's rounding. Merged into the original weights
it makes up for errors that are not there: on SmolLM2-135M that doubled the file's loss (docs/export.md). So a QLoRA
run is merged into what bitsandbytes made of the base, computed here without torch. Levels and blocks are those of the
QLoRA paper (Dettmers et al. 2023, arXiv 2305.14314, section 3 and appendix E); the 8-bit scales use the dynamic map of
arXiv 1511.04561.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from edgeft.models.nf4 import BLOCK

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

_SCALES_BLOCK = 256

LEVELS = np.array(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ],
    np.float32,
)  # fmt: skip
_MIDDLES = (LEVELS[1:] + LEVELS[:-1]) / 2


def peaks(rows: Floats) -> Floats:
    """Largest magnitude of each block: (rows, columns) -> (rows, blocks per row)."""
    largest: Floats = np.abs(rows.reshape(len(rows), -1, BLOCK)).max(axis=2)
    return largest


def round_trip(rows: Floats, scales: Floats) -> Floats:
    """The nearest level of every weight times its block's stored scale, (rows, blocks per row): (rows, columns)."""
    exact = np.maximum(peaks(rows), np.float32(1e-38))
    nearest = np.searchsorted(_MIDDLES, rows.reshape(*exact.shape, BLOCK) * (np.float32(1) / exact)[:, :, None])
    return (LEVELS[nearest] * scales[:, :, None]).reshape(rows.shape)


def stored_scales(peaks: Floats) -> Floats:
    """Scales of a whole tensor as they come back from 8 bits; shape kept."""
    scales = peaks.reshape(-1)
    mean = np.float32(scales.mean(dtype=np.float64))
    rest = np.pad(scales - mean, (0, -scales.size % _SCALES_BLOCK)).reshape(-1, _SCALES_BLOCK)
    largest = np.abs(rest).max(axis=1, keepdims=True)
    levels = dynamic_levels()
    middles = (levels[1:] + levels[:-1]) / 2
    nearest = np.searchsorted(middles, rest / np.maximum(largest, np.float32(1e-38)))
    stored: Floats = (levels[nearest] * largest + mean).reshape(-1)[: scales.size].reshape(peaks.shape)
    return stored


@cache
def dynamic_levels() -> Floats:
    """The 256 levels of the signed dynamic 8-bit type, ascending: seven decades with 1, 2, 4, ... 64 values each."""
    decades = [np.linspace(0.1, 1, 2**decade + 1) for decade in range(7)]
    positive = np.concatenate([10.0 ** (at - 6) * (edges[1:] + edges[:-1]) / 2 for at, edges in enumerate(decades)])
    return np.sort(np.concatenate([-positive, [0.0], positive, [1.0]])).astype(np.float32)
