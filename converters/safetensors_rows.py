"""Rows of safetensors, read slab by slab, so that memory does not grow with the model.

Reads with `pread` into the caller's buffer rather than through a memory map: mapped pages would count as the
process's memory, and a file that shrinks under a map ends the process with SIGBUS instead of an error.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from edgeft.errors import ModelError, UnsupportedModel

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

ITEM_BYTES: Mapping[str, int] = {"F32": 4, "F16": 2, "BF16": 2}
"""Bytes per value of the types that hold plain weights."""

_MAX_HEADER = 100_000_000
"""Bytes; the limit of the safetensors library itself."""


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    bytes: int

    @property
    def rows(self) -> int:
        """A vector counts as one row."""
        return self.shape[0] if len(self.shape) > 1 else 1

    @property
    def columns(self) -> int:
        return self.bytes // self.rows // ITEM_BYTES[self.dtype] if self.rows else 0


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Tensors of one file by name; the file is long enough for all of them.

    Raises:
        ModelError: not a safetensors file, or cut short (names the first tensor that is not whole).
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > min(size - 8, _MAX_HEADER):
                raise ModelError(f"{file} is cut short inside its header", _FETCH)
            header: dict[str, Any] = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        tensors = [_stored(file, 8 + length, name, entry) for name, entry in header.items()]
    except OSError as error:
        raise ModelError(f"{file} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise ModelError(f"{file} is not a safetensors file: {error}", _FETCH) from error
    for tensor in sorted(tensors, key=lambda tensor: tensor.offset):
        if tensor.offset + tensor.bytes > size:
            raise ModelError(
                f"{file} is cut short: tensor {tensor.name} ends at byte {tensor.offset + tensor.bytes:,}, "
                f"the file at {size:,}",
                _FETCH,
            )
    return {tensor.name: tensor for tensor in tensors}


_FETCH = "Copy or download the file again."


def _stored(file: Path, base: int, name: str, entry: Mapping[str, Any]) -> StoredTensor:
    start, end = entry["data_offsets"]
    shape = tuple(int(length) for length in entry["shape"])
    tensor = StoredTensor(name, file, entry["dtype"], shape, base + start, end - start)
    item = ITEM_BYTES.get(tensor.dtype)
    if item is not None:
        expected = item
        for length in shape:
            expected *= length
        if expected != tensor.bytes or start < 0:
            raise ValueError(f"tensor {name} of shape {shape} has {tensor.bytes} bytes, not {expected}")
    return tensor


def index(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of a Hugging Face directory: one file, or the parts its index names.

    Raises:
        ModelError: no safetensors, a missing part, or a part that lacks what the index promises.
    """
    names = folder / "model.safetensors.index.json"
    if not names.is_file():
        return _merged(sorted(folder.glob("model*.safetensors")), folder)
    try:
        weight_map: dict[str, str] = json.loads(names.read_text(encoding="utf-8"))["weight_map"]
        files = [folder / part for part in sorted(set(weight_map.values()))]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{names} cannot be read: {error}", _FETCH) from error
    for file in files:
        if not file.is_file():
            raise ModelError(f"{file} is missing; {names.name} names it", _FETCH)
    tensors = _merged(files, folder)
    for name, part in weight_map.items():
        if name not in tensors:
            raise ModelError(f"{folder / part} lacks tensor {name}, which {names.name} places there", _FETCH)
    return tensors


def _merged(files: Sequence[Path], folder: Path) -> dict[str, StoredTensor]:
    if not files:
        raise ModelError(f"{folder} has no model.safetensors", "edgeft reads weights from safetensors only.")
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        tensors.update(read_header(file))
    return tensors


class Reader:
    """Open files of a checkpoint; `read` may be called from several threads."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._handles: dict[Path, int] = {}

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def open(self, tensor: StoredTensor) -> None:
        """Open the tensor's file; not to be called from several threads at once.

        Raises:
            UnsupportedModel: the tensor is stored in an integer or 8-bit type.
            ModelError: the file cannot be opened.
        """
        check_dtype(tensor)
        self.open_file(tensor)

    def open_file(self, tensor: StoredTensor) -> None:
        """The same for a tensor of any type. Raises: ModelError."""
        if tensor.file in self._handles:
            return
        try:
            handle = os.open(tensor.file, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        except OSError as error:
            raise ModelError(f"{tensor.file} cannot be read: {error.strerror}") from error
        self._stack.callback(os.close, handle)
        self._handles[tensor.file] = handle

    def read(self, tensor: StoredTensor, start: int, rows: int, out: NDArray[np.uint8]) -> None:
        """Fill `out` with the stored bytes of `rows` rows from row `start` on.

        Raises:
            ModelError: the file ends early or cannot be read.
        """
        view = out.reshape(-1).data
        position = tensor.offset + start * (tensor.bytes // tensor.rows)
        handle = self._handles[tensor.file]
        while view:
            try:
                done = os.preadv(handle, [view], position)
            except OSError as error:
                raise ModelError(f"{tensor.file}: tensor {tensor.name} cannot be read: {error.strerror}") from error
            if done == 0:
                raise ModelError(f"{tensor.file} is cut short inside tensor {tensor.name}", _FETCH)
            view, position = view[done:], position + done


def check_dtype(tensor: StoredTensor) -> None:
    """Raises: UnsupportedModel when the tensor does not hold plain 16- or 32-bit weights."""
    if tensor.dtype not in ITEM_BYTES:
        raise UnsupportedModel(
            f"{tensor.file}: tensor {tensor.name} is stored as {tensor.dtype}",
            "Export reads BF16, F16 and F32 weights; give the model before it was quantized.",
        )
