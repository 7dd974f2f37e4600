"""What an exported model says about itself, whichever format it has."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from edgeft.artifact import Manifest, read_manifest
from edgeft.chat import ChatTemplate
from edgeft.errors import ModelError
from edgeft.models.gguf_header import GgufHeader, read_header
from edgeft.models.gguf_stops import stop_token_ids
from edgeft.models.litertlm import is_litertlm, read_litertlm
from edgeft.models.text import load_text_side


@dataclass(frozen=True)
class FileFacts:
    template: ChatTemplate | None
    """Its own chat template, with the texts of its BOS and EOS."""
    ends: tuple[str, ...]
    """Text of every token that ends an answer."""
    bits_per_weight: float
    precision: float
    """Bits that make the weights exact, for the limits: a float32 scale says no more than a 16-bit one."""


_PRECISION = {"int4": 4.5, "int8": 8.5, "fp16": 16.0, "fp32": 32.0}
"""ONNX, LiteRT or ExecuTorch type -> bits of the GGUF type with the same codes (Q4_0, Q8_0)."""


def read_facts(artifact: Path) -> FileFacts:
    """Facts of a GGUF, from its header, or of another model, from its tokenizer's files and its manifest.

    Raises:
        ModelError: a file is missing or cannot be read.
    """
    if artifact.is_dir():
        return _of_text_side(artifact, artifact)
    if is_litertlm(artifact):
        with tempfile.TemporaryDirectory(prefix="edgeft-") as name:
            read_litertlm(artifact).write_text_side(Path(name))
            return _of_text_side(artifact, Path(name))
    return _of_gguf(read_header(artifact))


def _of_text_side(artifact: Path, folder: Path) -> FileFacts:
    manifest = read_manifest(artifact)
    if manifest is None:
        raise ModelError(
            f"{artifact} has no manifest beside it, which says how many bits its weights have",
            f"Copy {artifact.name}.json too, or export the model again.",
        )
    side = load_text_side(folder)
    return FileFacts(side.template, side.eos_tokens, manifest.bits_per_weight, _precision(manifest))


def _precision(manifest: Manifest) -> float:
    weights = sum(manifest.types.values())
    return sum(_PRECISION.get(kind, 0.0) * count for kind, count in manifest.types.items()) / weights


def _of_gguf(header: GgufHeader) -> FileFacts:
    tokens = header.metadata.get("tokenizer.ggml.tokens", [])

    def text(kind: str) -> str:
        token = header.number(f"tokenizer.ggml.{kind}_token_id")
        return "" if token is None else token_text(token)

    def token_text(token: int) -> str:
        if not isinstance(tokens, list) or not 0 <= token < len(tokens):
            raise ModelError(f"{header.path} is damaged: it names token {token}, which its vocabulary does not have")
        return str(tokens[token])

    template = ChatTemplate(header.chat_template, text("bos"), text("eos")) if header.chat_template else None
    ends = tuple(map(token_text, stop_token_ids(header)))
    return FileFacts(template, ends, header.bits_per_weight, header.bits_per_weight)
