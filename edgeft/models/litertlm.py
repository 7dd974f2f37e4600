"""Reading a .litertlm file: the graph, the tokenizer and what its engine knows about prompts and answers.

The layout is of LiteRT-LM (schema/core/litertlm_header_schema.fbs, runtime/proto/llm_metadata.proto): eight bytes of
magic, the end of the header at byte 24, a flatbuffer from byte 32 that lists sections, each with its place and kind.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from edgeft.errors import ModelError

MAGIC = b"LITERTLM"
_HEADER = 32
_LONGEST_HEADER = 1 << 20
_LONGEST_TEXT = 256 << 20
"""Bytes of an unpacked tokenizer; the largest published ones have 35 MB."""

GRAPH, METADATA, TOKENIZER = 3, 5, 6
"""Kinds of sections (AnySectionDataType)."""
_NAMES = {GRAPH: "graph", METADATA: "metadata", TOKENIZER: "Hugging Face tokenizer"}


@dataclass(frozen=True)
class Section:
    kind: int
    begin: int
    end: int


@dataclass(frozen=True)
class LitertFile:
    """What the engine would read."""

    path: Path
    sections: tuple[Section, ...]
    template: str | None
    start: int | str | None
    """Token before every prompt, by id or text, which the engine adds itself."""
    stops: tuple[int | str, ...]
    """Tokens that end an answer. A sequence of several ids is left out: it ends a text, not a vocabulary's answer."""
    context: int
    """Tokens of prompt and answer; 0 when the file does not say."""

    def section(self, kind: int) -> Section:
        """The first of a kind. Raises: ModelError when there is none."""
        found = next((one for one in self.sections if one.kind == kind), None)
        if found is None:
            raise ModelError(f"{self.path} has no {_NAMES.get(kind, kind)}", "Export the model again.")
        return found

    def read(self, kind: int) -> bytes:
        """The content of a section. Raises: ModelError when there is none, or the file cannot be read."""
        section = self.section(kind)
        try:
            with self.path.open("rb") as stream:
                stream.seek(section.begin)
                return stream.read(section.end - section.begin)
        except OSError as error:
            raise ModelError(f"{self.path} cannot be read: {error}") from error

    def tokenizer(self) -> bytes:
        """tokenizer.json. Raises: ModelError when the file has none, or a damaged one."""
        packed = self.read(TOKENIZER)
        try:
            unpacker = zlib.decompressobj()
            text = unpacker.decompress(packed[8:], _LONGEST_TEXT)
        except zlib.error as error:
            raise ModelError(f"{self.path}: the tokenizer is damaged: {error}", "Copy or export it again.") from error
        if not unpacker.eof:
            raise ModelError(f"{self.path}: the tokenizer is cut off, or larger than any")
        return text

    def write_text_side(self, folder: Path) -> None:
        """Tokenizer, template and end tokens as a Hugging Face directory has them. Raises: ModelError, OSError."""
        (folder / "tokenizer.json").write_bytes(self.tokenizer())
        if self.template is not None:
            (folder / "chat_template.jinja").write_text(self.template, encoding="utf-8")
        ids = [stop for stop in self.stops if isinstance(stop, int)]
        texts = [stop for stop in self.stops if isinstance(stop, str)]
        settings = {"eos_token": texts[0]} if texts else {}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}), encoding="utf-8")


def is_litertlm(path: Path) -> bool:
    try:
        with path.open("rb") as stream:
            return stream.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def read_litertlm(path: Path) -> LitertFile:
    """Raises: ModelError when it is not such a file, or a damaged one."""
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            begin = stream.read(_HEADER)
            if begin[: len(MAGIC)] != MAGIC or len(begin) < _HEADER:
                raise ModelError(f"{path} is no .litertlm file")
            end = int(struct.unpack_from("<Q", begin, 24)[0])
            if not _HEADER < end <= min(size, _LONGEST_HEADER):
                raise ModelError(f"{path} is cut off: its header ends at byte {end:,} of {size:,}", "Copy it again.")
            header = stream.read(end - _HEADER)
            sections = tuple(_sections(header))
            if any(not end <= one.begin <= one.end <= size for one in sections):
                raise ModelError(
                    f"{path} is cut off: it has {size:,} bytes, and a section ends later", "Copy it again."
                )
            metadata = next((one for one in sections if one.kind == METADATA), None)
            if metadata is None:
                raise ModelError(f"{path} does not say how its model is prompted: it has no metadata")
            stream.seek(metadata.begin)
            return _file(path, sections, stream.read(metadata.end - metadata.begin))
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error}") from error
    except (struct.error, IndexError, ValueError) as error:
        raise ModelError(f"{path} is damaged: {error}", "Copy or export it again.") from error


