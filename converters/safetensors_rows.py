"""Rows of safetensors, read slab by slab, so that memory does not grow with the model.

Reads with `pread` into the caller's buffer rather than through a memory map: mapped pages would count as the
process's memory, and a file that shrinks under a map ends the process with SIGBUS instead of an error.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from edgeft.errors import ModelError, UnsupportedModel
from edgeft.models.weights import refuse_pickles
from edgeft.paths import parse_json

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

ITEM_BYTES: Mapping[str, int] = {"F32": 4, "F16": 2, "BF16": 2}
"""Bytes per value of the types that hold plain weights."""

_MAX_HEADER = 100_000_000
"""Bytes; the limit of the safetensors library itself."""
_MAX_DIMENSIONS = 8


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
    """Tensors of one file by name; the file is long enough for all of them, and no two share bytes.

    Raises:
        ModelError: not a safetensors file, or cut short (names the first tensor that is not whole).
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > min(size - 8, _MAX_HEADER):
                raise ModelError(f"{file} is cut short inside its header", _FETCH)
            header: dict[str, Any] = dict(parse_json(stream.read(length), pairs=_unique))
        header.pop("__metadata__", None)
        tensors = [_stored(file, 8 + length, name, entry) for name, entry in header.items()]
    except OSError as error:
        raise ModelError(f"{file} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise ModelError(f"{file} is not a safetensors file: {error}", _FETCH) from error
    _check_places(file, tensors, size)
    return {tensor.name: tensor for tensor in tensors}


_FETCH = "Copy or download the file again."


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice[:100]!r} is there twice")
    return found


def _check_places(file: Path, tensors: Sequence[StoredTensor], size: int) -> None:
    end, before = 0, ""
    for tensor in sorted(tensors, key=lambda tensor: (tensor.offset, tensor.bytes)):
        if tensor.offset + tensor.bytes > size:
            raise ModelError(
                f"{file} is cut short: tensor {tensor.name} ends at byte {tensor.offset + tensor.bytes:,}, "
                f"the file at {size:,}",
                _FETCH,
            )
        if tensor.offset < end:
            raise ModelError(f"{file} is damaged: tensor {tensor.name} begins inside tensor {before}", _FETCH)
        end, before = tensor.offset + tensor.bytes, tensor.name


def _stored(file: Path, base: int, name: str, entry: Mapping[str, Any]) -> StoredTensor:
    start, end = (_whole(name, value) for value in entry["data_offsets"])
    shape = tuple(_whole(name, length) for length in entry["shape"])
    dtype = entry["dtype"]
    if len(shape) > _MAX_DIMENSIONS or end < start or not isinstance(dtype, str):
        raise ValueError(f"the entry of tensor {name[:100]} makes no sense")
    tensor = StoredTensor(name, file, dtype[:20], shape, base + start, end - start)
    item = ITEM_BYTES.get(tensor.dtype)
    if item is not None:
        expected = item * math.prod(shape)
        if expected != tensor.bytes:
            raise ValueError(f"tensor {name} of shape {shape} has {tensor.bytes} bytes, not {expected}")
    return tensor


def _whole(name: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 63:
        raise ValueError(f"the entry of tensor {name[:100]} has {value!r:.40} where a whole number belongs")
    return value


def index(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of a Hugging Face directory: one file, or the parts its index names.

    Raises:
        ModelError: no safetensors, a missing part, or a part that lacks what the index promises.
    """
    names = folder / "model.safetensors.index.json"
    if not names.is_file():
        return _merged(sorted(folder.glob("model*.safetensors")), folder)
    try:
        weight_map: dict[str, str] = parse_json(names.read_text(encoding="utf-8"))["weight_map"]
        files = [folder / _part(part) for part in sorted(set(weight_map.values()))]
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


def _part(name: str) -> str:
    """Raises: ValueError when it is no file's name in the same folder."""
    if Path(name).name != name:
        raise ValueError(f"{name[:100]!r} is not the name of a file beside it")
    return name


def _merged(files: Sequence[Path], folder: Path) -> dict[str, StoredTensor]:
    if not files:
        refuse_pickles(folder)
        raise ModelError(f"{folder} has no model.safetensors", "edgeft reads weights from safetensors only.")
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        found = read_header(file)
        if twice := next(iter(found.keys() & tensors.keys()), None):
            raise ModelError(f"{file} and {tensors[twice].file.name} both have tensor {twice}", _FETCH)
        tensors.update(found)
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
