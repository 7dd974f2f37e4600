"""A LoRA adapter as a GGUF file: which base it belongs to, and whether a given base is that one.

An adapter trained on a GGUF itself names that file's SHA-256. One trained on a Hugging Face directory can go onto any
GGUF made of it; those have different bytes but the same norms, which no quantization touches, so their digest tells
the bases apart.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from edgeft.artifact import manifest_path, read_manifest
from edgeft.errors import ModelError
from edgeft.models.gguf_header import GgufHeader, read_header
from edgeft.paths import sha256_file

BASE_SHA256 = "edgeft.base.sha256"
"""SHA-256 of the GGUF the adapter was trained on."""
BASE_NORMS = "edgeft.base.norms"
"""`norms_digest` of the base."""

_EMBEDDING, _HEAD = "token_embd.weight", "output.weight"


def is_adapter(header: GgufHeader) -> bool:
    return header.metadata.get("general.type") == "adapter"


def norms_digest(norms: Iterable[tuple[str, bytes]]) -> str:
    """Hex SHA-256 over GGUF names and float32 values (little endian) of all norms, in name order."""
    digest = hashlib.sha256()
    for name, values in sorted(norms):
        digest.update(name.encode() + b"\0")
        digest.update(values)
    return digest.hexdigest()


def is_norm(name: str) -> bool:
    """Whether a GGUF tensor is a norm's weight."""
    return name.endswith("_norm.weight")


def file_norms_digest(header: GgufHeader) -> str | None:
    """The same of a GGUF; None when a norm is not stored as float32, which llama.cpp's files always do."""
    norms = [tensor for tensor in header.tensors if is_norm(tensor.name)]
    if not norms or any(tensor.type != "F32" for tensor in norms):
        return None
    found = []
    with header.path.open("rb") as stream:
        for tensor in norms:
            stream.seek(header.data_offset + tensor.offset)
            found.append((tensor.name, stream.read(tensor.bytes)))
    return norms_digest(found)


def file_sha256(file: Path) -> str:
    """SHA-256 of a GGUF: from its manifest when that is newer than the file and knows its size, else computed."""
    manifest = read_manifest(file)
    stat = file.stat()
    if manifest and manifest.bytes == stat.st_size and manifest_path(file).stat().st_mtime_ns >= stat.st_mtime_ns:
        return manifest.sha256
    return sha256_file(file)


def check_base(adapter: Path, base: Path) -> None:
    """Whether an adapter file may go onto a base file; one without edgeft's keys is left to the runtime.

    Raises:
        ModelError: it is no adapter, it was made for another base, or llama.cpp could not apply it to this one.
    """
    header = read_header(adapter)
    if not is_adapter(header):
        raise ModelError(
            f"{adapter} is a model, not an adapter", "Give it as the model, or an adapter from --to gguf-lora."
        )
    base_header = read_header(base)
    _check_tied(header, base_header)
    _check_digests(header, base_header)


def _check_tied(adapter: GgufHeader, base: GgufHeader) -> None:
    """llama.cpp applies an embedding's adapter to a head that shares its weights too, and ends the process doing it."""
    names = {tensor.name for tensor in base.tensors}
    changed = {tensor.name for tensor in adapter.tensors}
    if f"{_EMBEDDING}.lora_a" in changed and _HEAD not in names:
        raise ModelError(
            f"{adapter.path} changes the token embedding, which is also the head of {base.path.name}",
            "llama.cpp cannot apply it; merge instead: edgeft export RUN --to gguf-q4.",
        )


def _check_digests(adapter: GgufHeader, base: GgufHeader) -> None:
    sha256, norms = adapter.metadata.get(BASE_SHA256), adapter.metadata.get(BASE_NORMS)
    if sha256 is not None:
        found = file_sha256(base.path)
        if found != sha256:
            why = f"it was trained on the file with SHA-256 {sha256[:12]}…, this one has {found[:12]}…"
            raise _other_base(adapter, base, why)
        return
    if norms is None:
        return
    if (found_norms := file_norms_digest(base)) is not None and found_norms != norms:
        raise _other_base(adapter, base, "the norms of the two bases differ")
    manifest = read_manifest(base.path)
    if manifest is not None and manifest.adapter is not None:
        raise _other_base(adapter, base, "that file already has an adapter merged into it")


def _other_base(adapter: GgufHeader, base: GgufHeader, why: str) -> ModelError:
    named = adapter.metadata.get("general.base_model.0.name")
    return ModelError(
        f"the adapter {adapter.path} does not belong to {base.path}: {why}",
        f"Give the base it was trained on{f': {named}' if named else ''}.",
    )
