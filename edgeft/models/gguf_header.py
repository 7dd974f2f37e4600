"""The header of a GGUF file: metadata and tensor table, read with the standard library alone.

Layout (GGUF v2 and v3, little endian): magic, version, tensor count, key count, keys with values, tensor table,
padding, tensor data. Source: the GGUF specification in ggml's docs/gguf.md.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from edgeft.errors import ModelError

T = TypeVar("T")

TENSOR_TYPES: Mapping[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
    41: ("Q1_0", 128, 18),
}
"""Type number -> name, weights per block, bytes per block (ggml's type traits)."""

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9

_AGAIN = "Fetch or export it again."

# Far above any real file (a vocabulary of 262,144 tokens with its merges takes 15 MB; the largest models have 20,000
# tensors), so that reading a header never takes much time or memory, whatever it says.
_MAX_HEADER = 1 << 27
_MAX_KEYS, _MAX_TENSORS = 1 << 16, 1 << 17
_MAX_DIMENSIONS = 4
_MAX_KEY, _MAX_NAME = 65535, 63
"""Bytes of a key, which the specification says, and of a tensor's name, which ggml's GGML_MAX_NAME says."""


@dataclass(frozen=True)
class TensorInfo:
    name: str
    shape: tuple[int, ...]
    """ggml's order: the first dimension is the contiguous one."""
    type: str
    offset: int
    """From the start of the tensor data."""
    bytes: int

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class _LazyArray:
    """An array that is decoded when it is asked for: vocabularies have 100,000 strings."""

    file: Path
    start: int
    type: int
    count: int


class Metadata(Mapping[str, Any]):
    """The keys of a GGUF. Long arrays are read from the file at each access."""

    def __init__(self, values: dict[str, Any]) -> None:
        self._values = values

    def __getitem__(self, key: str) -> Any:
        value = self._values[key]
        if isinstance(value, _LazyArray):
            with _mapped(value.file) as reader:
                reader.position = value.start
                return reader.items(value.type, value.count)
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


@dataclass(frozen=True)
class GgufHeader:
    path: Path
    version: int
    metadata: Metadata
    tensors: tuple[TensorInfo, ...]
    data_offset: int

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture", "unknown"))

    @property
    def name(self) -> str | None:
        return self._text("general.name")

    @property
    def licence(self) -> str | None:
        return self._text("general.license")

    @property
    def chat_template(self) -> str | None:
        return self._text("tokenizer.chat_template")

    @property
    def tokenizer_pre(self) -> str | None:
        """Name of the rule that splits text before byte-pair merging."""
        return self._text("tokenizer.ggml.pre")

    @property
    def context_length(self) -> int | None:
        return self.number(f"{self.architecture}.context_length")

    def _text(self, key: str) -> str | None:
        value = self.metadata.get(key)
        if value is None or isinstance(value, str):
            return value
        raise ModelError(f"{self.path} is damaged: {key} is not a text", _AGAIN)

    def number(self, key: str) -> int | None:
        """A whole number from the metadata; None when the file does not say. Raises: ModelError when it is none."""
        value = self.metadata.get(key)
        if value is None or (isinstance(value, int) and not isinstance(value, bool)):
            return value
        raise ModelError(f"{self.path} is damaged: {key} is not a whole number", _AGAIN)

    @property
    def parameters(self) -> int:
        return sum(tensor.elements for tensor in self.tensors)

    @property
    def tensor_bytes(self) -> int:
        return sum(tensor.bytes for tensor in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        """8 x tensor bytes / parameters: what the file has, not what its label says."""
        return 8 * self.tensor_bytes / self.parameters if self.parameters else 0.0

    @property
    def type_mix(self) -> dict[str, int]:
        """Type -> number of weights stored in it, most common first."""
        mix: dict[str, int] = {}
        for tensor in self.tensors:
            mix[tensor.type] = mix.get(tensor.type, 0) + tensor.elements
        return dict(sorted(mix.items(), key=lambda item: -item[1]))


def read_header(path: Path) -> GgufHeader:
    """Read a header and check that the tensors it announces lie in the file, one behind the other.

    Raises:
        ModelError: not a GGUF, damaged, or cut short.
    """
    with _mapped(path) as reader:
        return _parse(path, reader)


def _parse(path: Path, reader: _Reader) -> GgufHeader:
    version, tensor_count, key_count = reader.preamble()
    values = reader.unique("key", (reader.key_value() for _ in range(key_count)))
    tensors = reader.unique("tensor", ((found.name, found) for found in map(reader.tensor, range(tensor_count))))
    alignment = values.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 0 < alignment <= _MAX_HEADER or alignment & (alignment - 1):
        raise reader.damaged("general.alignment is not a power of two")
    data_offset = -(-reader.position // alignment) * alignment
    header = GgufHeader(path, version, Metadata(values), tuple(tensors.values()), data_offset)
    _check_places(header, reader, alignment)
    return header


def _check_places(header: GgufHeader, reader: _Reader, alignment: int) -> None:
    end, before = 0, ""
    for tensor in sorted(header.tensors, key=lambda tensor: tensor.offset):
        if tensor.offset % alignment:
            raise reader.damaged(f"tensor {tensor.name!r} begins at byte {tensor.offset}, not at whole {alignment}s")
        if tensor.offset < end:
            raise reader.damaged(f"tensor {tensor.name!r} begins inside tensor {before!r}")
        end, before = tensor.offset + tensor.bytes, tensor.name
        if header.data_offset + end > reader.size:
            raise ModelError(
                f"{header.path} is cut short: tensor {tensor.name!r} ends {header.data_offset + end} bytes in,"
                f" the file has {reader.size}",
                _AGAIN,
            )


class _mapped:
    """A reader over a memory-mapped file; closes the map."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> _Reader:
        try:
            with self._path.open("rb") as stream:
                self._map = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            # An empty file cannot be mapped (ValueError).
            reason = "it is empty" if isinstance(error, ValueError) else error.strerror
            raise ModelError(f"{self._path} is not a GGUF file: {reason}") from error
        return _Reader(self._path, self._map)

    def __exit__(self, *_: object) -> None:
        self._map.close()


class _Reader:
    """Reads values one after another; every count is checked against the file before it is believed."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.size, self.position = path, data, len(data), 0

    def damaged(self, what: str) -> ModelError:
        return ModelError(f"{self.path} is damaged: {what}", _AGAIN)

    def take(self, length: int) -> int:
        """Start of the next `length` bytes."""
        start = self.position
        if length > self.size - start:
            raise self.damaged(f"the header needs {length} bytes at {start}, the file has {self.size}")
        if start + length > _MAX_HEADER:
            raise self.damaged(f"its header has more than {_MAX_HEADER >> 20} MB")
        self.position = start + length
        return start

    def unique(self, what: str, pairs: Iterator[tuple[str, T]]) -> dict[str, T]:
        found: dict[str, T] = {}
        for name, value in pairs:
            if name in found:
                raise self.damaged(f"it has two {what}s named {name!r}")
            found[name] = value
        return found

    def number(self, code: str) -> Any:
        layout = struct.Struct("<" + code)
        return layout.unpack_from(self.data, self.take(layout.size))[0]

    def string(self, most: int = _MAX_HEADER) -> str:
        length = self.number("Q")
        if length > most:
            raise self.damaged(f"the name at byte {self.position} has {length} bytes")
        start = self.take(length)
        try:
            return self.data[start : start + length].decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.damaged(f"the text at byte {start} is not UTF-8") from error

    def preamble(self) -> tuple[int, int, int]:
        if self.data[:4] != b"GGUF":
            raise ModelError(f"{self.path} is not a GGUF file: it starts with {self.data[:4]!r}")
        self.position = 4
        version = self.number("I")
        if version not in (2, 3):
            raise ModelError(f"{self.path} has GGUF version {version}; edgeft reads 2 and 3 (little endian)")
        tensors, keys = self.number("Q"), self.number("Q")
        # The smallest entries take 12 (key) and 24 (tensor) bytes.
        if 12 * keys + 24 * tensors > self.size or keys > _MAX_KEYS or tensors > _MAX_TENSORS:
            raise self.damaged(f"it announces {tensors} tensors and {keys} keys")
        return version, tensors, keys

    def key_value(self) -> tuple[str, Any]:
        key = self.string(_MAX_KEY)
        return key, self.value(self.number("I"))

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self.array()
        if kind not in _SCALARS:
            raise self.damaged(f"unknown value type {kind} at byte {self.position}")
        return self.number(_SCALARS[kind])

    def array(self) -> Any:
        kind, count = self.number("I"), self.number("Q")
        start = self.position
        self.skip(kind, count)
        if count > 64:
            return _LazyArray(self.path, start, kind, count)
        self.position = start
        return self.items(kind, count)

    def skip(self, kind: int, count: int) -> None:
        if kind in _SCALARS:
            self.take(count * struct.calcsize("<" + _SCALARS[kind]))
        elif kind == _STRING:
            self.skip_strings(count)
        else:
            raise self.damaged(f"an array of type {kind} at byte {self.position}")

    def skip_strings(self, count: int) -> None:
        # The hot loop of a large vocabulary: local names, no calls into self.
        unpack, data, position, size = struct.Struct("<Q").unpack_from, self.data, self.position, self.size
        if count > min(size, _MAX_HEADER) // 8:
            raise self.damaged(f"it announces a list of {count} texts")
        for _ in range(count):
            if position + 8 > size:
                raise self.damaged(f"a list of {count} texts runs past the end")
            position += 8 + unpack(data, position)[0]
        self.take(position - self.position)

    def items(self, kind: int, count: int) -> list[Any]:
        if kind == _STRING:
            return [self.string() for _ in range(count)]
        layout = struct.Struct(f"<{count}{_SCALARS[kind]}")
        return list(layout.unpack_from(self.data, self.take(layout.size)))

    def tensor(self, _: int = 0) -> TensorInfo:
        name, dimensions = self.string(_MAX_NAME), self.number("I")
        if not 1 <= dimensions <= _MAX_DIMENSIONS:
            raise self.damaged(f"tensor {name!r} has {dimensions} dimensions")
        shape = tuple(self.number("Q") for _ in range(dimensions))
        kind, offset = self.number("I"), self.number("Q")
        if kind not in TENSOR_TYPES:
            raise ModelError(f"{self.path}: tensor {name!r} has the unknown type {kind}")
        label, block, block_bytes = TENSOR_TYPES[kind]
        if shape[0] % block:
            raise self.damaged(f"tensor {name!r} has rows of {shape[0]}, not a multiple of {block} ({label})")
        if 0 in shape:
            raise self.damaged(f"tensor {name!r} of shape {shape} is empty")
        return TensorInfo(name, shape, label, offset, math.prod(shape) // block * block_bytes)
