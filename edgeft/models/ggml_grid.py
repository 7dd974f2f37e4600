"""ggml's grids for torch: weights rounded as `ggml_quantize_chunk` rounds them, because it is what rounds them.

On a CPU the C functions do everything: they are what llama.cpp's files are made with, and an imitation in torch took
several times as long (docs/quantization-aware.md). edgeft.models.torch_grid has that imitation, for other devices.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from edgeft.errors import ModelError, UnsupportedModel
from edgeft.models import ggml_rows, torch_grid
from edgeft.models.gguf_header import TENSOR_TYPES
from edgeft.models.slabs import Part, address, in_slabs, scratch


class GgmlGrid:
    """A tensor type of ggml; see `edgeft.train.grids.Grid`."""

    def __init__(self, name: str) -> None:
        """Raises: MissingDependency, UnsupportedModel when the installed ggml lacks the type."""
        self.name = name
        self.id, (_, self.block, self.block_bytes) = next(
            (number, entry) for number, entry in TENSOR_TYPES.items() if entry[0] == name
        )
        self._quantize, self._read, self._narrow = _quantizer(), ggml_rows.to_float32(name), ggml_rows.to_bfloat16()

    def row_bytes(self, columns: int) -> int:
        return columns // self.block * self.block_bytes

    def check(self, name: str, columns: int) -> None:
        """Raises: UnsupportedModel."""
        if columns % self.block:
            raise UnsupportedModel(f"{name} has {columns} columns, which do not fill blocks of {self.block}")

    def values(self, weights: Tensor, out: Tensor) -> None:
        """See `edgeft.train.grids.Grid`."""
        self.values_of([(weights, out, None)])

    def values_of(self, parts: Sequence[Part]) -> None:
        """See `edgeft.train.grids.Grid`."""
        if parts[0][0].device.type == "cpu":
            in_slabs([part[0] for part in parts], lambda which, *rows: self._round(*parts[which], *rows))
            return
        for weights, out, factors in parts:
            if factors is None:
                out.copy_(torch_grid.values(self.name, weights))
            else:
                out.copy_(self.unpack(self.pack(weights, factors), weights.shape[1]))

    def pack(self, weights: Tensor, factors: Tensor | None = None) -> Tensor:
        """See `edgeft.train.grids.Grid`. Raises: ModelError when a scale does not fit into 16 bits."""
        weights, factors = weights.detach().cpu(), None if factors is None else factors.detach().cpu()
        packed = torch.empty(len(weights), self.row_bytes(weights.shape[1]), dtype=torch.uint8)
        in_slabs([weights], lambda _, *rows: self._pack(weights, packed, factors, *rows))
        if not _library().ggml_validate_row_data(self.id, packed.data_ptr(), packed.numel()):
            raise ModelError(f"weights are not finite, or too large for {self.name}", "Train with a lower rate.")
        return packed

    def unpack(self, packed: Tensor, columns: int) -> Tensor:
        """Stored rows as float32 (rows, columns)."""
        out = torch.empty(len(packed), columns)
        self._read(packed.data_ptr(), out.data_ptr(), out.numel())
        return out

    def _pack(self, weights: Tensor, packed: Tensor, factors: Tensor | None, start: int, stop: int) -> None:
        rows, columns = stop - start, weights.shape[1]
        self._quantize(self.id, address(weights, start), address(packed, start), 0, rows, columns, None)
        if factors is not None:
            self._rescale(packed[start:stop], factors[start:stop])

    def _round(self, weights: Tensor, out: Tensor, factors: Tensor | None, start: int, stop: int) -> None:
        rows, columns = stop - start, weights.shape[1]
        count = rows * columns
        stored, wide = scratch(rows * self.row_bytes(columns), 4 * count)
        self._quantize(self.id, address(weights, start), stored.data_ptr(), 0, rows, columns, None)
        if factors is not None:
            self._rescale(stored[: rows * self.row_bytes(columns)], factors[start:stop])
        if out.dtype == torch.float32:
            self._read(stored.data_ptr(), address(out, start), count)
            return
        self._read(stored.data_ptr(), wide.data_ptr(), count)
        self._narrow(wide.data_ptr(), address(out, start), count)

    def _rescale(self, packed: Tensor, factors: Tensor) -> None:
        """Multiply the scales of packed rows, in place; for types whose blocks begin with their one scale."""
        scales = packed.view(torch.float16).view(-1, self.block_bytes // 2)[:, 0]
        scales.copy_(scales.float().mul_(factors.reshape(-1)))


@cache
def _library() -> Any:
    library = ggml_rows.library()
    library.ggml_validate_row_data.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
    library.ggml_validate_row_data.restype = ctypes.c_bool
    return library


@cache
def _quantizer() -> Any:
    function = getattr(_library(), "ggml_quantize_chunk", None)
    if function is None:
        raise UnsupportedModel("the installed ggml has no ggml_quantize_chunk")
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    function.argtypes = [ctypes.c_int, pointer, pointer, count, count, count, pointer]
    function.restype = ctypes.c_size_t
    return function
