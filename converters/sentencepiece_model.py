"""`tokenizer.model`, SentencePiece's own file, read without the sentencepiece package.

The file is one protocol-buffer message (`sentencepiece_model.proto`): ModelProto{1: repeated SentencePiece{1: piece,
2: score, 3: type}, 2: TrainerSpec{3: model_type}, 3: NormalizerSpec{3: add_dummy_prefix}}.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from edgeft.errors import ModelError, UnsupportedModel

_NORMAL = 1
_MODEL_TYPES = {1: "unigram", 2: "BPE", 3: "word", 4: "char"}


class Piece(NamedTuple):
    text: str
    score: float
    type: int


@dataclass(frozen=True)
class SentencePieceModel:
    pieces: tuple[Piece, ...]
    add_dummy_prefix: bool


def read(file: Path) -> SentencePieceModel:
    """Raises: ModelError when the file is damaged, UnsupportedModel when it is not a BPE model."""
    try:
        return _parse(file.read_bytes(), file)
    except (OSError, ValueError, IndexError, struct.error) as error:
        raise ModelError(f"{file} is not a SentencePiece model: {error}", "Fetch the model again.") from error


def _parse(data: bytes, file: Path) -> SentencePieceModel:
    pieces: list[Piece] = []
    model_type, dummy_prefix = 1, True
    for number, value in _fields(data):
        if number == 1:
            pieces.append(_piece(_bytes(value)))
        elif number == 2:
            model_type = _number(_bytes(value), 3, model_type)
        elif number == 3:
            dummy_prefix = bool(_number(_bytes(value), 3, 1))
    if not pieces:
        raise ValueError("no pieces")
    if _MODEL_TYPES.get(model_type) != "BPE":
        raise UnsupportedModel(
            f"{file} is a {_MODEL_TYPES.get(model_type, model_type)} model; edgeft exports BPE tokenizers only"
        )
    return SentencePieceModel(tuple(pieces), dummy_prefix)


def _piece(data: bytes) -> Piece:
    text, score, kind = "", 0.0, _NORMAL
    for number, value in _fields(data):
        if number == 1:
            text = _bytes(value).decode("utf-8")
        elif number == 2:
            (score,) = struct.unpack("<f", _bytes(value))
        elif number == 3 and isinstance(value, int):
            kind = value
    return Piece(text, score, kind)


def _number(data: bytes, wanted: int, default: int) -> int:
    for number, value in _fields(data):
        if number == wanted and isinstance(value, int):
            default = value
    return default


def _bytes(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise ValueError("a number where text belongs")
    return value


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Field number and value of each field: varints as int, everything else as bytes."""
    position = 0
    while position < len(data):
        tag, position = _varint(data, position)
        number, wire = tag >> 3, tag & 7
        if wire == 0:
            value, position = _varint(data, position)
            yield number, value
            continue
        if wire not in (1, 2, 5):
            raise ValueError(f"wire type {wire} at byte {position}")
        size, position = _varint(data, position) if wire == 2 else ({1: 8, 5: 4}[wire], position)
        if position + size > len(data):
            raise ValueError(f"cut short at byte {position}")
        yield number, data[position : position + size]
        position += size


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value, shift = 0, 0
    while True:
        byte = data[position]
        value |= (byte & 0x7F) << shift
        position += 1
        if byte < 0x80:
            return value, position
        shift += 7
