"""A GGUF as a Hugging Face directory, so that it can be trained: dequantized once and kept in the store."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from edgeft import __version__
from edgeft.errors import ModelError, UnsupportedModel, require
from edgeft.models.gguf_header import GgufHeader, read_header
from edgeft.models.gguf_stops import stop_token_ids
from edgeft.models.quiet import quiet_libraries
from edgeft.models.store import SIDECAR, atomic_directory, imports_dir, locked, read_sidecar, sweep
from edgeft.models.tokenizer_rules import apply_rule
from edgeft.paths import sha256_file, write_json, write_text
from edgeft.progress import Progress, Silent

RECIPE = 2
"""Part of an import's folder name: raised when imports come out differently, so that old ones are not taken for new."""

_MACHINE_KEYS = ("_name_or_path", "_model_name_or_path", "name_or_path", "local_files_only", "is_local", "gguf_file")
"""What transformers leaves in its JSON files about the machine it ran on."""


def imported(file: Path, progress: Progress | None = None) -> Path:
    """The Hugging Face directory of a GGUF, made on first use and kept in the store.

    Raises:
        ModelError: the GGUF is damaged, or of an architecture or tokenizer that cannot be imported.
        MissingDependency: torch or transformers is not installed.
    """
    read_header(file)
    digest = sha256_file(file)
    folder = imports_dir() / f"{_slug(file.stem)}-{digest[:12]}-r{RECIPE}"
    with locked(folder.name):
        if not (folder / "config.json").is_file():
            sweep(imports_dir(), f".{folder.name}.*.tmp")
            import_gguf(file, folder, progress=progress, sha256=digest)
    return folder


def text_side(file: Path) -> Path:
    """The same directory without weights: configuration, tokenizer and template of a GGUF that is used as it is.

    Raises: as `imported`.
    """
    header = read_header(file)
    _check_metadata(header)
    digest = sha256_file(file)
    folder = imports_dir() / f"{_slug(file.stem)}-{digest[:12]}-r{RECIPE}-text"
    with locked(folder.name):
        if not (folder / "config.json").is_file():
            sweep(imports_dir(), f".{folder.name}.*.tmp")
            with atomic_directory(folder) as made, quiet_libraries():
                _save_tokenizer(header, made)
                _save_config(header, made)
                _finish(header, made)
                write_json(made / SIDECAR, _origin(header, digest))
    return folder


def _save_config(header: GgufHeader, folder: Path) -> None:
    transformers = require("transformers", "train")
    file = header.path
    try:
        config = transformers.AutoConfig.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)
        if width := header.number(f"{header.architecture}.attention.key_length"):
            config.head_dim = width  # transformers leaves it out
        model = _empty_model(header, config)
    except ModelError:
        raise
    except Exception as error:  # transformers raises anything on metadata made wrong
        raise _unsupported(header, error) from error
    model.config.architectures = [type(model).__name__]
    model.config.tie_word_embeddings = all(tensor.name != "output.weight" for tensor in header.tensors)
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)


def _empty_model(header: GgufHeader, config: Any) -> Any:
    """The model that the metadata describe, without weights.

    Raises:
        ModelError: it would be far larger than the tensors of the file.
    """
    torch = require("torch", "train")
    transformers = require("transformers", "train")
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    described = sum(parameter.numel() for parameter in model.parameters())
    # A head that is tied in the file is counted twice here.
    if described > 2 * header.parameters + 1_000_000:
        raise _damaged(header, f"its metadata describe {described:,} weights, it has {header.parameters:,}")
    return model


_LONGEST_TOKEN = 2048
"""Characters; the longest of published vocabularies have 256. transformers looks at every pair of parts of a token."""


def _check_metadata(header: GgufHeader) -> None:
    """Raises: ModelError for metadata that would take transformers hours or all memory to read."""
    layers = header.number(f"{header.architecture}.block_count") or 0
    if not 0 <= layers <= len(header.tensors):
        raise _damaged(header, f"it says it has {layers} layers, but it has {len(header.tensors)} tensors")
    for name in ("tokens", "merges"):
        texts = header.metadata.get(f"tokenizer.ggml.{name}", [])
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise _damaged(header, f"tokenizer.ggml.{name} is not a list of texts")
        if any(len(text) > _LONGEST_TOKEN for text in texts):
            raise _damaged(header, f"tokenizer.ggml.{name} has a text of more than {_LONGEST_TOKEN} characters")


