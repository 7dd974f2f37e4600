"""Models that exist to be timed: a Llama of any size and type with meaningless weights, written in a second.

The standard library writes them, since a device has no `gguf` package. Layout: the GGUF specification, ggml's
docs/gguf.md.
"""

from __future__ import annotations

import itertools
import math
import random
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from edgeft.models.gguf_header import TENSOR_TYPES

_NUMBERS = {name: (number, weights, size) for number, (name, weights, size) in TENSOR_TYPES.items()}
_ALIGNMENT = 32
_UINT32, _FLOAT32, _STRING, _ARRAY, _INT32 = 4, 6, 8, 9, 5
_NORMAL, _CONTROL = 1, 3
"""Kinds of tokens (llama.h, llama_token_type)."""

_SCALES: Mapping[str, Sequence[int]] = {
    "F16": (),
    "Q8_0": (0,),
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
}
"""Type -> where its blocks keep 16-bit scales (ggml-common.h); random bytes there could be infinite."""
TYPES = tuple(_SCALES)
_SCALE = struct.pack("<e", 0.001)
_PATTERN_BLOCKS = 512


@dataclass(frozen=True)
class Shape:
    type: str
    layers: int
    width: int = 2048
    inner: int = 5632
    heads: int = 32
    kv_heads: int = 8
    vocabulary: int = 257
    """All bytes and an end at least."""

    @property
    def weights(self) -> int:
        """Of the layers' matrices."""
        return self.layers * sum(rows * columns for _, rows, columns in self._matrices())

    @property
    def bytes(self) -> int:
        _, weights, size = _NUMBERS[self.type]
        return self.weights // weights * size

    def _matrices(self) -> list[tuple[str, int, int]]:
        kv = self.width * self.kv_heads // self.heads
        return [
            ("attn_q", self.width, self.width),
            ("attn_k", kv, self.width),
            ("attn_v", kv, self.width),
            ("attn_output", self.width, self.width),
            ("ffn_gate", self.inner, self.width),
            ("ffn_up", self.inner, self.width),
            ("ffn_down", self.width, self.inner),
        ]

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...], str]]:
        """Name, (rows, columns) and type."""
        yield "token_embd.weight", (self.vocabulary, self.width), "Q8_0"
        yield "output_norm.weight", (self.width,), "F32"
        for layer in range(self.layers):
            for norm in ("attn_norm", "ffn_norm"):
                yield f"blk.{layer}.{norm}.weight", (self.width,), "F32"
            for name, rows, columns in self._matrices():
                yield f"blk.{layer}.{name}.weight", (rows, columns), self.type


def sized(type_: str, size: int) -> Shape:
    """A model of about `size` bytes of layers, one at least."""
    one = Shape(type_, 1)
    return Shape(type_, max(1, round(size / one.bytes)))


def narrow() -> Shape:
    """Short rows, many small operations and, next to its weights, much attention: as models of 100 to 500 million
    weights. The shape is that of SmolLM2-135M's layers."""
    return Shape("Q8_0", 12, width=576, inner=1536, heads=9, kv_heads=3, vocabulary=32_768)


def wide() -> Shape:
    """The heads of models of a billion weights: four queries to a key, and eight keys side by side. One layer, whose
    prompt is soon computed."""
    return Shape("Q8_0", 1, width=2048, inner=2048, heads=32, kv_heads=8, vocabulary=2048)


def _byte_characters() -> list[str]:
    """GPT-2's stand-in for every byte: itself where it can be printed."""
    shown = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = iter(range(256, 512))
    return [chr(byte if byte in shown else next(hidden)) for byte in range(256)]


_BYTES = _byte_characters()
_END = len(_BYTES)


def _tokens(count: int) -> list[str]:
    """Bytes, the end, and words that no text has, since their merges begin with words."""
    return [*_BYTES, "<|end|>", *(f"word{at}" for at in range(count - _END - 1))]


