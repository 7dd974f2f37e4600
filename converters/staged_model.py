"""The merged model as a Hugging Face directory, for exporters that read nothing else; and what they made of it."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from edgeft import __version__
from edgeft.artifact import Manifest, digest_of, size_of
from edgeft.errors import UsageError
from edgeft.paths import parse_json, sha256_file
from edgeft.plugins import Plan, Source
from edgeft.progress import Progress

from .adapter import WEIGHTS
from .ggml import load
from .gguf_plan import stop_ids, tokenizer_folder
from .onnx_weights import WeightReader, Weights
from .onnx_write import copy_text, template_of
from .safetensors_rows import Reader

Rounding = Literal["none", "bf16", "f16"]


def check_source(source: Source, target: str) -> None:
    """Raises: UsageError for weights that are stored as they were trained."""
    if source.packed is not None or source.gguf is not None:
        raise UsageError(f"this run was trained for a GGUF file, not for {target}", "Leave out --to.")


def stage(
    source: Source,
    weights: Weights,
    folder: Path,
    rounding: Rounding,
    progress: Progress,
    *,
    text_only: bool = False,
) -> None:
    """Tokenizer, template and configuration, and unless `text_only` the weights: links where nothing is merged.

    Raises:
        ModelError: a weight is missing or not finite.
        OSError
    """
    folder.mkdir(exist_ok=True)
    write_text_side(source, weights, folder)
    if text_only:
        return
    if source.adapter is None and not source.nf4 and rounding == "none":
        for file in source.base.iterdir():
            if file.name.endswith((".safetensors", ".safetensors.index.json")):
                (folder / file.name).symlink_to(file.absolute())
        return
    _write_weights(weights, folder / "model.safetensors", rounding, progress)


def write_text_side(source: Source, weights: Weights, folder: Path) -> None:
    """Configuration of the merged model, tokenizer and template as trained, and every id that ends an answer."""
    copy_text(tokenizer_folder(source), folder)
    if (template := template_of(source)) is not None:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    _write_json(folder / "config.json", dict(weights.config))
    generation = source.base / "generation_config.json"
    kept = parse_json(generation.read_text(encoding="utf-8")) if generation.is_file() else {}
    _write_json(folder / "generation_config.json", {**kept, "eos_token_id": list(stop_ids(source))})


def _write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_weights(weights: Weights, file: Path, rounding: Rounding, progress: Progress) -> None:
    """Merged tensors in float32 (the safetensors format: length of the header, header, data), one at a time."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in weights.tensors.items():
        begin, end = end, end + 4 * _count(tensor.shape)
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    progress.start("Merging", weights.parameters, "weights")
    try:
        with Reader() as reader, file.open("wb") as stream:
            stream.write(struct.pack("<Q", len(text)) + text)
            read = WeightReader(weights, reader, load(), rounding)
            for name, tensor in weights.tensors.items():
                stream.write(read.read(name).astype("<f4", copy=False).tobytes())
                progress.advance(_count(tensor.shape), name)
    finally:
        progress.finish()


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for length in shape:
        count *= length
    return count


def describe(plan: Plan, format_: str, made: Path, result: Mapping[str, Any]) -> Manifest:
    """The manifest of what a toolchain made; `result` has its "types" and the "bytes" of its weights."""
    adapter, template = plan.source.adapter, template_of(plan.source)
    rounding = plan.options.round
    rounded = () if rounding == "none" else (f"merged weights were rounded to {rounding} before quantization",)
    return Manifest(
        format=format_,
        target=plan.target,
        types={str(kind): int(count) for kind, count in result["types"].items()},
        parameters=plan.parameters,
        bits_per_weight=8 * int(result["bytes"]) / plan.parameters,
        bytes=size_of(made),
        sha256=digest_of(made),
        base={"reference": plan.source.reference, "path": str(plan.source.base)},
        adapter=None if adapter is None else {"path": str(adapter), "digest": sha256_file(adapter / WEIGHTS)},
        chat_template_sha256=None if template is None else hashlib.sha256(template.encode()).hexdigest(),
        stop_token_ids=stop_ids(plan.source),
        notes=(*plan.warnings, *rounded),
        edgeft_version=__version__,
    )