# --- The list of sections, a flatbuffer ------------------------------------------------


def _sections(data: bytes) -> Iterator[Section]:
    root = _reference(data, 0)
    listed = _field(data, root, 1)
    objects = _field(data, _reference(data, listed), 0) if listed else 0
    if not objects:
        return
    vector = _reference(data, objects)
    count = int(struct.unpack_from("<I", data, vector)[0])
    if count > len(data) // 4:
        raise ValueError(f"{count} sections in {len(data)} bytes")
    for at in range(count):
        table = _reference(data, vector + 4 + 4 * at)
        begin, end, kind = (_field(data, table, slot) for slot in (1, 2, 3))
        yield Section(
            data[kind] if kind else 0,
            int(struct.unpack_from("<Q", data, begin)[0]) if begin else 0,
            int(struct.unpack_from("<Q", data, end)[0]) if end else 0,
        )


def _reference(data: bytes, at: int) -> int:
    """Where the unsigned offset at `at` leads."""
    return at + int(struct.unpack_from("<I", data, at)[0])


def _field(data: bytes, table: int, slot: int) -> int:
    """Where a table's field lies; 0 when it has its default."""
    virtual = table - int(struct.unpack_from("<i", data, table)[0])
    if virtual < 0:
        raise ValueError("a table lies outside the header")
    if 4 + 2 * slot >= int(struct.unpack_from("<H", data, virtual)[0]):
        return 0
    offset = int(struct.unpack_from("<H", data, virtual + 4 + 2 * slot)[0])
    return table + offset if offset else 0


# --- The metadata, a protocol buffer ----------------------------------------------------


def _file(path: Path, sections: tuple[Section, ...], metadata: bytes) -> LitertFile:
    template, start, context = None, None, 0
    stops: list[int | str] = []
    for number, value in _fields(metadata):
        if number == 1 and isinstance(value, bytes):
            start = _token(value)
        elif number == 2 and isinstance(value, bytes) and (token := _token(value)) is not None:
            stops.append(token)
        elif number == 5 and isinstance(value, int):
            context = value
        elif number == 7 and isinstance(value, bytes):
            template = value.decode() or None
    return LitertFile(path, sections, template, start, tuple(stops), context)


def _token(union: bytes) -> int | str | None:
    """A TokenUnion: text, or a list of ids, of which only a single one is a token."""
    for number, value in _fields(union):
        if number == 2 and isinstance(value, bytes):
            return value.decode()
        if number == 1 and isinstance(value, bytes):
            ids = [id_ for field, found in _fields(value) if field == 1 for id_ in _ids(found)]
            return ids[0] if len(ids) == 1 else None
    return None


def _ids(value: int | bytes) -> Iterator[int]:
    """A repeated integer, alone or packed."""
    if isinstance(value, int):
        yield value
        return
    at = 0
    while at < len(value):
        id_, at = _varint(value, at)
        yield id_


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Field numbers and values of a message; fixed-width ones, which nothing here needs, as their bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        if kind == 2:
            length, at = _varint(data, at)
        elif kind in (1, 5):
            length = 8 if kind == 1 else 4
        else:
            raise ValueError(f"field {key >> 3} has wire type {kind}")
        if at + length > len(data):
            raise ValueError("a field of the metadata is cut off")
        yield key >> 3, data[at : at + length]
        at += length


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while shift < 64:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
    raise ValueError("a number of the metadata is too long")
