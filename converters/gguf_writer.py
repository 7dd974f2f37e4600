"""The GGUF container, written front to back: everything before the weights is known from the plan alone.

Layout (little-endian), from ggml's `docs/gguf.md`, version 3:
header | key-value pairs | tensor infos | padding | tensor data, each tensor padded to the alignment.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

ALIGNMENT = 32
"""Bytes; the default of `general.alignment`."""

_MAGIC = b"GGUF"
_VERSION = 3


class ValueType(enum.IntEnum):
    """Types of metadata values, by their number in the file."""

    UINT8 = 0
    INT8 = 1
    UINT16 = 2
    INT16 = 3
    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    UINT64 = 10
    INT64 = 11
    FLOAT64 = 12


_FORMATS = {
    ValueType.UINT8: "B",
    ValueType.INT8: "b",
    ValueType.UINT16: "H",
    ValueType.INT16: "h",
    ValueType.UINT32: "I",
    ValueType.INT32: "i",
    ValueType.FLOAT32: "f",
    ValueType.BOOL: "?",
    ValueType.UINT64: "Q",
    ValueType.INT64: "q",
    ValueType.FLOAT64: "d",
}


@dataclass(frozen=True)
class KeyValue:
    """One metadata pair. For an array, `type` is ARRAY and `item` the type of its elements."""

    key: str
    type: ValueType
    value: Any
    item: ValueType | None = None


def string(key: str, value: str) -> KeyValue:
    return KeyValue(key, ValueType.STRING, value)


def uint32(key: str, value: int) -> KeyValue:
    return KeyValue(key, ValueType.UINT32, value)


def float32(key: str, value: float) -> KeyValue:
    return KeyValue(key, ValueType.FLOAT32, value)


def boolean(key: str, value: bool) -> KeyValue:
    return KeyValue(key, ValueType.BOOL, value)


def array(key: str, item: ValueType, values: Sequence[Any]) -> KeyValue:
    return KeyValue(key, ValueType.ARRAY, values, item)


@dataclass(frozen=True)
class TensorInfo:
    name: str
    shape: tuple[int, ...]
    """Row-major; the file stores it reversed, fastest dimension first."""
    type_id: int
    """ggml's number of the type."""
    bytes: int


def padded(size: int) -> int:
    """`size` rounded up to the alignment."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def data_size(tensors: Sequence[TensorInfo]) -> int:
    """Bytes of all tensor data with padding."""
    return sum(padded(tensor.bytes) for tensor in tensors)


def head(metadata: Sequence[KeyValue], tensors: Sequence[TensorInfo]) -> bytes:
    """Everything before the first tensor, padded: a file is this and then the tensors in this order."""
    parts = [_MAGIC, struct.pack("<IQQ", _VERSION, len(tensors), len(metadata))]
    for pair in metadata:
        parts += [_text(pair.key), struct.pack("<I", pair.type), _value(pair)]
    offset = 0
    for tensor in tensors:
        dimensions = tuple(reversed(tensor.shape))
        parts += [
            _text(tensor.name),
            struct.pack(f"<I{len(dimensions)}Q", len(dimensions), *dimensions),
            struct.pack("<IQ", tensor.type_id, offset),
        ]
        offset += padded(tensor.bytes)
    joined = b"".join(parts)
    return joined + bytes(padded(len(joined)) - len(joined))


def _text(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def _value(pair: KeyValue) -> bytes:
    if pair.type is ValueType.STRING:
        return _text(pair.value)
    if pair.type is ValueType.ARRAY:
        assert pair.item is not None
        return struct.pack("<IQ", pair.item, len(pair.value)) + _items(pair.item, pair.value)
    return struct.pack(f"<{_FORMATS[pair.type]}", pair.value)


def _items(item: ValueType, values: Sequence[Any]) -> bytes:
    if item is ValueType.STRING:
        return b"".join(_text(value) for value in values)
    return struct.pack(f"<{len(values)}{_FORMATS[item]}", *values)
