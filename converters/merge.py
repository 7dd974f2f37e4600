"""Rows of base + adapter in float32, computed slab by slab: the merged model never exists as a whole."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edgeft.errors import ModelError

from . import nf4
from .adapter import Change
from .ggml import Ggml, GgmlType
from .safetensors_rows import Reader, StoredTensor

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]
    Order = NDArray[np.intp]


class Scratch(threading.local):
    """Buffers of one thread, grown once and used again: fresh pages for every slab would cost more than the sums."""

    def __init__(self) -> None:
        self._bytes: dict[str, NDArray[np.uint8]] = {}

    def raw(self, name: str, size: int) -> NDArray[np.uint8]:
        held = self._bytes.get(name)
        if held is None or held.size < size:
            held = self._bytes[name] = np.empty(size, np.uint8)
        return held[:size]

    def floats(self, name: str, rows: int, columns: int) -> Floats:
        return self.raw(name, rows * columns * 4).view(np.float32).reshape(rows, columns)


class MergedTensor:
    """One weight of the merged model, W + what the adapter does to it (see `adapter.Change`)."""

    def __init__(
        self,
        base: StoredTensor,
        change: Change | None = None,
        order: Order | None = None,
        *,
        nf4: bool = False,
        plus: float = 0.0,
    ) -> None:
        """
        Args:
            plus: what is added to every weight of the result.
            nf4: W is the base's weight as QLoRA trains on it (see edgeft.converters.nf4).
            order: which source row each output row is; a permutation inside groups of rows, and slabs must hold
                whole groups.
        """
        self.change = change or Change()
        self.source = self.change.replacement or self.change.base or base
        self.order = order
        self.nf4 = nf4 and self.source is base
        self.plus = np.float32(plus)

    @property
    def parts(self) -> tuple[MergedTensor, ...]:
        return (self,)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape

    @property
    def inputs(self) -> list[StoredTensor]:
        change = self.change
        parts = (self.source, change.down, change.up, change.magnitude, change.token_rows, change.offset)
        return [part for part in parts if part is not None]

    def load(self, reader: Reader, ggml: Ggml) -> LoadedTensor:
        """Read what every slab needs: the low-rank factors and vectors. One thread at a time.

        Raises:
            ModelError: a file cannot be read, or an adapter tensor is not finite.
        """
        for part in self.inputs:
            reader.open(part)
        return LoadedTensor(self, reader, ggml)


@dataclass(frozen=True)
class Stack:
    """Tensors of one shape that become one tensor: experts, norms of heads."""

    parts: tuple[MergedTensor, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.parts), *self.parts[0].shape)

    @property
    def order(self) -> None:
        """Rows are in their places."""


class LoadedTensor:
    """A merged tensor whose small parts are in memory; `rows` may be called from several threads."""

    def __init__(self, tensor: MergedTensor, reader: Reader, ggml: Ggml) -> None:
        self._tensor, self._reader, self._ggml = tensor, reader, ggml
        self._scratch = _SCRATCH
        self._nf4 = self._nf4_scales() if tensor.nf4 else None
        self._left, self._right = self._factors()
        self._magnitude = self._vector(tensor.change.magnitude)
        self._column_factor = self._embedding_magnitude()

    def rows(self, start: int, stop: int, rounding: GgmlType | None = None) -> Floats:
        """Merged rows [start, stop), shape (stop - start, columns); valid until this thread's next call.

        Args:
            rounding: the 16-bit type that the merged model would have been saved in.

        Raises:
            ModelError: a value is NaN or infinite (names tensor and row), or the file cannot be read.
        """
        weights = self._merged(start, stop)
        change = self._tensor.change
        if self._column_factor is not None:
            weights *= self._column_factor
        elif self._magnitude is not None:
            norms = np.sqrt(np.einsum("ij,ij->i", weights, weights))
            weights *= (self._ordered(self._magnitude)[start:stop] / norms)[:, None]
        if change.token_rows is not None:
            self._replace_tokens(weights, start, stop)
        if change.offset is not None:
            weights += self._ordered(self._vector(change.offset)) * np.float32(change.scale)
        self._check_finite(weights, start)
        if rounding is not None:
            self._ggml.round_to(rounding, weights)
        if self._tensor.plus:
            weights += self._tensor.plus
        return weights

    def _merged(self, start: int, stop: int) -> Floats:
        """W + scale · B @ A."""
        weights = self._stored(start, stop)
        if self._left is not None and self._right is not None:
            delta = self._scratch.floats("delta", *weights.shape)
            np.matmul(self._left[start:stop], self._right, out=delta)
            weights += delta
        return weights

    def _stored(self, start: int, stop: int) -> Floats:
        source, order = self._tensor.source, self._tensor.order
        row_bytes = source.bytes // source.rows
        raw = self._scratch.raw("raw", (stop - start) * row_bytes)
        self._reader.read(source, start, stop - start, raw)
        if order is not None and len(source.shape) > 1:
            ordered = self._scratch.raw("ordered", raw.size)
            table = (stop - start, row_bytes)
            np.take(raw.reshape(table), order[start:stop] - start, axis=0, out=ordered.reshape(table), mode="clip")
            raw = ordered
        weights = self._scratch.floats("weights", stop - start, source.columns)
        self._ggml.widen(source.dtype, raw, weights)
        if self._nf4 is not None:
            scales = self._nf4[start:stop] if order is None else self._nf4[order[start:stop]]
            weights[:] = nf4.round_trip(weights, scales)
        return self._ordered(weights[0])[None] if len(source.shape) == 1 else weights

    def _nf4_scales(self) -> Floats:
        """(rows, blocks per row); they are rounded together, which takes all rows: one pass before the real one."""
        source = self._tensor.source
        raw = np.empty(source.bytes // source.rows * _PASS_ROWS, np.uint8)
        weights = np.empty((_PASS_ROWS, source.columns), np.float32)
        found = []
        for start in range(0, source.rows, _PASS_ROWS):
            count = min(_PASS_ROWS, source.rows - start)
            part, wide = raw[: source.bytes // source.rows * count], weights[:count]
            self._reader.read(source, start, count, part)
            self._ggml.widen(source.dtype, part, wide)
            self._check_finite(wide, start, ordered=False)
            found.append(nf4.peaks(wide))
        return nf4.stored_scales(np.concatenate(found))

    def _ordered(self, vector: Floats | None) -> Floats:
        assert vector is not None
        return vector if self._tensor.order is None else vector[self._tensor.order]

    def _factors(self) -> tuple[Floats | None, Floats | None]:
        """(rows, rank) in output order and already scaled, and (rank, columns)."""
        change = self._tensor.change
        if change.down is None or change.up is None:
            return None, None
        down, up = self._whole(change.down), self._whole(change.up)[:, change.up_columns]
        left, right = (down.T, np.ascontiguousarray(up.T)) if change.embedding else (up, down)
        if self._tensor.order is not None:
            left = left[self._tensor.order]
        return np.ascontiguousarray(left * np.float32(change.scale)), right

    def _embedding_magnitude(self) -> Floats | None:
        """DoRA on an embedding normalizes columns, which takes all rows: one pass before the real one."""
        if self._magnitude is None or not self._tensor.change.embedding:
            return None
        rows, columns = self._tensor.shape
        squares = np.zeros(columns, np.float64)
        for start in range(0, rows, _PASS_ROWS):
            part = self._merged(start, min(start + _PASS_ROWS, rows))
            squares += np.einsum("ij,ij->j", part, part)
        return (self._magnitude / np.sqrt(squares)).astype(np.float32)

    def _replace_tokens(self, weights: Floats, start: int, stop: int) -> None:
        change = self._tensor.change
        assert change.token_rows is not None
        inside = [(at, token - start) for at, token in enumerate(change.tokens) if start <= token < stop]
        if inside:
            table = self._whole(change.token_rows)
            for at, row in inside:
                weights[row] = table[at]

    def _vector(self, stored: StoredTensor | None) -> Floats | None:
        return None if stored is None else self._whole(stored).reshape(-1)

    def _whole(self, stored: StoredTensor) -> Floats:
        return read_whole(self._reader, self._ggml, stored)

    def _check_finite(self, weights: Floats, start: int, *, ordered: bool = True) -> None:
        # A sum of squares is NaN or infinite when any value is, and costs a tenth of looking at each; a sum that
        # overflows although all values are finite sends it to the exact test.
        flat = weights.reshape(-1)
        with np.errstate(over="ignore", invalid="ignore"):
            if np.isfinite(np.dot(flat, flat)):
                return
        bad = np.flatnonzero(~np.isfinite(weights).all(axis=1))
        if bad.size == 0:
            return
        row, source = start + int(bad[0]), self._tensor.source
        if ordered and self._tensor.order is not None and len(source.shape) > 1:
            row = int(self._tensor.order[row])
        merged = "" if self._tensor.change == Change() or not ordered else " after the adapter is added"
        raise ModelError(
            f"{source.file}: tensor {source.name} is NaN or infinite in row {row}{merged}",
            "The model is damaged or its training diverged; nothing was written.",
        )


_PASS_ROWS = 1024
_SCRATCH = Scratch()


def read_whole(reader: Reader, ggml: Ggml, stored: StoredTensor) -> Floats:
    """A small tensor as float32, shape as stored (a vector: (1, length)).

    Raises:
        ModelError: it cannot be read or is not finite.
    """
    reader.open(stored)
    raw = np.empty(stored.bytes, np.uint8)
    reader.read(stored, 0, stored.rows, raw)
    values = np.empty((stored.rows, stored.columns), np.float32)
    ggml.widen(stored.dtype, raw, values)
    if not np.isfinite(values).all():
        row = int(np.flatnonzero(~np.isfinite(values).all(axis=1))[0])
        raise ModelError(f"{stored.file}: tensor {stored.name} is NaN or infinite in row {row}")
    return values
