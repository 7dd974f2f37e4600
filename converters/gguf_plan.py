"""What a GGUF export will write, made from headers and the tokenizer alone: every tensor, its type and its place."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeft.errors import ModelError
from edgeft.plugins import ConvertOptions, Plan, Source, TensorPlan

from . import gguf_architectures as architectures
from . import gguf_types, safetensors_rows
from .adapter import EMBEDDING, HEAD, Adapter, check_fit, read_adapter
from .ggml import Ggml, GgmlType
from .gguf_metadata import metadata, rope_parameters, stop_token_ids
from .gguf_vocab import read_files
from .gguf_writer import KeyValue, TensorInfo, data_size, head, uint32
from .merge import MergedTensor, read_whole
from .safetensors_rows import Reader, StoredTensor
from .tying import is_nf4, separate_head

if TYPE_CHECKING:
    from numpy.typing import NDArray

QUANTIZATION_VERSION = 2
"""`general.quantization_version`: ggml's GGML_QNT_VERSION."""


@dataclass(frozen=True)
class Item:
    """One tensor of the file."""

    name: str
    shape: tuple[int, ...]
    type: GgmlType
    note: str
    source: MergedTensor | NDArray[np.float32]
    """Weights to merge, or values that are computed (rotary factors)."""
    row_group: int = 1
    """Rows that must be read together."""

    @property
    def columns(self) -> int:
        return self.shape[-1]

    @property
    def rows(self) -> int:
        return self.weights // self.columns

    @property
    def weights(self) -> int:
        return gguf_types.Shape(self.name, self.shape).weights

    @property
    def info(self) -> TensorInfo:
        return TensorInfo(self.name, self.shape, self.type.id, self.rows * self.type.row_bytes(self.columns))


@dataclass(frozen=True)
class Details:
    """What the conversion needs beyond the plan that is shown."""

    items: tuple[Item, ...]
    head: bytes
    stop_token_ids: tuple[int, ...]
    chat_template_sha256: str | None


def available_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def make_plan(source: Source, target: str, mixture: str, options: ConvertOptions, ggml: Ggml) -> Plan:
    """Raises: ModelError, UnsupportedModel."""
    config = read_config(source.base)
    family = architectures.family_of(config)
    architectures.check_config(config)
    sizes = architectures.sizes_of(config)
    base = safetensors_rows.index(source.base)
    adapter = read_adapter(source.adapter) if source.adapter else None
    warnings: list[str] = []
    tensors = _tensors(base, adapter, config, family, sizes, warnings, source.nf4)
    if source.nf4:
        warnings.append("merged into the base as QLoRA trained on it, rounded to NF4 (docs/export.md)")
    items, name = _items(tensors, mixture, family, sizes, config, ggml)
    if adapter is not None:
        warnings += _no_effect(adapter, ggml)
    pairs = _metadata(source, options, config, items, gguf_types.FILE_TYPES[name], warnings)
    return _plan(source, target, options, items, pairs, warnings, name, sizes.layers)


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a Hugging Face directory. Raises: ModelError."""
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{folder} is not a Hugging Face directory: it has no config.json") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise ModelError(f"{file} is not a model configuration")
    return config


def _tensors(
    base: dict[str, StoredTensor],
    adapter: Adapter | None,
    config: Mapping[str, Any],
    family: architectures.Family,
    sizes: architectures.Sizes,
    warnings: list[str],
    nf4: bool,
) -> dict[str, MergedTensor]:
    """GGUF name -> its weights."""
    tied = bool(config.get("tie_word_embeddings", HEAD not in base))
    if tied and HEAD in base:
        warnings.append(f"{HEAD} is left out: config.json ties it to the embedding, so the model does not use it")
        del base[HEAD]
    names = architectures.gguf_names(family, sizes, base, tied=tied)
    changes = dict(adapter.changes) if adapter else {}
    if tied and separate_head(base, adapter, changes, warnings):
        names[HEAD] = "output.weight"
    if adapter:
        check_fit(adapter, changes, base)
    merged = {}
    for name, gguf in names.items():
        change = changes.get(name)
        order = None
        if architectures.permutes_rows(family, name):
            order = architectures.rotary_order(base[name].shape[0], sizes.head)
        merged[gguf] = MergedTensor(base[name], change, order, nf4=nf4 and is_nf4(name, base[name]))
    embedding = merged["token_embd.weight"].shape
    output = merged.get("output.weight")
    if adapter and output is not None and output.shape != embedding:
        raise ModelError(
            f"the adapter {adapter.path} does not fit {base[EMBEDDING].file.parent}: with it the embedding has shape "
            f"{embedding}, the head {output.shape}"
        )
    return merged


def _items(
    tensors: Mapping[str, MergedTensor],
    mixture: str,
    family: architectures.Family,
    sizes: architectures.Sizes,
    config: Mapping[str, Any],
    ggml: Ggml,
) -> tuple[list[Item], str]:
    """The file's tensors in its order, and the mixture that was really used."""
    sources: dict[str, MergedTensor | NDArray[np.float32]] = dict(tensors)
    if (
        family.name == "llama"
        and (factors := architectures.rope_factors(rope_parameters(config), sizes.head)) is not None
    ):
        sources["rope_freqs.weight"] = factors
    names = sorted(sources, key=gguf_types.order)
    shapes = [gguf_types.Shape(name, sources[name].shape) for name in names]
    name = gguf_types.best_mixture(shapes) if mixture == "best" else mixture
    wide = sizes.layers == 80 and (family.name == "qwen2" or (family.name == "llama" and sizes.heads != sizes.kv_heads))
    choices = gguf_types.assign(name, shapes, sizes.layers, wide_values=wide)
    items = [
        Item(shape.name, shape.shape, choice.type, choice.note, sources[shape.name], _group(sources[shape.name], sizes))
        for shape, choice in zip(shapes, choices, strict=True)
    ]
    return items, name


