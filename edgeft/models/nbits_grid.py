"""The grid of onnxruntime's MatMulNBits for torch; the rule is edgeft.models.nbits'."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from edgeft.errors import UnsupportedModel
from edgeft.models import ggml_rows, nbits
from edgeft.models.slabs import Part, address, in_slabs

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class NBitsGrid:
    """Blocks of 32 weights with a zero point; see `edgeft.train.grids.Grid`."""

    block = nbits.BLOCK

    def __init__(self, name: str) -> None:
        """
        Args:
            name: one of `nbits.KINDS`.
        """
        self.name, self.bits = name, nbits.KINDS[name]
        self._narrow = ggml_rows.to_bfloat16()

    def row_bytes(self, columns: int) -> int:
        return nbits.Layout(self.bits, columns).bytes

    def check(self, name: str, columns: int) -> None:
        """Raises: UnsupportedModel."""
        if columns % self.block:
            raise UnsupportedModel(f"{name} has {columns} columns, which do not fill blocks of {self.block}")

    def values(self, weights: Tensor, out: Tensor) -> None:
        """See `edgeft.train.grids.Grid`."""
        self.values_of([(weights, out, None)])

    def values_of(self, parts: Sequence[Part]) -> None:
        """See `edgeft.train.grids.Grid`; these blocks have no factors."""
        if parts[0][0].device.type == "cpu":
            in_slabs([part[0] for part in parts], lambda which, *rows: self._round(*parts[which][:2], *rows))
            return
        for weights, out, _ in parts:
            out.copy_(torch.from_numpy(nbits.values(_numbers(weights), self.bits)))

    def pack(self, weights: Tensor, factors: Tensor | None = None) -> Tensor:
        """See `edgeft.train.grids.Grid`. Raises: ModelError when a weight is not finite."""
        return torch.from_numpy(nbits.pack(_numbers(weights), self.bits))

    def unpack(self, packed: Tensor, columns: int) -> Tensor:
        """Stored rows as float32 (rows, columns)."""
        return torch.from_numpy(nbits.unpack(packed.numpy(), nbits.Layout(self.bits, columns)))

    def _round(self, weights: Tensor, out: Tensor, start: int, stop: int) -> None:
        rounded = nbits.values(_numbers(weights[start:stop]), self.bits)
        if out.dtype == torch.float32:
            out[start:stop].numpy()[:] = rounded
        else:
            self._narrow(rounded.ctypes.data, address(out, start), rounded.size)


def _numbers(weights: Tensor) -> NDArray[np.float32]:
    result: Any = weights.detach().cpu().numpy()
    return result  # type: ignore[no-any-return]
