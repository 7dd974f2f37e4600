"""The base of a run: a Hugging Face directory, or a GGUF that is trained on as it is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from edgeft.models import ResolvedModel, resolve, weights_digest
from edgeft.paths import sha256_file
from edgeft.progress import Progress
from edgeft.train.config import TrainConfig


@dataclass(frozen=True)
class Gguf:
    """A base that stays as it is."""

    file: Path
    sha256: str
    layer_bytes: int
    """Of its tensors between embedding and head, which stay packed in memory."""


def find_base(config: TrainConfig, progress: Progress | None) -> tuple[ResolvedModel, Gguf | None]:
    """The base's Hugging Face directory, and for the method "gguf" the file beside it.

    Raises: UsageError, ModelError, UnsupportedModel, Unreachable.
    """
    if config.from_scratch:
        from edgeft.train.scratch import random_base

        return random_base(config, resolve(config.model, want="hf", progress=progress)), None
    if config.method != "gguf":
        return resolve(config.model, want="hf", progress=progress), None
    from edgeft.models.gguf_header import read_header
    from edgeft.models.gguf_import import text_side
    from edgeft.models.gguf_torch import check_supported

    found = resolve(config.model, want="gguf", progress=progress)
    header = read_header(found.path)
    check_supported(header)
    folder = text_side(found.path)
    base = ResolvedModel("hf", folder, found.reference, found.licence or header.licence)
    layers = sum(tensor.bytes for tensor in header.tensors if tensor.name.startswith("blk."))
    return base, Gguf(found.path, sha256_file(found.path), layers)


def base_record(config: TrainConfig, folder: Path, gguf: Gguf | None) -> dict[str, str]:
    """What the run's manifest says about its base."""
    known = {"reference": config.model, "path": str(folder)}
    if gguf is None:
        return {**known, "digest": weights_digest(folder)}
    return {**known, "gguf": str(gguf.file), "digest": gguf.sha256}
