"""What a GGUF export will write, made from headers and the tokenizer alone: every tensor, its type and its place."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeft.errors import ModelError, UnsupportedModel
from edgeft.models.text import read_template
from edgeft.paths import parse_json
from edgeft.plugins import ConvertOptions, Plan, Source, TensorPlan

from . import gguf_architectures as architectures
from . import gguf_types, safetensors_rows
from .adapter import EMBEDDING, HEAD, Adapter, Change, check_fit, read_adapter
from .expert_adapters import take_expert_changes
from .families.family import TOP, Family
from .ggml import Ggml
from .gguf_items import Item, available_cores
from .gguf_metadata import metadata, stop_token_ids
from .gguf_mixtures import MIXTURES, Model
from .gguf_size import fit_to_size
from .gguf_vocab import read_files
from .gguf_writer import KeyValue, data_size, head, uint32
from .importance import importance_of, read_importance
from .merge import MergedTensor, Stack, read_whole
from .packed_rows import with_packed
from .safetensors_rows import Reader, StoredTensor
from .tying import is_nf4, separate_head

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

QUANTIZATION_VERSION = 2
"""`general.quantization_version`: ggml's GGML_QNT_VERSION."""


@dataclass(frozen=True)
class Details:
    """What the conversion needs beyond the plan that is shown."""

    items: tuple[Item, ...]
    head: bytes
    stop_token_ids: tuple[int, ...]
    chat_template_sha256: str | None


def make_plan(source: Source, target: str, mixture: str, options: ConvertOptions, ggml: Ggml) -> Plan:
    """Raises: ModelError, UnsupportedModel."""
    config = read_config(source.base)
    family = architectures.family_of(config)
    config = architectures.settings(config, family)
    architectures.check_config(config, family)
    sizes = architectures.sizes_of(config)
    adapter = read_adapter(source.adapter) if source.adapter else None
    warnings: list[str] = []
    tensors = merged_tensors(source, adapter, config, family, sizes, warnings)
    if source.nf4:
        warnings.append("merged into the base as QLoRA trained on it, rounded to NF4 (docs/export.md)")
    known = _importance(options)
    items, name, model = _items(tensors, mixture, family, sizes, config, options, known)
    if adapter is not None:
        warnings += no_effect(adapter, ggml)
    pairs = _metadata(source, options, config, items, MIXTURES[name].file_type, warnings)
    if source.packed is not None:
        items = with_packed(items, source.packed)
        warnings.append("the weights are those the run computed with, as it stored them (docs/quantization-aware.md)")
    if mixture == "fit":
        items = fit_to_size(items, len(head(pairs, [item.info for item in items])), options, ggml)
    return _plan(source, target, options, items, pairs, warnings, name, model)


