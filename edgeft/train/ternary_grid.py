"""BitNet b1.58's rounding (Ma et al. 2024, arXiv 2402.17764) in scales that ggml's ternary blocks hold exactly.

A group of weights W becomes s · T with s = mean|W| and T = clip(round(W / s), -1, 1). TQ1_0 and TQ2_0 store 256
weights with one float16 scale, and ggml takes the largest magnitude of a block for it (`quantize_row_tq2_0_ref` in
ggml-quants.c): of s · T that is s, wherever a block has a code other than zero. A block of zeros gets the scale 0,
which is as well: its values are zeros. So a file holds s · T exactly if s is a float16 number.

Here s has no more than the 8 significant bits of bfloat16, so that it is a float16 number *and* a bfloat16 one, and
training that multiplies in bfloat16 multiplies the file's own weights.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from edgeft.models.ggml_grid import GgmlGrid

Group = Literal["tensor", "row", "block"]
"""Which weights share a scale when it is computed."""

KINDS = ("TQ1_0", "TQ2_0")

BLOCK = 256
"""Weights of a block of TQ1_0 and TQ2_0."""

LEAST, LARGEST = 2.0**-16, 65280.0
"""Bounds of a scale. 2^-16 is about the 1e-5 of BitNet; down to 2^-17, float16 still has 8 significant bits. Above is
the largest bfloat16 number below float16's largest."""


class TernaryGrid:
    """A ternary type of ggml; see `edgeft.train.grids.Grid`."""

    def __init__(self, name: str, group: Group) -> None:
        """
        Args:
            name: one of `KINDS`.

        Raises:
            MissingDependency, UnsupportedModel: the installed ggml lacks the type.
        """
        self.name, self.group = name, group
        self._stored = GgmlGrid(name)

    def values(self, weights: Tensor, out: Tensor) -> None:
        """See `edgeft.train.grids.Grid`; columns fill whole blocks."""
        groups = weights.reshape(self._shape(weights))
        scale = scales(groups)
        # Adding zero makes a negative zero a positive one, as it comes back from a file.
        torch.mul((groups / scale).round_().clamp_(-1, 1).add_(0.0), scale, out=out.view(groups.shape))

    def pack(self, weights: Tensor) -> Tensor:
        """See `edgeft.train.grids.Grid`. Raises: ModelError when a weight is not finite."""
        exact = torch.empty_like(weights)
        self.values(weights, exact)
        return self._stored.pack(exact)

    def unpack(self, packed: Tensor, columns: int) -> Tensor:
        """Stored rows as float32 (rows, columns)."""
        return self._stored.unpack(packed, columns)

    def _shape(self, weights: Tensor) -> tuple[int, int]:
        sizes = {"tensor": weights.numel(), "row": weights.shape[1], "block": BLOCK}
        return -1, sizes[self.group]


def scales(groups: Tensor) -> Tensor:
    """Mean magnitude per row, (groups, 1), as the nearest number that float16 and bfloat16 both hold."""
    return groups.abs().mean(1, keepdim=True).bfloat16().float().clamp_(LEAST, LARGEST)
