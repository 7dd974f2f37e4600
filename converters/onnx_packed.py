"""Weights that a run trained as MatMulNBits stores them: they go into the graph as they are.

The builder of the graph puts matrices together (the query, key and value of a layer) and turns them around. Which rows
it took is found by giving it row numbers in place of weights, once per matrix.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeft.errors import ModelError
from edgeft.models import nbits
from edgeft.models.packed import Packed, read_packed

from .ggml import Ggml
from .onnx_quantize import Blocks
from .onnx_weights import WeightReader, Weights
from .safetensors_rows import Reader, StoredTensor, read_header

if TYPE_CHECKING:
    from numpy.typing import NDArray


class PackedReader(WeightReader):
    """Reads merged tensors, and those that were trained as their stored rows say."""

    def __init__(self, weights: Weights, reader: Reader, ggml: Ggml, folder: Path) -> None:
        """Raises: ModelError."""
        super().__init__(weights, reader, ggml)
        self._packed: Packed = read_packed(folder)
        self._file, self._stored = reader, read_header(self._packed.weights)
        self._numbering = False
        self._first: dict[str, int] = {}
        count = 0
        for name in self._packed.types:
            self._first[name] = count
            count += self._rows_of(name).shape[0]

    def read(self, name: str) -> NDArray[np.float32]:
        """See `WeightReader.read`; row numbers within `_row_numbers`."""
        if name not in self._packed.types:
            if self._numbering:
                raise ModelError(f"{self._packed.weights} lacks {name}", "Train again.")
            return super().read(name)
        stored, layout = self._rows_of(name), self._layout(name)
        if self._numbering:
            numbers = np.arange(stored.shape[0], dtype=np.float32) + self._first[name]
            return np.repeat(numbers[:, None], layout.columns, 1)
        return nbits.unpack(self._bytes(name), layout)

    def blocks(self, value: Any, bits: int, turned: bool) -> Blocks:
        """Of an initializer of the graph, which may be of several tensors.

        Args:
            turned: its columns are rows of the weights.

        Raises:
            ModelError: the builder did more than put rows together, or the weights have other bits.
        """
        rows, numbers = value.const_value.numpy(), self._numbers(value)
        if turned:
            rows, numbers = rows.T, numbers.T
        packed, layout = self._gathered(numbers[:, 0].astype(np.int64))
        if layout.bits != bits or not np.array_equal(nbits.unpack(packed, layout), rows):
            raise ModelError(f"{value.name} of the graph is not what was trained", "Please report this.")
        codes, scales, zeros = nbits.split(packed, layout)
        return Blocks(np.ascontiguousarray(codes), scales, np.ascontiguousarray(zeros))

    def _numbers(self, value: Any) -> NDArray[np.float32]:
        with self._row_numbers():
            result: NDArray[np.float32] = value.const_value.numpy()
        return result

    @contextlib.contextmanager
    def _row_numbers(self) -> Iterator[None]:
        self._numbering = True
        try:
            yield
        finally:
            self._numbering = False

    def _gathered(self, numbers: NDArray[np.int64]) -> tuple[NDArray[np.uint8], nbits.Layout]:
        names = list(self._first)
        starts = np.array([self._first[name] for name in names])
        owners = np.searchsorted(starts, numbers, "right") - 1
        layout = self._layout(names[owners[0]])
        packed = np.empty((len(numbers), layout.bytes), np.uint8)
        for owner in np.unique(owners):
            at = owners == owner
            packed[at] = self._bytes(names[owner])[numbers[at] - starts[owner]]
        return packed, layout

    def _bytes(self, name: str) -> NDArray[np.uint8]:
        stored = self._rows_of(name)
        out = np.empty(stored.shape, np.uint8)
        self._file.open_file(stored)
        self._file.read(stored, 0, len(out), out)
        return out

    def _layout(self, name: str) -> nbits.Layout:
        return nbits.layout_of(self._packed.types[name], self._rows_of(name).shape[1])

    def _rows_of(self, name: str) -> StoredTensor:
        stored = self._stored.get(name)
        if stored is None or stored.dtype != "U8" or len(stored.shape) != 2:
            raise ModelError(f"{self._packed.weights} does not have {name}", "Train again.")
        return stored