def _group(source: MergedTensor | NDArray[np.float32], sizes: architectures.Sizes) -> int:
    return sizes.head if isinstance(source, MergedTensor) and source.order is not None else 1


def _no_effect(adapter: Adapter, ggml: Ggml) -> list[str]:
    """A warning when every B matrix is zero and nothing else changes: the file would be the base."""
    with Reader() as reader:
        for change in adapter.changes.values():
            if change.replacement or change.token_rows or change.magnitude or change.offset:
                return []
            if change.up is not None and read_whole(reader, ggml, change.up).any():
                return []
    return [f"the adapter {adapter.path} changes nothing: all its B matrices are zero, the file will equal the base"]


def _metadata(
    source: Source,
    options: ConvertOptions,
    config: Mapping[str, Any],
    items: Sequence[Item],
    file_type: int,
    warnings: list[str],
) -> list[KeyValue]:
    embedding = next(item for item in items if item.name == "token_embd.weight")
    tokenizer = tokenizer_folder(source)
    if tokenizer != source.base:
        # generation_config.json stays with the base.
        config = {**config, "eos_token_id": list(stop_ids(source))}
    pairs = metadata(
        source.base,
        config,
        tokenizer_dir=tokenizer,
        rows=embedding.rows,
        parameters=sum(item.weights for item in items),
        chat_template=source.chat_template or _adapters_template(source.adapter),
        tokenizer_pre=options.extra.get("tokenizer_pre"),
        warn=warnings.append,
    )
    return [
        *pairs,
        uint32("general.quantization_version", QUANTIZATION_VERSION),
        uint32("general.file_type", file_type),
    ]


def tokenizer_folder(source: Source) -> Path:
    """The adapter's folder when its tokenizer has tokens the base's lacks, else the base."""
    if source.adapter is None or not (source.adapter / "tokenizer.json").is_file():
        return source.base
    trained, known = read_files(source.adapter).added_ids, read_files(source.base).added_ids
    return source.base if trained.items() <= known.items() else source.adapter


def stop_ids(source: Source) -> tuple[int, ...]:
    """Every id that ends an answer, of the tokenizer in use and of the base."""
    folders = dict.fromkeys((tokenizer_folder(source), source.base))
    return tuple(dict.fromkeys(id_ for folder in folders for id_ in stop_token_ids(folder)))


def _adapters_template(adapter: Path | None) -> str | None:
    file = adapter / "chat_template.jinja" if adapter else None
    return file.read_text(encoding="utf-8") if file and file.is_file() else None


def _plan(
    source: Source,
    target: str,
    options: ConvertOptions,
    items: Sequence[Item],
    pairs: Sequence[KeyValue],
    warnings: list[str],
    mixture: str,
    layers: int,
) -> Plan:
    infos = [item.info for item in items]
    prefix = head(pairs, infos)
    weights = sum(item.weights for item in items if isinstance(item.source, MergedTensor))
    bits = 8 * sum(info.bytes for info in infos) / weights
    warnings += _label_notes(target, mixture, items, bits, layers)
    template = next((pair.value for pair in pairs if pair.key == "tokenizer.chat_template"), None)
    details = Details(
        tuple(items),
        prefix,
        stop_ids(source),
        None if template is None else hashlib.sha256(template.encode()).hexdigest(),
    )
    return Plan(
        target=target,
        source=source,
        options=options,
        tensors=tuple(
            TensorPlan(item.name, item.shape, item.type.name, info.bytes, item.note)
            for item, info in zip(items, infos, strict=True)
        ),
        bytes=len(prefix) + data_size(infos),
        parameters=weights,
        bits_per_weight=bits,
        warnings=tuple(warnings),
        seconds=gguf_types.estimated_seconds(
            [(item.type, item.weights) for item in items], options.threads or available_cores()
        ),
        details=details,
    )


def _label_notes(target: str, mixture: str, items: Sequence[Item], bits: float, layers: int) -> list[str]:
    label = "Q4_K_M" if target == "gguf-q4" else mixture
    shapes = [gguf_types.Shape(item.name, item.shape) for item in items]
    choices = gguf_types.assign(label, shapes, layers)
    label_bytes = sum(
        item.rows * choice.type.row_bytes(item.columns) for item, choice in zip(items, choices, strict=True)
    )
    label_bits = 8 * label_bytes / sum(item.weights for item in items)
    fallbacks = sum(bool(item.note) for item in items)
    return gguf_types.honest_label(label, mixture, bits, label_bits, fallbacks, len(items))
