"""From a model reference to its facts: files on this machine, or headers on a server."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from edgeft.errors import MissingDependency, ModelError, Unreachable, UsageError
from edgeft.forecast.facts import ModelFacts, of_gguf, of_safetensors
from edgeft.models import ResolvedModel, hub, remote, resolve
from edgeft.models.gguf_header import read_header
from edgeft.models.text import read_object
from edgeft.paths import parse_json
from edgeft.run import Run

Entry = tuple[str, str, int, int]
Read = Callable[[int, int], bytes]
"""(start, length) -> bytes of one file."""

_INDEX = "model.safetensors.index.json"
_MAX_HEADER = 100_000_000
"""Bytes; the limit of the safetensors library itself."""


def find_facts(reference: str) -> ModelFacts:
    """Facts of a model; nothing but headers is read, and nothing is kept.

    Args:
        reference: what `edgeft.models.resolve` takes, or the address of a GGUF or of a folder on a server.

    Raises:
        UsageError, ModelError, Unreachable
    """
    if remote.is_url(reference):
        return _on_server(remote.url_of(reference), reference)
    try:
        found = resolve(reference, here_only=True)
    except (Unreachable, MissingDependency):
        if not reference.startswith(hub.PREFIX) or hub.offline():
            raise
        return _on_server(remote.url_of(reference), reference)
    return _here(found)


def _here(found: ResolvedModel) -> ModelFacts:
    if found.kind == "gguf":
        return of_gguf(read_header(found.path), _short(found.reference))
    if found.kind == "run":
        return _of_run(Run(found.path), _short(found.reference))
    if found.kind == "hf":
        return _of_folder(found.path, _short(found.reference))
    raise UsageError(
        f"{found.reference} is no GGUF and no Hugging Face directory", "Forecasts are for those and for runs on them."
    )


def _short(reference: str) -> str:
    """The last part of a path; a name on the hub or an alias as it is."""
    return reference if reference.startswith(hub.PREFIX) else Path(reference).name or reference


def _of_run(run: Run, name: str) -> ModelFacts:
    base = run.manifest().base
    if gguf := base.get("gguf"):
        return of_gguf(read_header(Path(gguf)), name)
    return _of_folder(run.model, name)


def _of_folder(folder: Path, name: str) -> ModelFacts:
    config = read_object(folder / "config.json")
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise ModelError(f"{folder} has no model.safetensors", "edgeft reads weights from safetensors only.")
    entries = [entry for file in files for entry in _entries(_reader(file), str(file))]
    return of_safetensors(config, entries, name)


def _reader(file: Path) -> Read:
    def read(start: int, length: int) -> bytes:
        with file.open("rb") as stream:
            stream.seek(start)
            return stream.read(length)

    return read


def _on_server(url: str, name: str) -> ModelFacts:
    if url.endswith(".gguf"):
        with remote.gguf_header(url) as header:
            return of_gguf(header, name)
    config = remote.read_json(url + "config.json")
    entries = [
        entry
        for part in _parts(url)
        for entry in _entries(lambda start, length, part=part: remote.read(url + part, start, length).data, url + part)  # type: ignore[misc]
    ]
    return of_safetensors(config, entries, name)


def _parts(url: str) -> list[str]:
    """Names of the files of weights."""
    try:
        names = remote.read_json(url + _INDEX).get("weight_map")
    except remote.NotThere:
        return ["model.safetensors"]
    if not isinstance(names, dict) or not all(isinstance(part, str) for part in names.values()):
        raise ModelError(f"{url}{_INDEX} has no weight_map")
    parts = sorted(set(names.values()))
    if any("/" in part or part.startswith(".") for part in parts):
        raise ModelError(f"{url}{_INDEX} names files elsewhere")
    return parts


def _entries(read: Read, name: str) -> Iterator[Entry]:
    """Tensors of a safetensors file. Raises: ModelError."""
    try:
        (length,) = struct.unpack("<Q", read(0, 8))
        if length > _MAX_HEADER:
            raise ValueError(f"it announces a header of {length} bytes")
        header: dict[str, Any] = parse_json(read(8, length))
        header.pop("__metadata__", None)
        for key, entry in header.items():
            start, end = entry["data_offsets"]
            if not 0 <= start <= end:
                raise ValueError(f"tensor {key[:100]} ends before it begins")
            yield key, str(entry["dtype"]), math.prod(entry["shape"]), end - start
    except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise ModelError(f"{name} is not a safetensors file: {error}", "Fetch or copy it again.") from error