def write_model(path: Path, shape: Shape) -> Path:
    """Raises: WriteError, OSError."""
    tensors = list(shape.tensors())
    with path.open("wb") as stream:
        stream.write(_header(shape, tensors))
        stream.write(b"\0" * (-stream.tell() % _ALIGNMENT))
        for _, dimensions, type_ in tensors:
            _write_tensor(stream, type_, math.prod(dimensions))
    return path


def _header(shape: Shape, tensors: Sequence[tuple[str, tuple[int, ...], str]]) -> bytes:
    values = _values(shape)
    parts = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(values))]
    parts += [_text(key) + value for key, value in values.items()]
    offset = 0
    for name, dimensions, type_ in tensors:
        number, weights, size = _NUMBERS[type_]
        columns_first = reversed(dimensions)
        parts.append(_text(name) + struct.pack(f"<I{len(dimensions)}Q", len(dimensions), *columns_first))
        parts.append(struct.pack("<IQ", number, offset))
        offset += _padded(math.prod(dimensions) // weights * size)
    return b"".join(parts)


def _values(shape: Shape) -> dict[str, bytes]:
    numbers = {
        "block_count": shape.layers, "context_length": 8192, "embedding_length": shape.width,
        "feed_forward_length": shape.inner, "attention.head_count": shape.heads,
        "attention.head_count_kv": shape.kv_heads, "rope.dimension_count": shape.width // shape.heads,
    }  # fmt: skip
    tokens = _tokens(shape.vocabulary)
    merges = [_text(f"{first} {second}") for first, second in itertools.pairwise(tokens[_END + 1 :])]
    types = [_NORMAL] * _END + [_CONTROL] + [_NORMAL] * (len(tokens) - _END - 1)
    text = {"general.architecture": "llama", "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2"}
    return {
        **{key: struct.pack("<I", _STRING) + _text(value) for key, value in text.items()},
        **{f"llama.{key}": struct.pack("<II", _UINT32, value) for key, value in numbers.items()},
        "llama.attention.layer_norm_rms_epsilon": struct.pack("<If", _FLOAT32, 1e-5),
        "tokenizer.ggml.tokens": _array(_STRING, [_text(token) for token in tokens]),
        "tokenizer.ggml.token_type": _array(_INT32, [struct.pack("<i", type_) for type_ in types]),
        "tokenizer.ggml.merges": _array(_STRING, merges),
        "tokenizer.ggml.eos_token_id": struct.pack("<II", _UINT32, _END),
        "tokenizer.ggml.bos_token_id": struct.pack("<II", _UINT32, _END),
    }


def _array(kind: int, values: Sequence[bytes]) -> bytes:
    return struct.pack("<IIQ", _ARRAY, kind, len(values)) + b"".join(values)


def _text(value: str) -> bytes:
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def _padded(size: int) -> int:
    return size + -size % _ALIGNMENT


def _write_tensor(stream: IO[bytes], type_: str, weights: int) -> None:
    _, per_block, size = _NUMBERS[type_]
    whole = weights // per_block * size
    pattern = _pattern(type_, size)
    for _ in range(whole // len(pattern)):
        stream.write(pattern)
    stream.write(pattern[: whole % len(pattern)] + b"\0" * (-whole % _ALIGNMENT))


def _pattern(type_: str, size: int) -> bytes:
    """Some hundred blocks."""
    if type_ == "F32":
        return struct.pack("<f", 1.0) * _PATTERN_BLOCKS
    draw = random.Random(0)
    if type_ == "F16":
        return b"".join(struct.pack("<e", draw.uniform(-0.02, 0.02)) for _ in range(_PATTERN_BLOCKS))
    return b"".join(_block(draw, type_, size) for _ in range(_PATTERN_BLOCKS))


def _block(draw: random.Random, type_: str, size: int) -> bytes:
    block = bytearray(draw.randbytes(size))
    for at in _SCALES[type_]:
        block[at : at + 2] = _SCALE
    return bytes(block)
