"""Artifact: one deployable model file or folder, with a manifest beside it that says what it really is."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgeft.errors import ModelError
from edgeft.paths import parse_json, sha256_file, write_json

SCHEMA = 1


@dataclass(frozen=True)
class Manifest:
    """Everything known about an artifact; stored as JSON beside it."""

    format: str
    """One of gguf, onnx, pte, litertlm, adapter."""
    target: str
    """The export target that was asked for, such as "gguf-q4"."""
    types: Mapping[str, int]
    """Quantization type name -> number of weights stored in it: the actual mix, not the label."""
    parameters: int
    bits_per_weight: float
    """8 x tensor bytes / parameters."""
    bytes: int
    sha256: str
    base: Mapping[str, Any] = field(default_factory=dict)
    """`reference` and `digest` of the base model."""
    adapter: Mapping[str, Any] | None = None
    run: str | None = None
    """Folder of the run it was exported from."""
    chat_template_sha256: str | None = None
    stop_token_ids: tuple[int, ...] = ()
    system: str | None = None
    """The system prompt that every training example had; chatting without it would be another task."""
    licence: str | None = None
    ledger: Mapping[str, float] = field(default_factory=dict)
    """Stage -> mean negative log-likelihood (nats per completion token) on one held-out set."""
    verification: Mapping[str, Any] = field(default_factory=dict)
    """What `edgeft verify` measured last: data, runtime, and every step with its intervals."""
    notes: tuple[str, ...] = ()
    """What the reader should know: fallbacks that shapes forced, rounding, tied tensors."""
    edgeft_version: str = ""
    schema: int = SCHEMA


@dataclass(frozen=True)
class Artifact:
    path: Path
    manifest: Manifest | None = None
    """None for a file that edgeft did not make."""
    address: str = ""
    """URL of a model that another machine serves; `path` is then no file."""


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a directory artifact."""
    return sum(file.stat().st_size for file in _files(path))


def digest_of(path: Path) -> str:
    """Hex SHA-256 of a file; of a directory, over name and SHA-256 of every file in name order."""
    if path.is_file():
        return sha256_file(path)
    digest = hashlib.sha256()
    for file in _files(path):
        digest.update(f"{file.relative_to(path).as_posix()}\0{sha256_file(file)}\n".encode())
    return digest.hexdigest()


def _files(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]


def manifest_path(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def write_manifest(path: Path, manifest: Manifest) -> None:
    write_json(manifest_path(path), dataclasses.asdict(manifest))


def read_manifest(path: Path) -> Manifest | None:
    """The manifest beside an artifact, or None when there is none.

    Raises:
        ModelError: when it is there but cannot be read.
    """
    source = manifest_path(path)
    if not source.is_file():
        return None
    try:
        raw = parse_json(source.read_text(encoding="utf-8"))
        if raw["schema"] != SCHEMA:
            raise ModelError(f"{source} has schema {raw['schema']}; this edgeft reads schema {SCHEMA}")
        raw["stop_token_ids"] = tuple(raw["stop_token_ids"])
        raw["notes"] = tuple(raw["notes"])
        return Manifest(**raw)
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{source} is not an edgeft manifest: {error}", "Export the artifact again.") from error


def open_artifact(path: Path) -> Artifact:
    """An existing artifact with its manifest, if it has one.

    Raises:
        ModelError: when there is no such file or folder.
    """
    if not path.exists():
        raise ModelError(f"no model at {path}", "edgeft models list shows the models at hand.")
    return Artifact(path, read_manifest(path))


def update_ledger(path: Path, entries: Mapping[str, float], verification: Mapping[str, Any] | None = None) -> bool:
    """Add measured stages to an artifact's ledger, and what they were measured on and how sure they are.

    Returns:
        Whether there is a manifest to write them into.
    """
    manifest = read_manifest(path)
    if manifest is None:
        return False
    known = manifest.verification if verification is None else verification
    changed = dataclasses.replace(manifest, ledger={**manifest.ledger, **entries}, verification=known)
    write_manifest(path, changed)
    return True