def named_tensors(source: Source) -> dict[str, tuple[MergedTensor, tuple[str, ...]]]:
    """Hugging Face name -> merged weights in the source's own rows, and the GGUF tensors that are cut from them.

    Raises:
        ModelError, UnsupportedModel
    """
    config = read_config(source.base)
    family = architectures.family_of(config)
    config = architectures.settings(config, family)
    sizes = architectures.sizes_of(config)
    adapter = read_adapter(source.adapter) if source.adapter else None
    parts = _parts(safetensors_rows.index(source.base), adapter, config, family, sizes, warnings=[])
    named: dict[str, tuple[MergedTensor, tuple[str, ...]]] = {}
    for place in parts.places:
        stored = parts.base[place.tensor]
        whole = MergedTensor(
            stored,
            parts.changes.get(place.tensor),
            nf4=source.nf4 and place.weight.linear and is_nf4(place.tensor, stored),
        )
        known = named[place.tensor][1] if place.tensor in named else ()
        named[place.tensor] = whole, (*known, place.gguf)
    return named


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a Hugging Face directory. Raises: ModelError."""
    file = folder / "config.json"
    try:
        config = parse_json(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{folder} is not a Hugging Face directory: it has no config.json") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise ModelError(f"{file} is not a model configuration")
    return config


def merged_tensors(
    source: Source,
    adapter: Adapter | None,
    config: Mapping[str, Any],
    family: Family,
    sizes: architectures.Sizes,
    warnings: list[str],
) -> dict[str, MergedTensor | Stack]:
    """GGUF name -> its weights. Raises: ModelError, UnsupportedModel."""
    parts = _parts(safetensors_rows.index(source.base), adapter, config, family, sizes, warnings)
    merged = _merged(parts, sizes, source.nf4)
    _check_rows(adapter, merged, parts.base)
    return merged


@dataclass(frozen=True)
class Parts:
    """What is stored and what the adapter changes, by the names of the tables, and where each goes."""

    base: Mapping[str, StoredTensor]
    changes: Mapping[str, Change]
    slices: Mapping[tuple[str, int], Change]
    """Changes of single experts, by GGUF name and number."""
    places: Sequence[architectures.Place]


def _parts(
    found: dict[str, StoredTensor],
    adapter: Adapter | None,
    config: Mapping[str, Any],
    family: Family,
    sizes: architectures.Sizes,
    warnings: list[str],
) -> Parts:
    base = {name: found[stored] for name, stored in architectures.text_names(family, found).items()}
    if len(base) < len(found):
        warnings.append(f"{len(found) - len(base)} tensors are left out: only the text model is exported")
    tied = bool(config.get("tie_word_embeddings", HEAD not in base))
    if tied and HEAD in base:
        warnings.append(f"{HEAD} is left out: config.json ties it to the embedding, so the model does not use it")
        del base[HEAD]
    places = architectures.places(family, sizes, base, tied=tied)
    changes = changes_of(adapter, family)
    if tied and _unties(base, adapter, changes, family, warnings):
        places.append(architectures.Place("output.weight", HEAD, TOP[HEAD]))
    slices = take_expert_changes(changes, adapter, family, sizes) if adapter else {}
    if adapter:
        check_fit(adapter, changes, base)
    return Parts(base, changes, slices, places)


def changes_of(adapter: Adapter | None, family: Family) -> dict[str, Change]:
    """What the adapter does, by the names of the tables."""
    if adapter is None:
        return {}
    names = architectures.text_names(family, adapter.changes)
    return {name: adapter.changes[named] for name, named in names.items()}


def _merged(parts: Parts, sizes: architectures.Sizes, nf4: bool) -> dict[str, MergedTensor | Stack]:
    pieces: dict[str, list[MergedTensor]] = {}
    for place in parts.places:
        stored, weight = parts.base[place.tensor], place.weight
        order = architectures.rotary_order(stored.shape[0], sizes.words["head"]) if weight.rotary else None
        found = pieces.setdefault(place.gguf, [])
        for piece in place.cut(stored):
            change = parts.changes.get(place.tensor) or parts.slices.get((place.gguf, len(found)))
            rounded = nf4 and place.weight.linear and is_nf4(place.tensor, stored)
            found.append(MergedTensor(piece, change, order, nf4=rounded, plus=float(weight.plus_one)))
    stacked = {place.gguf for place in parts.places if place.stacked}
    return {gguf: Stack(tuple(found)) if gguf in stacked else found[0] for gguf, found in pieces.items()}


def _check_rows(
    adapter: Adapter | None, merged: Mapping[str, MergedTensor | Stack], base: Mapping[str, StoredTensor]
) -> None:
    embedding, output = merged["token_embd.weight"].shape, merged.get("output.weight")
    if adapter and output is not None and output.shape != embedding:
        raise ModelError(
            f"the adapter {adapter.path} does not fit {base[EMBEDDING].file.parent}: with it the embedding has shape "
            f"{embedding}, the head {output.shape}"
        )


def _unties(
    base: dict[str, StoredTensor],
    adapter: Adapter | None,
    changes: dict[str, Change],
    family: Family,
    warnings: list[str],
) -> bool:
    """Whether training gave embedding and head, which the base shares, different weights; `base` then has both."""
    if not separate_head(base, adapter, changes, warnings):
        return False
    if family.head == "never":
        raise UnsupportedModel(
            f"the adapter {adapter.path if adapter else ''} changes embedding and head separately, but llama.cpp has "
            f"one tensor for both in the {family.name} family",
            "Train neither, or both as one (ensure_weight_tying).",
        )
    return True


def _items(
    tensors: Mapping[str, MergedTensor | Stack],
    mixture: str,
    family: Family,
    sizes: architectures.Sizes,
    config: Mapping[str, Any],
    options: ConvertOptions,
    known: Mapping[str, Floats],
) -> tuple[list[Item], str, Model]:
    """The file's tensors in its order, the mixture that was really used, and what its rules were asked about."""
    sources: dict[str, MergedTensor | Stack | NDArray[np.float32]] = {**tensors, **family.extra(config)}
    names = sorted(sources, key=gguf_types.order)
    shapes = [gguf_types.Shape(name, sources[name].shape) for name in names]
    name = gguf_types.best_mixture(shapes) if mixture in ("best", "fit") else mixture
    words = sizes.words
    grouped = family.name == "llama" and words["heads"] != words["kv_heads"]
    model = Model(
        sizes.layers,
        gguf_types.value_tensors(shapes),
        words["heads"] // words["kv_heads"],
        words["experts"],
        importance=bool(known),
        wide_values=sizes.layers == 80 and (family.name == "qwen2" or grouped),
    )
    choices = gguf_types.assign(name, shapes, model, options.extra.get("types", ()))
    items = [
        Item(
            shape.name,
            shape.shape,
            choice.type,
            choice.note,
            sources[shape.name],
            _group(sources[shape.name], words),
            importance_of(known, shape),
        )
        for shape, choice in zip(shapes, choices, strict=True)
    ]
    return items, name, model


def _importance(options: ConvertOptions) -> dict[str, Floats]:
    file = options.extra.get("imatrix")
    return read_importance(Path(file)) if file else {}


def _group(source: MergedTensor | Stack | NDArray[np.float32], words: Mapping[str, int]) -> int:
    return words["head"] if isinstance(source, MergedTensor) and source.order is not None else 1


def no_effect(adapter: Adapter, ggml: Ggml) -> list[str]:
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
        shapes={item.name: item.shape for item in items},
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
    return read_template(file) if file and file.is_file() else None


def _plan(
    source: Source,
    target: str,
    options: ConvertOptions,
    items: Sequence[Item],
    pairs: Sequence[KeyValue],
    warnings: list[str],
    mixture: str,
    model: Model,
) -> Plan:
    infos = [item.info for item in items]
    prefix = head(pairs, infos)
    weights = sum(item.weights for item in items if not isinstance(item.source, np.ndarray))
    bits = 8 * sum(info.bytes for info in infos) / weights
    warnings += _label_notes(target, mixture, items, bits, model)
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


def _label_notes(target: str, mixture: str, items: Sequence[Item], bits: float, model: Model) -> list[str]:
    if target == "gguf":
        return []
    label = "Q4_K_M" if target == "gguf-q4" else mixture
    shapes = [gguf_types.Shape(item.name, item.shape) for item in items]
    choices = gguf_types.assign(label, shapes, model)
    label_bytes = sum(
        item.rows * choice.type.row_bytes(item.columns) for item, choice in zip(items, choices, strict=True)
    )
    label_bits = 8 * label_bytes / sum(item.weights for item in items)
    fallbacks = sum(bool(item.note) for item in items)
    return gguf_types.honest_label(label, mixture, bits, label_bits, fallbacks, len(items))
