"""A PEFT adapter as a GGUF file of its own, which llama.cpp adds to an unmerged base while it runs.

For every tensor llama.cpp computes W x + adapter.lora.alpha / rank · scale · B A x, with one alpha for the file and
the rank of the tensor's own B (`llama-adapter.h`, `llama-graph.cpp` at 0c1e57098). PEFT's scale may differ from tensor
to tensor (`rank_pattern`, `alpha_pattern`) and need not be alpha / rank (rank-stabilized LoRA): what one alpha cannot
say is multiplied into B.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeft import __version__
from edgeft.artifact import Artifact, Manifest, manifest_path, write_manifest
from edgeft.errors import ModelError, UnsupportedModel, WriteError
from edgeft.models import adapter_file
from edgeft.models.gguf_header import GgufHeader, read_header
from edgeft.models.text import own_template
from edgeft.paths import atomic_write, sha256_file
from edgeft.plugins import ConvertOptions, Plan, Source, TensorPlan
from edgeft.progress import Progress

from . import gguf_architectures as architectures
from . import safetensors_rows
from .adapter import EMBEDDING, HEAD, WEIGHTS, Adapter, Change, check_fit, read_adapter
from .families.family import Family
from .ggml import TYPES, Ggml, GgmlType
from .gguf_convert import check_space
from .gguf_plan import changes_of, no_effect, read_config, stop_ids
from .gguf_writer import KeyValue, TensorInfo, data_size, float32, head, padded, string, uint32
from .leftovers import claim, remove_leftovers
from .merge import read_whole
from .safetensors_rows import Reader, StoredTensor

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]
    Order = NDArray[np.intp]

_FILE_TYPES = {"F32": 0, "F16": 1}
"""`general.file_type`: llama.cpp's LLAMA_FTYPE numbers."""


