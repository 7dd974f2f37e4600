"""A GGUF as a Hugging Face directory, so that it can be trained: dequantized once and kept in the store."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from edgeft import __version__
from edgeft.errors import require
from edgeft.models.store import SIDECAR, atomic_directory, imports_dir, locked, read_sidecar
from edgeft.paths import sha256_file, write_json
from edgeft.progress import Progress, Silent

_MACHINE_KEYS = ("_name_or_path", "_model_name_or_path", "name_or_path", "local_files_only", "gguf_file")
"""What transformers leaves in its JSON files about the machine it ran on."""


def imported(file: Path, progress: Progress | None = None) -> Path:
    """The Hugging Face directory of a GGUF, made on first use and kept in the store.

    Raises:
        ModelError: the GGUF is damaged or of an architecture transformers cannot read.
        MissingDependency: torch or transformers is not installed.
    """
    digest = sha256_file(file)
    folder = imports_dir() / f"{_slug(file.stem)}-{digest[:12]}"
    with locked(folder.name):
        if not (folder / "config.json").is_file():
            import_gguf(file, folder, progress=progress, sha256=digest)
    return folder


def _slug(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "model"


def import_gguf(file: Path, out: Path, *, progress: Progress | None = None, sha256: str | None = None) -> Path:
    """Dequantize a GGUF into a Hugging Face directory in bfloat16.

    Raises:
        ModelError: the GGUF is damaged or of an architecture transformers cannot read.
        MissingDependency: torch or transformers is not installed.
        WriteError: `out` cannot be written, or exists already.
    """
    progress = progress or Silent()
    progress.start(f"Importing {file.name}", 3, "steps")
    try:
        with atomic_directory(out) as folder:
            _save_weights(file, folder)
            progress.advance(1, "weights")
            _save_tokenizer(file, folder)
            progress.advance(1, "tokenizer")
            _clean(folder)
            write_json(folder / SIDECAR, _origin(file, sha256 or sha256_file(file)))
            progress.advance(1)
    finally:
        progress.finish()
    return out


def _save_weights(file: Path, folder: Path) -> None:
    torch = require("torch", "train")
    transformers = require("transformers", "train")
    plan = transformers.GgufConfig(gguf_file=file.name, dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.bfloat16, quantization_config=plan, local_files_only=True
    )
    # It is dequantized now, but still says it is quantized, and saving would ask the quantizer.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    for weights in folder.glob("*.safetensors"):
        # safetensors writes them private.
        weights.chmod((folder / "config.json").stat().st_mode)


def _save_tokenizer(file: Path, folder: Path) -> None:
    transformers = require("transformers", "train")
    tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)
    tokenizer.save_pretrained(folder)


def _clean(folder: Path) -> None:
    for file in folder.glob("*.json"):
        if file.name == "tokenizer.json":
            continue
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        write_json(file, {key: value for key, value in content.items() if key not in _MACHINE_KEYS})


def _origin(file: Path, sha256: str) -> dict[str, Any]:
    beside = read_sidecar(file.parent)
    same = beside.get("sha256") == sha256
    return {
        "imported_from": file.name,
        "sha256": sha256,
        "source": beside.get("source") if same else None,
        "licence": beside.get("licence") if same else None,
        "edgeft_version": __version__,
    }