def _damaged(header: GgufHeader, what: str) -> ModelError:
    return ModelError(f"{header.path} is damaged: {what}", "Fetch or export it again.")


def _slug(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "model"


def import_gguf(file: Path, out: Path, *, progress: Progress | None = None, sha256: str | None = None) -> Path:
    """Dequantize a GGUF into a Hugging Face directory in bfloat16.

    Raises:
        ModelError: the GGUF is damaged, or of an architecture or tokenizer that cannot be imported.
        MissingDependency: torch or transformers is not installed.
        WriteError: `out` cannot be written, or exists already.
    """
    header = read_header(file)
    _check_metadata(header)
    progress = progress or Silent()
    progress.start(f"Importing {file.name}", 3, "steps")
    try:
        with atomic_directory(out) as folder, quiet_libraries():
            _save_tokenizer(header, folder)
            progress.advance(1, "weights")
            _save_weights(header, folder)
            progress.advance(1, "digest")
            _finish(header, folder)
            write_json(folder / SIDECAR, _origin(header, sha256 or sha256_file(file)))
            progress.advance(1)
    finally:
        progress.finish()
    return out


def _save_weights(header: GgufHeader, folder: Path) -> None:
    torch = require("torch", "train")
    transformers = require("transformers", "train")
    file = header.path
    plan = transformers.GgufConfig(gguf_file=file.name, dequantize=True)
    try:
        _empty_model(
            header,
            transformers.AutoConfig.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True),
        )
        model = transformers.AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.bfloat16, quantization_config=plan, local_files_only=True
        )
    except ModelError:
        raise
    except Exception as error:  # transformers raises anything on metadata made wrong
        raise _unsupported(header, error) from error
    # It is dequantized now, but still says it is quantized, and saving would ask the quantizer.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    for weights in folder.glob("*.safetensors"):
        # safetensors writes them private.
        weights.chmod((folder / "config.json").stat().st_mode)


def _save_tokenizer(header: GgufHeader, folder: Path) -> None:
    transformers = require("transformers", "train")
    file = header.path
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)
    except Exception as error:  # as above
        raise _unsupported(header, error) from error
    tokenizer.save_pretrained(folder)
    document = folder / "tokenizer.json"
    content = json.loads(document.read_text(encoding="utf-8"))
    corrected = apply_rule(content, str(header.metadata.get("tokenizer.ggml.model")), header.tokenizer_pre)
    write_text(document, json.dumps(corrected, ensure_ascii=False))
    if header.chat_template is not None:
        write_text(folder / "chat_template.jinja", header.chat_template)


def _unsupported(header: GgufHeader, error: Exception) -> UnsupportedModel:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return UnsupportedModel(
        f"{header.path} ({header.architecture}) cannot be imported: {reason}",
        "Give the original Hugging Face directory instead.",
    )


def _finish(header: GgufHeader, folder: Path) -> None:
    """Take out what belongs to this machine, put in what transformers did not carry over."""
    for file in folder.glob("*.json"):
        if file.name != "tokenizer.json":
            content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            content = {key: value for key, value in content.items() if key not in _MACHINE_KEYS}
            write_json(file, {**content, **_corrections(header, file.name)})


def _corrections(header: GgufHeader, name: str) -> dict[str, Any]:
    if name == "tokenizer_config.json" and header.context_length:
        return {"model_max_length": header.context_length}
    stops = stop_token_ids(header)
    if name == "generation_config.json" and stops:
        return {"eos_token_id": stops if len(stops) > 1 else stops[0]}
    return {}


def _origin(header: GgufHeader, sha256: str) -> dict[str, Any]:
    beside = read_sidecar(header.path.parent)
    known = beside if beside.get("sha256") == sha256 else {}
    return {
        "imported_from": header.path.name,
        "sha256": sha256,
        "source": known.get("source"),
        "licence": known.get("licence") or header.licence,
        "tokenizer_pre": header.tokenizer_pre,
        "type_mix": header.type_mix,
        "bits_per_weight": round(header.bits_per_weight, 3),
        "edgeft_version": __version__,
    }
