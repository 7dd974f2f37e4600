"""What a model really is, read from its files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgeft.artifact import read_manifest, size_of
from edgeft.models.gguf_header import read_header
from edgeft.models.references import ResolvedModel, resolve
from edgeft.models.text import read_object, read_template


def describe(reference: str) -> dict[str, Any]:
    """Facts about a model that is on this machine.

    Raises:
        Unreachable: it was not pulled yet.
        UsageError, ModelError: as `resolve`.
    """
    found = resolve(reference, here_only=True)
    facts: dict[str, Any] = {"kind": found.kind, "path": str(found.path), "licence": found.licence}
    return {**facts, **_DESCRIBERS[found.kind](found)}


def _gguf(found: ResolvedModel) -> dict[str, Any]:
    header = read_header(found.path)
    return {
        "licence": found.licence or header.licence,
        "architecture": header.architecture,
        "name": header.name,
        "parameters": header.parameters,
        "bytes": found.path.stat().st_size,
        "types": header.type_mix,
        "bits_per_weight": round(header.bits_per_weight, 3),
        "context": header.context_length,
        "tokenizer_pre": header.tokenizer_pre,
        "chat_template": header.chat_template,
        **_ledger(found.path),
    }


def _ledger(path: Path) -> dict[str, Any]:
    """The losses that `edgeft verify` measured, when it did."""
    manifest = read_manifest(path)
    return {"ledger": dict(manifest.ledger)} if manifest and manifest.ledger else {}


def _directory(found: ResolvedModel) -> dict[str, Any]:
    config = read_object(found.path / "config.json")
    template = found.path / "chat_template.jinja"
    return {
        "architecture": _first(config.get("architectures")),
        "context": config.get("max_position_embeddings"),
        "vocabulary": config.get("vocab_size"),
        "bytes": sum(file.stat().st_size for file in found.path.glob("*.safetensors")),
        "chat_template": read_template(template) if template.is_file() else None,
    }


def _first(names: Any) -> str:
    return str(names[0]) if isinstance(names, list) and names else "unknown"


def _onnx(found: ResolvedModel) -> dict[str, Any]:
    manifest = read_manifest(found.path)
    return {
        **_directory(found),
        "bytes": size_of(found.path),
        "parameters": manifest.parameters if manifest else None,
        "types": manifest.types if manifest else None,
        "bits_per_weight": round(manifest.bits_per_weight, 3) if manifest else None,
        **_ledger(found.path),
    }


def _adapter(found: ResolvedModel) -> dict[str, Any]:
    config = read_object(found.path / "adapter_config.json")
    return {"base": config.get("base_model_name_or_path"), "rank": config.get("r"), "alpha": config.get("lora_alpha")}


def _run(found: ResolvedModel) -> dict[str, Any]:
    from edgeft.run import Run

    manifest = Run(found.path).manifest()
    return {
        "method": manifest.method,
        "base": manifest.base.get("reference"),
        "data": manifest.data.get("reference"),
        "seed": manifest.seed,
        "licence": manifest.licence,
        **manifest.evaluation,
    }


_DESCRIBERS = {"gguf": _gguf, "onnx": _onnx, "hf": _directory, "adapter": _adapter, "run": _run}
