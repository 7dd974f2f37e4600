"""Records from JSONL, JSON, CSV, Parquet and text files: every one is an example or a bad line with its reason."""

from __future__ import annotations

import codecs
import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeft.data.example import Example, Preference
from edgeft.data.formats import BadRecord, Format, detect, parse
from edgeft.errors import DataError, require

_CSV_FIELD_LIMIT = 1 << 27
"""Bytes of one CSV field; Python's own limit is 128 KiB, less than a long conversation."""


@dataclass(frozen=True)
class BadLine:
    """A line (of Parquet: a row) that cannot be used."""

    file: Path
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}"


@dataclass(frozen=True)
class Record:
    """An example, and where it begins. `line` counts from 1; of Parquet it is the row."""

    item: Example | Preference
    file: Path
    line: int
    format: Format
    """What it was read as."""


Row = tuple[int, Any]
"""(line, decoded value), or (line, BadRecord)."""


def read_records(file: Path, as_format: Format | None = None) -> Iterator[Record | BadLine]:
    """Everything in a file, in order.

    Args:
        as_format: read every record as this; None detects it record by record.

    Raises:
        DataError: no such file, an unknown kind of file, an empty one, or one that cannot be read as a whole.
    """
    reader = _READERS.get(file.suffix.lower())
    if reader is None:
        raise DataError(f"{file}: unknown kind of file", f"edgeft reads {', '.join(_READERS)}.")
    try:
        if file.stat().st_size == 0:
            raise DataError(f"{file} is empty", "Put at least one example into it.")
        for line, value in reader(file):
            try:
                if isinstance(value, BadRecord):
                    raise value
                item = parse(value, as_format)
                yield Record(item, file, line, as_format or detect(value) or "messages")
            except BadRecord as error:
                yield BadLine(file, line, str(error))
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror or error}") from error


def _jsonl(file: Path) -> Iterator[Row]:
    with file.open("rb") as stream:
        head = stream.read(4)
        if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            yield from _json_lines(line.encode() for line in _decode(file).splitlines(keepends=True))
            return
        stream.seek(len(codecs.BOM_UTF8) if head.startswith(codecs.BOM_UTF8) else 0)
        yield from _json_lines(stream)


def _json_lines(lines: Any) -> Iterator[Row]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        yield number, _json_line(line)


def _json_line(line: bytes) -> Any:
    if b"\0" in line:
        return BadRecord(f"NUL byte at column {line.index(0) + 1}")
    try:
        return json.loads(line.decode())
    except UnicodeDecodeError as error:
        return BadRecord(f"not UTF-8 at byte {error.start + 1}")
    except json.JSONDecodeError as error:
        return BadRecord(f"not JSON: {error.msg} at column {error.colno}")
    except RecursionError:
        return BadRecord("not JSON: nested too deeply")


def _json(file: Path) -> Iterator[Row]:
    """A list of records, or an object that holds one. A syntax error ends it; what came before is kept."""
    text = _decode(file)
    start = text.find("[")
    body = text.lstrip()
    if not body.startswith("[") and not _is_wrapped(body):
        raise DataError(f"{file} holds no list of records", "Expected [{…}, {…}], or JSONL with the suffix .jsonl.")
    yield from _elements(text, start + 1)


def _is_wrapped(body: str) -> bool:
    """Whether a text begins {"data": [ or the like."""
    name, _, rest = body[1:].partition(":")
    return body.startswith("{") and name.strip().strip('"') in ("data", "examples", "rows") and rest.lstrip()[:1] == "["


def _elements(text: str, position: int) -> Iterator[Row]:
    decoder = json.JSONDecoder()
    line, counted = 1, 0
    while True:
        position = _skip(text, position, " \t\r\n,")
        if text[position : position + 1] == "]":
            return
        line, counted = line + text.count("\n", counted, position), position
        try:
            value, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            yield error.lineno, BadRecord(f"not JSON: {error.msg} at column {error.colno}; the rest cannot be read")
            return
        except RecursionError:
            yield line, BadRecord("not JSON: nested too deeply; the rest cannot be read")
            return
        yield line, value


def _skip(text: str, position: int, characters: str) -> int:
    while position < len(text) and text[position] in characters:
        position += 1
    return position


def _csv(file: Path) -> Iterator[Row]:
    text = _decode(file)
    limit = csv.field_size_limit(_CSV_FIELD_LIMIT)
    try:
        rows = csv.reader(io.StringIO(text, newline=""), delimiter="\t" if file.suffix.lower() == ".tsv" else ",")
        names = [name.strip() for name in next(rows)]
        if len(set(names)) < len(names):
            raise DataError(f"{file}:1: two columns have the same name")
        line = rows.line_num + 1
        for row in rows:
            if row:
                yield line, _csv_row(names, row)
            line = rows.line_num + 1
    except csv.Error as error:
        raise DataError(f"{file}:{rows.line_num}: not CSV: {error}") from error
    finally:
        csv.field_size_limit(limit)


def _csv_row(names: list[str], row: list[str]) -> Mapping[str, str | None] | BadRecord:
    if len(row) != len(names):
        return BadRecord(f"{len(row)} fields, but the header has {len(names)}")
    return {name: value or None for name, value in zip(names, row, strict=True)}


def _parquet(file: Path) -> Iterator[Row]:
    parquet = require("pyarrow.parquet", "train")
    arrow = require("pyarrow", "train")
    number = 0
    try:
        for batch in parquet.ParquetFile(file).iter_batches(batch_size=1024):
            for value in batch.to_pylist():
                number += 1
                yield number, value
    except arrow.ArrowException as error:
        raise DataError(f"{file}: not a readable Parquet file after row {number}: {error}") from error


def _txt(file: Path) -> Iterator[Row]:
    """Blocks between blank lines."""
    block: list[str] = []
    lines = _decode(file).splitlines()
    for number, line in enumerate([*lines, ""], 1):
        if line.strip():
            block.append(line)
        elif block:
            yield number - len(block), {"text": "\n".join(block)}
            block = []


def _decode(file: Path) -> str:
    """A whole file as text: UTF-8 with or without a byte order mark, or UTF-16 with one."""
    raw = file.read_bytes()
    wide = raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = raw.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(f"{file}:{line}: not {'UTF-16' if wide else 'UTF-8'}", "Save the file as UTF-8.") from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise DataError(f"{file}:{line}: NUL character", "Is this a text file? Save it as UTF-8.")
    return text


_READERS: Mapping[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
    ".txt": _txt,
}
SUFFIXES = tuple(_READERS)