@dataclass(frozen=True)
class Pair:
    """The two matrices of one base tensor."""

    name: str
    """Of the base tensor, in the GGUF."""
    change: Change
    factor: float
    """What B is multiplied with."""
    order: Order | None
    """Row of B for each row of the GGUF's tensor (Llama's rotary projections)."""

    @property
    def rank(self) -> int:
        assert self.change.down is not None
        return self.change.down.shape[0]

    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of `lora_a` and `lora_b`: (rank, in) and (out, rank); for an embedding (vocab, rank) and (width, rank)."""
        assert self.change.down is not None and self.change.up is not None
        down, up = self.change.down.shape, self.change.up.shape
        return (down[::-1] if self.change.embedding else down), up

    def read(self, reader: Reader, ggml: Ggml) -> tuple[Floats, Floats]:
        """The two matrices in those shapes. Raises: ModelError."""
        assert self.change.down is not None and self.change.up is not None
        down, up = read_whole(reader, ggml, self.change.down), read_whole(reader, ggml, self.change.up)
        if self.change.embedding:
            down = np.ascontiguousarray(down.T)
        if self.order is not None:
            up = up[self.order]
        return down, np.ascontiguousarray(up * np.float32(self.factor))


@dataclass(frozen=True)
class Details:
    pairs: tuple[Pair, ...]
    type: GgmlType
    head: bytes
    stop_token_ids: tuple[int, ...]
    chat_template_sha256: str | None


def make_plan(source: Source, target: str, kind: str, options: ConvertOptions, ggml: Ggml) -> Plan:
    """Plan the adapter's file; reads headers, norms and nothing else.

    Args:
        kind: how A and B are stored, "F32" or "F16".

    Raises:
        ModelError: no adapter, or it does not fit the base.
        UnsupportedModel: the adapter trains something that such a file cannot hold.
    """
    if source.adapter is None:
        raise ModelError(
            f"{source.reference} has no adapter to write", "Give a run that trained one, or --adapter FOLDER."
        )
    config = read_config(source.base)
    family = architectures.family_of(config)
    config = architectures.settings(config, family)
    sizes = architectures.sizes_of(config)
    adapter = read_adapter(source.adapter)
    _refuse(adapter)
    header = read_header(source.gguf) if source.gguf else None
    found = _from_gguf(header, family, sizes) if header else safetensors_rows.index(source.base)
    base = {name: found[stored] for name, stored in architectures.text_names(family, found).items()}
    tied = HEAD not in base or (header is None and bool(config.get("tie_word_embeddings")))
    if tied:
        base.pop(HEAD, None)
    places = {place.tensor: place for place in architectures.places(family, sizes, base, tied=tied)}
    changes = changes_of(adapter, family)
    _refuse_shared(adapter, tied)
    check_fit(adapter, changes, base)
    _refuse_resized(adapter, base)
    _refuse_cut(adapter, changes, places)
    alpha = _common_alpha(adapter)
    pairs = tuple(
        Pair(places[name].gguf, change, _factor(change, alpha), _order(places[name], sizes, base[name]))
        for name, change in sorted(changes.items(), key=lambda entry: places[entry[0]].gguf)
        if change.down is not None
    )
    norms = adapter_file.file_norms_digest(header) if header else _norms(base, places, ggml)
    warnings = no_effect(adapter, ggml)
    if source.nf4:
        warnings.append("trained over a base rounded to NF4: less exact on another rounding (docs/adapters.md)")
    pairs_metadata = _metadata(source, family.name, alpha, kind, norms)
    return _plan(source, target, options, pairs, TYPES[kind], pairs_metadata, warnings)


_UNHELD: Mapping[str, str] = {
    "replacement": "a tensor stored as a whole (modules_to_save, added tokens or a bias)",
    "magnitude": "the magnitudes of DoRA",
    "token_rows": "trained token rows (trainable_token_indices)",
    "offset": "the bias of B (lora_bias)",
}


def _refuse(adapter: Adapter) -> None:
    """Raises: UnsupportedModel for whatever is not B @ A."""
    for name, change in adapter.changes.items():
        for part, meaning in _UNHELD.items():
            if getattr(change, part) is not None:
                raise UnsupportedModel(
                    f"{adapter.path}: {name} has {meaning}, which a GGUF adapter cannot hold",
                    "Merge it instead: --to gguf-q4 and the other gguf targets.",
                )


def _refuse_shared(adapter: Adapter, tied: bool) -> None:
    """Raises: UnsupportedModel for a change of an embedding that the head shares."""
    if tied and (changed := {EMBEDDING, HEAD} & set(adapter.changes)):
        raise UnsupportedModel(
            f"{adapter.path} changes {changed.pop()}, but embedding and head of the base are one tensor, "
            "which llama.cpp cannot change for one of the two",
            "Merge it instead: the other gguf targets store both.",
        )


def _refuse_resized(adapter: Adapter, base: Mapping[str, StoredTensor]) -> None:
    """PEFT may save a copy of the base's embedding; a longer one has tokens that the base's file lacks."""
    for name, change in adapter.changes.items():
        if change.base is not None and change.base.shape != base[name].shape:
            raise UnsupportedModel(
                f"{adapter.path} was trained with added tokens, which an unmerged base does not have",
                "Merge it instead: --to gguf-q4 and the other gguf targets.",
            )


def _refuse_cut(adapter: Adapter, changes: Mapping[str, Change], places: Mapping[str, architectures.Place]) -> None:
    """Raises: UnsupportedModel for changes of tensors that a GGUF cuts up or stacks."""
    for name in changes:
        if places[name].stacked or len(places[name].weight.gguf) > 1:
            raise UnsupportedModel(
                f"{adapter.path} changes {name}, which a GGUF stores together with others or in parts",
                "Merge it instead: --to gguf-q4 and the other gguf targets.",
            )


def _from_gguf(header: GgufHeader, family: Family, sizes: architectures.Sizes) -> dict[str, StoredTensor]:
    """The tensors of a GGUF under their Hugging Face names, with row-major shapes; for names and shapes only."""
    layers = {
        f"blk.{layer}.{gguf}": f"model.layers.{layer}.{name}"
        for layer in range(sizes.layers)
        for name, weight in {**family.layer, **family.optional}.items()
        for gguf in weight.gguf
    }
    names = {gguf: name for name, weight in family.top.items() for gguf in weight.gguf} | layers
    return {
        names[tensor.name]: StoredTensor(
            names[tensor.name], header.path, tensor.type, tensor.shape[::-1], tensor.offset, tensor.bytes
        )
        for tensor in header.tensors
        if tensor.name in names
    }


def _common_alpha(adapter: Adapter) -> float:
    """The alpha that most tensors need: scale · rank. llama.cpp reads 0 as "no scale", so never 0."""
    counts = Counter(
        float(np.float32(change.scale * change.down.shape[0]))
        for change in adapter.changes.values()
        if change.down is not None
    )
    counts.pop(0.0, None)
    return counts.most_common(1)[0][0] if counts else 1.0


def _factor(change: Change, alpha: float) -> float:
    assert change.down is not None
    factor = change.scale * change.down.shape[0] / alpha
    # Rounding alone must not touch B.
    return 1.0 if abs(factor - 1.0) < 1e-6 else factor


def _order(place: architectures.Place, sizes: architectures.Sizes, stored: StoredTensor) -> Order | None:
    return architectures.rotary_order(stored.shape[0], sizes.words["head"]) if place.weight.rotary else None


def _norms(base: Mapping[str, StoredTensor], places: Mapping[str, architectures.Place], ggml: Ggml) -> str:
    with Reader() as reader:
        return adapter_file.norms_digest(
            (place.gguf, (read_whole(reader, ggml, base[name]) + np.float32(place.weight.plus_one)).tobytes())
            for name, place in places.items()
            if adapter_file.is_norm(place.gguf)
        )


def _metadata(source: Source, architecture: str, alpha: float, kind: str, norms: str | None) -> list[KeyValue]:
    assert source.adapter is not None
    pairs = [
        string("general.architecture", architecture),
        string("general.type", "adapter"),
        string("adapter.type", "lora"),
        float32("adapter.lora.alpha", alpha),
        uint32("general.base_model.count", 1),
        string("general.base_model.0.name", source.gguf.name if source.gguf else source.reference),
        uint32("general.file_type", _FILE_TYPES[kind]),
    ]
    if norms is not None:
        pairs.append(string(adapter_file.BASE_NORMS, norms))
    if source.gguf is not None:
        pairs.append(string(adapter_file.BASE_SHA256, adapter_file.file_sha256(source.gguf)))
    return pairs


def _plan(
    source: Source,
    target: str,
    options: ConvertOptions,
    pairs: Sequence[Pair],
    kind: GgmlType,
    metadata: Sequence[KeyValue],
    warnings: Sequence[str],
) -> Plan:
    infos, tensors = [], []
    for pair in pairs:
        note = "" if pair.factor == 1.0 else f"B holds a factor {pair.factor:.6g}: its scale is not the file's"
        for letter, shape in zip("ab", pair.shapes(), strict=True):
            size = shape[0] * kind.row_bytes(shape[1])
            infos.append(TensorInfo(f"{pair.name}.lora_{letter}", shape, kind.id, size))
            tensors.append(TensorPlan(infos[-1].name, shape, kind.name, size, note if letter == "b" else ""))
    prefix = head(metadata, infos)
    weights = sum(shape[0] * shape[1] for pair in pairs for shape in pair.shapes())
    template = source.chat_template or own_template(source.base)
    digest = hashlib.sha256(template.encode()).hexdigest() if template else None
    return Plan(
        target=target,
        source=source,
        options=options,
        tensors=tuple(tensors),
        bytes=len(prefix) + data_size(infos),
        parameters=weights,
        bits_per_weight=kind.bits,
        warnings=tuple(warnings),
        details=Details(tuple(pairs), kind, prefix, stop_ids(source), digest),
    )


def convert(plan: Plan, ggml: Ggml, progress: Progress) -> Artifact:
    """Write the file, then its manifest.

    Raises:
        ModelError: a weight is not finite or too large, or a file cannot be read.
        WriteError: no space, or the folder cannot be written.
    """
    out = plan.options.out
    check_space(out, plan.bytes)
    remove_leftovers(out)
    progress.start("Writing the adapter", plan.parameters, "weights")
    try:
        digest = _write(plan, ggml, progress)
    finally:
        progress.finish()
    manifest = _manifest(plan, digest)
    try:
        write_manifest(out, manifest)
    except WriteError:
        out.unlink()  # a command that failed leaves no result
        raise
    return Artifact(out, manifest)


def _write(plan: Plan, ggml: Ggml, progress: Progress) -> str:
    """Returns: hex SHA-256 of the file."""
    details: Details = plan.details
    digest = hashlib.sha256(details.head)
    with atomic_write(plan.options.out) as stream, Reader() as reader:
        claim(stream)
        stream.write(details.head)
        for pair in details.pairs:
            for letter, values in zip("ab", pair.read(reader, ggml), strict=True):
                content = _encode(pair, letter, details.type, values, ggml)
                digest.update(content)
                stream.write(content)
                progress.advance(values.size, pair.name)
        manifest_path(plan.options.out).unlink(missing_ok=True)
    return digest.hexdigest()


def _encode(pair: Pair, letter: str, kind: GgmlType, values: Floats, ggml: Ggml) -> bytes:
    if kind.name == "F16" and float(np.abs(values).max(initial=0)) > float(np.finfo(np.float16).max):
        raise ModelError(f"{pair.name}.lora_{letter} has values too large for F16", "--to gguf-lora holds them.")
    content = ggml.quantize(kind, values).tobytes()
    return content + bytes(padded(len(content)) - len(content))


def _manifest(plan: Plan, digest: str) -> Manifest:
    details: Details = plan.details
    source = plan.source
    assert source.adapter is not None
    base: dict[str, Any] = {"reference": source.reference, "path": str(source.gguf or source.base)}
    if source.gguf is not None:
        base["sha256"] = adapter_file.file_sha256(source.gguf)
    return Manifest(
        format="adapter",
        target=plan.target,
        types={details.type.name: plan.parameters},
        parameters=plan.parameters,
        bits_per_weight=plan.bits_per_weight,
        bytes=plan.bytes,
        sha256=digest,
        base=base,
        adapter={"path": str(source.adapter), "digest": sha256_file(Path(source.adapter) / WEIGHTS)},
        chat_template_sha256=details.chat_template_sha256,
        stop_token_ids=details.stop_token_ids,
        notes=(*plan.warnings, *sorted({tensor.note for tensor in plan.tensors if tensor.note})),
        edgeft_version=__version__,
    )
