"""An ONNX directory: made under a hidden name, synced to the disk, then renamed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edgeft import __version__
from edgeft.artifact import Artifact, Manifest, digest_of, manifest_path, size_of, write_manifest
from edgeft.errors import WriteError, require
from edgeft.models.text import own_template
from edgeft.paths import parse_json, sha256_file, sync_directory
from edgeft.plugins import Plan, Source
from edgeft.progress import Progress

from .adapter import WEIGHTS
from .ggml import Ggml
from .gguf_convert import check_space
from .gguf_plan import stop_ids, tokenizer_folder
from .onnx_graph import Graph, build
from .onnx_lazy import EXTRA
from .onnx_packed import PackedReader
from .onnx_plan import TYPE_NAMES, Details
from .onnx_quantize import Rounded, quantize_graph
from .onnx_weights import WeightReader
from .safetensors_rows import Reader

MODEL, DATA = "model.onnx", "model.onnx.data"

_INLINE = 32
"""Bytes below which a tensor stays in the graph: shapes must be there when onnxruntime infers others."""

_TEXT_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


def convert(plan: Plan, ggml: Ggml, progress: Progress) -> Artifact:
    """Write the directory, then its manifest beside it.

    Raises:
        ModelError: a weight is not finite or a file of the model cannot be read.
        UnsupportedModel: the model builder does not know the architecture.
        MissingDependency: a package is not installed.
        WriteError: no space, or the folder cannot be written.
    """
    out, details = plan.options.out, plan.details
    assert isinstance(details, Details)
    check_space(out, plan.bytes)
    with atomic_directory(out) as folder:
        write_text_side(plan.source, details, folder)
        mix = _write_model(plan, details, ggml, folder, progress)
        shutil.rmtree(folder / ".cache", ignore_errors=True)
        manifest = _manifest(plan, mix, folder)
    try:
        write_manifest(out, manifest)
    except WriteError:
        shutil.rmtree(out)  # a command that failed leaves no result
        raise
    return Artifact(out, manifest)


@contextlib.contextmanager
def atomic_directory(out: Path) -> Iterator[Path]:
    """A hidden folder beside `out` that takes its place, and the place of an older one, when all went well.

    Raises:
        WriteError: the folder cannot be written or the disk is full.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".tmp", dir=out.parent))
    except OSError as error:
        raise WriteError.from_os_error(error, out) from error
    old = temporary.with_name(temporary.name + ".old")
    try:
        yield temporary
        _sync(temporary)
        temporary.chmod(0o755)
        # An older manifest must not stand beside the new folder, whenever the power fails.
        manifest_path(out).unlink(missing_ok=True)
        if out.exists():
            out.rename(old)
        temporary.rename(out)
        sync_directory(out.parent)
    except OSError as error:
        raise WriteError.from_os_error(error, out) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _sync(folder: Path) -> None:
    for file in folder.iterdir():
        handle = os.open(file, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    sync_directory(folder)


def write_text_side(source: Source, details: Details, folder: Path) -> None:
    """Configuration of the merged model, tokenizer and template as trained, and every id that ends an answer."""
    copy_text(tokenizer_folder(source), folder)
    if (template := template_of(source)) is not None:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    _write_json(folder / "config.json", dict(details.weights.config))
    generation = source.base / "generation_config.json"
    kept = parse_json(generation.read_text(encoding="utf-8")) if generation.is_file() else {}
    _write_json(folder / "generation_config.json", {**kept, "eos_token_id": list(stop_ids(source))})


def copy_text(tokenizer: Path, folder: Path) -> None:
    """The files of a tokenizer, the template among them."""
    for name in (*_TEXT_FILES, "chat_template.jinja", "config.json", "generation_config.json"):
        if (tokenizer / name).is_file():
            shutil.copyfile(tokenizer / name, folder / name)


def template_of(source: Source) -> str | None:
    """The template of training: the run's, the adapter's, the tokenizer's or the base's."""
    if source.chat_template is not None:
        return source.chat_template
    folders = dict.fromkeys(folder for folder in (source.adapter, tokenizer_folder(source), source.base) if folder)
    return next((template for folder in folders if (template := own_template(folder)) is not None), None)


def _write_model(plan: Plan, details: Details, ggml: Ggml, folder: Path, progress: Progress) -> dict[str, int]:
    """The graph and its weights. Returns: type name -> number of weights."""
    ir = require("onnx_ir", EXTRA)
    progress.start("Quantizing" if details.settings.bits < 32 else "Writing", plan.parameters, "weights")
    try:
        with Reader() as reader:
            weights, rounded = _reader(plan, details, ggml, reader)
            graph = build(folder, details.weights, weights)
            counts, bits = _counts(graph), {}
            if details.settings.bits < 32:
                bits = quantize_graph(graph, details.settings, progress.advance, rounded)
            ir.save(graph.model, folder / MODEL, external_data=DATA, size_threshold_bytes=_INLINE)
    finally:
        progress.finish()
    mix: dict[str, int] = {}
    for name, count in counts.items():
        kind = TYPE_NAMES[bits.get(name, 32)]
        mix[kind] = mix.get(kind, 0) + count
    return mix


def _reader(plan: Plan, details: Details, ggml: Ggml, reader: Reader) -> tuple[WeightReader, Rounded | None]:
    """What reads the weights, and what knows their blocks already."""
    if plan.source.packed is None:
        return WeightReader(details.weights, reader, ggml, plan.options.round), None
    packed = PackedReader(details.weights, reader, ggml, plan.source.packed)
    return packed, packed.blocks


def _counts(graph: Graph) -> dict[str, int]:
    sizes = {}
    for name in graph.weights:
        count = 1
        for length in graph.model.graph.initializers[name].shape.numpy():
            count *= int(length)
        sizes[name] = count
    return sizes


def _manifest(plan: Plan, mix: dict[str, int], folder: Path) -> Manifest:
    adapter = plan.source.adapter
    template = template_of(plan.source)
    notes = sorted({tensor.note for tensor in plan.tensors if tensor.note})
    rounding = plan.options.round
    rounded = () if rounding == "none" else (f"merged weights were rounded to {rounding} before quantization",)
    return Manifest(
        format="onnx",
        target=plan.target,
        types=mix,
        parameters=plan.parameters,
        bits_per_weight=plan.bits_per_weight,
        bytes=size_of(folder),
        sha256=digest_of(folder),
        base={"reference": plan.source.reference, "path": str(plan.source.base)},
        adapter=None if adapter is None else {"path": str(adapter), "digest": sha256_file(adapter / WEIGHTS)},
        chat_template_sha256=None if template is None else hashlib.sha256(template.encode()).hexdigest(),
        stop_token_ids=stop_ids(plan.source),
        notes=(*plan.warnings, *notes, *rounded, *_settings_note(plan)),
        edgeft_version=__version__,
    )


def _settings_note(plan: Plan) -> tuple[str, ...]:
    settings = plan.details.settings
    if settings.bits == 32:
        return ()
    return (
        f"{settings.method}, blocks of {settings.block}, {'symmetric' if settings.symmetric else 'with zero points'}, "
        f"accuracy level {settings.accuracy_level}",
    )


def _write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
