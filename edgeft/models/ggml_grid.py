"""ggml's grids for torch: weights rounded as `ggml_quantize_chunk` rounds them, because it is what rounds them.

On a CPU the C functions do everything: they are what llama.cpp's files are made with, and an imitation in torch took
several times as long (docs/quantization-aware.md). edgeft.models.torch_grid has that imitation, for other devices.
"""

from __future__ import annotations

import ctypes
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import torch
from torch import Tensor

from edgeft.errors import ModelError, UnsupportedModel
from edgeft.models import ggml_rows, torch_grid
from edgeft.models.gguf_header import TENSOR_TYPES

_SLAB = 1 << 16
"""Weights that a thread rounds at once: 256 kB of float32 there and back stay in a core's cache."""

_LOCAL = threading.local()


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
        if weights.device.type != "cpu":
            out.copy_(torch_grid.values(self.name, weights))
            return
        _in_slabs(weights, lambda start, stop: self._round(weights, out, start, stop))

    def pack(self, weights: Tensor) -> Tensor:
        """See `edgeft.train.grids.Grid`. Raises: ModelError when a scale does not fit into 16 bits."""
        weights = weights.detach().cpu()
        packed = torch.empty(len(weights), self.row_bytes(weights.shape[1]), dtype=torch.uint8)
        _in_slabs(weights, lambda start, stop: self._pack(weights, packed, start, stop))
        if not _library().ggml_validate_row_data(self.id, packed.data_ptr(), packed.numel()):
            raise ModelError(f"weights are not finite, or too large for {self.name}", "Train with a lower rate.")
        return packed

    def unpack(self, packed: Tensor, columns: int) -> Tensor:
        """Stored rows as float32 (rows, columns)."""
        out = torch.empty(len(packed), columns)
        self._read(packed.data_ptr(), out.data_ptr(), out.numel())
        return out

    def _pack(self, weights: Tensor, packed: Tensor, start: int, stop: int) -> None:
        rows, columns = stop - start, weights.shape[1]
        self._quantize(self.id, _address(weights, start), _address(packed, start), 0, rows, columns, None)

    def _round(self, weights: Tensor, out: Tensor, start: int, stop: int) -> None:
        rows, columns = stop - start, weights.shape[1]
        count = rows * columns
        stored, wide = _scratch(rows * self.row_bytes(columns), 4 * count)
        self._quantize(self.id, _address(weights, start), stored, 0, rows, columns, None)
        if out.dtype == torch.float32:
            self._read(stored, _address(out, start), count)
            return
        self._read(stored, wide, count)
        self._narrow(wide, _address(out, start), count)


def _in_slabs(weights: Tensor, work: Any) -> None:
    """Call `work(first row, end)` for all slabs, on as many threads as torch uses."""
    assert weights.is_contiguous() and weights.dtype == torch.float32
    step = max(1, _SLAB // weights.shape[1])
    spans = [(start, min(start + step, len(weights))) for start in range(0, len(weights), step)]
    threads = min(torch.get_num_threads(), len(spans))
    if threads < 2:
        for span in spans:
            work(*span)
        return

    def share(first: int) -> None:
        for span in spans[first::threads]:
            work(*span)

    list(_pool(threads).map(share, range(threads)))


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="edgeft-quantize")


def _address(tensor: Tensor, row: int) -> int:
    return int(tensor.data_ptr() + row * tensor.stride(0) * tensor.element_size())


def _scratch(*sizes: int) -> list[int]:
    """Addresses of this thread's buffers of so many bytes."""
    held = getattr(_LOCAL, "held", None)
    if held is None or any(buffer.numel() < size for buffer, size in zip(held, sizes, strict=True)):
        held = _LOCAL.held = [torch.empty(size, dtype=torch.uint8) for size in sizes]
    return [buffer.data_ptr() for buffer in held]


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
