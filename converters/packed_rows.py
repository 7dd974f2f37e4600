"""Weights that a run trained in the form the file stores them: they go into it as they are."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgeft.errors import ModelError, UsageError
from edgeft.models.packed import read_packed

from .gguf_items import Item
from .merge import MergedTensor
from .safetensors_rows import Reader, StoredTensor, read_header

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Order = NDArray[np.intp]


class PackedTensor:
    """Stored rows of one tensor, in the file's order."""

    def __init__(self, stored: StoredTensor, order: Order | None) -> None:
        """
        Args:
            stored: (rows, bytes per row), U8, in the source's order.
            order: which source row each output row is; see `MergedTensor`.
        """
        self.stored, self._order = stored, order

    def rows(self, reader: Reader, start: int, stop: int) -> NDArray[np.uint8]:
        """Rows [start, stop), whole groups of them: (rows, bytes per row). Raises: ModelError."""
        out = np.empty((stop - start, self.stored.shape[1]), np.uint8)
        reader.read(self.stored, start, stop - start, out)
        return out if self._order is None else out[self._order[start:stop] - start]


def with_packed(items: Sequence[Item], folder: Path) -> list[Item]:
    """The items with every quantized tensor taken from a run's packed weights.

    Raises:
        UsageError: options ask for other types than the run was trained for.
        ModelError: the packed weights are not whole.
    """
    packed = read_packed(folder)
    stored = read_header(packed.weights)
    left = set(packed.types)
    made = []
    for item in items:
        name = item.source.source.name if isinstance(item.source, MergedTensor) else ""
        if name not in packed.types:
            made.append(item)
            continue
        left.discard(name)
        assert isinstance(item.source, MergedTensor)
        _check(item, name, packed.types[name], stored.get(name), packed.weights)
        made.append(dataclasses.replace(item, source=PackedTensor(stored[name], item.source.order)))
    if left:
        raise ModelError(f"{packed.weights} has {sorted(left)[0]}, which the file has no place for")
    return made


def _check(item: Item, name: str, kind: str, stored: StoredTensor | None, file: Path) -> None:
    if item.type.name != kind:
        raise UsageError(
            f"{item.name} was trained as {kind} and is to be stored as {item.type.name}",
            "Leave out --type-override and --imatrix: the run's file is fixed by its training.",
        )
    if stored is None or stored.dtype != "U8" or stored.shape != (item.rows, item.type.row_bytes(item.columns)):
        raise ModelError(f"{file} does not have {name} as {kind}", "Train again.")
