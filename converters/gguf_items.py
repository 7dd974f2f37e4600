"""One tensor of a GGUF to be written: its weights, its type, its place."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from . import gguf_types
from .ggml import GgmlType
from .gguf_writer import TensorInfo
from .merge import MergedTensor, Stack

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .packed_rows import PackedTensor

    Floats = NDArray[np.float32]


def available_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class Item:
    """One tensor of the file."""

    name: str
    shape: tuple[int, ...]
    type: GgmlType
    note: str
    source: MergedTensor | Stack | PackedTensor | NDArray[np.float32]
    """Weights to merge, rows to copy, or values that are computed (rotary factors)."""
    row_group: int = 1
    """Rows that must be read together."""
    importance: Floats | None = None
    """Mean squared input of every column, (columns,), or of every expert's, (experts, columns)."""

    @property
    def columns(self) -> int:
        return self.shape[-1]

    @property
    def rows(self) -> int:
        return self.weights // self.columns

    @property
    def weights(self) -> int:
        return gguf_types.Shape(self.name, self.shape).weights

    @property
    def info(self) -> TensorInfo:
        return TensorInfo(self.name, self.shape, self.type.id, self.rows * self.type.row_bytes(self.columns))
