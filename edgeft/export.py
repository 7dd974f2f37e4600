"""From a run, or a model and an adapter, to one deployable file, with a record of where it came from."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from edgeft import config, plugins
from edgeft.artifact import Artifact, Manifest, manifest_path, write_manifest
from edgeft.data.example import Encoded
from edgeft.errors import ModelError, UsageError
from edgeft.models import ResolvedModel, resolve, weights_digest
from edgeft.models.gguf_import import text_side
from edgeft.paths import parse_json, sha256_file
from edgeft.plugins import Converter, ConvertOptions, Plan, Source, Target
from edgeft.progress import Progress, Silent
from edgeft.run import Run, RunManifest

Rounding = Literal["none", "bf16", "f16"]

MergeBase = Literal["w16", "nf4-roundtrip"]
"""What an adapter is merged into: the base's own weights, or those rounded to NF4 and back, as QLoRA trains on them."""

ADAPTER_TARGET = "gguf-lora"


@dataclass(frozen=True)
class Origin:
    """What is exported and where it came from."""

    source: Source
    name: str
    """For the default file name."""
    run: Run | None = None
    base_digest: str | None = None
    """SHA-256 over the base's weights at training time."""
    licence: str | None = None


@dataclass(frozen=True)
class Export:
    """An export that has been thought through but not done."""

    origin: Origin
    plan: Plan
    converter: Converter
    merge_base: MergeBase | None = None
    """As asked for."""


def prepare(
    model: str,
    target: str | None = None,
    *,
    adapter: Path | None = None,
    out: Path | None = None,
    rounding: Rounding = "none",
    threads: int | None = None,
    merge_base: MergeBase | None = None,
    extra: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Export:
    """Find every part and plan the export; reads headers, not weights.

    Args:
        model: a run, an adapter directory, or any model reference (a GGUF is first imported).
        merge_base: None: what the adapter was trained on, nf4-roundtrip for a run of QLoRA.
        extra: what only some converters know; see their `ConvertOptions.extra`.
        target: None: `default_target`.
        out: the file or folder to write; by default `<name>-<target's short name>` in the current folder.

    Raises:
        UsageError: no such model or target, or an adapter for something that has its own.
        ModelError, UnsupportedModel: what is there cannot be exported.
    """
    if target is not None:
        converter_for(target)  # a misspelt name is found before a model is fetched
    origin = find(model, adapter, progress or Silent())
    target = target or default_target(origin)
    converter = converter_for(target)
    if origin.source.gguf is not None and not target.startswith(ADAPTER_TARGET):
        origin = merged(origin, progress or Silent())
    origin = for_target(with_merge_base(origin, merge_base), target)
    out = out or Path(default_name(origin.name, target))
    _check_out(out, converter.targets[target])
    options = ConvertOptions(out, rounding, threads, extra or {})
    return Export(origin, converter.plan(origin.source, target, options), converter, merge_base)


def default_target(origin: Origin) -> str:
    """A run on a GGUF ships its adapter alone, beside that file; everything else becomes what the settings say."""
    if origin.run is not None and (trained_for := origin.run.manifest().target):
        return trained_for
    return ADAPTER_TARGET if origin.source.gguf else str(config.load()["export.target"].value)


def with_merge_base(origin: Origin, base: MergeBase | None) -> Origin:
    """Raises: UsageError when the run's training leaves no choice."""
    if base is None:
        return origin
    method = origin.run.manifest().method if origin.run else None
    if origin.source.adapter is None or origin.source.packed or origin.source.gguf or method in ("lora", "full"):
        raise UsageError(
            f"--merge-base {base} is for adapters that were trained on an NF4 base; {origin.name} was not",
            "Leave it out: what the run was trained on is what it is merged into.",
        )
    return dataclasses.replace(origin, source=dataclasses.replace(origin.source, nf4=base == "nf4-roundtrip"))


def for_target(origin: Origin, target: str) -> Origin:
    """What a run trained for one target is for another: base and adapter, if it has an adapter.

    Raises:
        UsageError: the run trained the scales of its own target, alone or with the adapter.
    """
    if origin.source.packed is None or origin.run is None or target == (trained := origin.run.manifest().target):
        return origin
    from edgeft.train.config import read_config

    if origin.run.manifest().method != "full" and read_config(origin.run.path).tune != "adapter":
        raise UsageError(f"{origin.run.path} trained the scales of {trained}", f"--to {trained}")
    return dataclasses.replace(origin, source=dataclasses.replace(origin.source, packed=None))


def as_exported(origin: Origin, manifest: Manifest | None) -> Origin:
    """The origin of an existing file: what it was merged into, and whether it has a run's packed weights."""
    if manifest is None:
        return origin
    base: MergeBase | None = manifest.base.get("merged_into")
    return for_target(with_merge_base(origin, base) if base else origin, manifest.target)


def merged(origin: Origin, progress: Progress) -> Origin:
    """A run on a GGUF, to be merged after all: into the file's weights, dequantized."""
    assert origin.source.gguf is not None
    _check_unchanged(origin)
    base = resolve(str(origin.source.gguf), want="hf", progress=progress).path
    source = dataclasses.replace(origin.source, base=base, gguf=None)
    return dataclasses.replace(origin, source=source, base_digest=None)


def _check_unchanged(origin: Origin) -> None:
    """Raises: ModelError when the base is not the one the run was trained on."""
    source = origin.source
    if origin.base_digest is None:
        return
    found = weights_digest(source.base) if source.gguf is None else sha256_file(source.gguf)
    if found != origin.base_digest:
        raise ModelError(
            f"{source.gguf or source.base} has changed since {origin.run.path if origin.run else 'the run'} "
            "was trained on it",
            "The adapter belongs to the old weights: restore them or train again.",
        )


def _check_out(out: Path, target: Target) -> None:
    """Raises: UsageError when something else is in the artifact's place; an older artifact may be replaced."""
    if not target.directory and out.is_dir():
        raise UsageError(f"{out} is a folder", "Give the file to write with --out.")
    if target.directory and out.exists() and not (out.is_dir() and manifest_path(out).is_file()):
        raise UsageError(f"{out} exists and is not a model edgeft exported", "Give another folder with --out.")


def export(prepared: Export, progress: Progress) -> Artifact:
    """Write the artifact and its manifest.

    Raises:
        ModelError: a weight or file is damaged, or the base is not the one the run was trained on.
        WriteError: the disk is full or read-only; nothing that looks finished is left.
    """
    origin = prepared.origin
    _check_unchanged(origin)
    artifact = prepared.converter.convert(prepared.plan, progress)
    assert artifact.manifest is not None
    merged_into = {"merged_into": prepared.merge_base} if prepared.merge_base else {}
    manifest = dataclasses.replace(
        artifact.manifest,
        # Without a run there is nothing to compare with, and hashing would read the whole base a second time.
        base={
            **artifact.manifest.base,
            "reference": origin.source.reference,
            "digest": origin.base_digest,
            **merged_into,
        },
        run=str(origin.run.path) if origin.run else None,
        system=origin.run.manifest().data.get("system") if origin.run else None,
        licence=origin.licence,
    )
    write_manifest(artifact.path, manifest)
    return Artifact(artifact.path, manifest)


CALIBRATION = 256
"""Examples whose tokens are read for an importance matrix, unless said otherwise."""


def calibrate(
    origin: Origin, data: str | None, out: Path, examples: int = CALIBRATION, progress: Progress | None = None
) -> Path:
    """Write an importance matrix from training examples of a data set, by default the run's own.

    Raises:
        UsageError: there is neither a run nor a data set.
        DataError, ModelError, MissingDependency, WriteError
    """
    from edgeft.importance import measure

    gguf = plugins.load("converters", "gguf")
    if origin.source.gguf is not None:
        origin = merged(origin, progress or Silent())
    encoded, reference = _calibration(origin, data, examples)
    with gguf.merged(origin.source) as weights:
        found = measure(origin.source, weights, encoded, progress=progress)
    gguf.write_importance(out, found, [reference], max(len(one.tokens) for one in encoded))
    return out


def _calibration(origin: Origin, data: str | None, examples: int) -> tuple[list[Encoded], str]:
    from edgeft.data.encode import encode_all
    from edgeft.data.load import load_split
    from edgeft.verify.text_checks import trained_text

    if data is None and origin.run is None:
        raise UsageError("what text to calibrate on is not known", "Give a data set with --data or --calibrate.")
    recorded = origin.run.manifest().data if origin.run else {}
    reference = data or str(recorded["path"] if Path(recorded["path"]).exists() else recorded["reference"])
    chosen = load_split(reference, "train")
    step = max(1, len(chosen) // examples)
    text = trained_text(origin.source)
    encoded = encode_all(chosen[::step][:examples], text.need_template(), text.tokenize, text.eos_tokens).encoded
    if not encoded:
        raise UsageError(f"{reference} has no text to calibrate on")
    return encoded, reference


def converter_for(target: str) -> Converter:
    """The plug-in whose name a target begins with. Raises: UsageError."""
    name = target.partition("-")[0]
    known = plugins.names("converters")
    if name not in known:
        raise UsageError(f"no export target {target!r}", f"Targets begin with: {', '.join(known)}.")
    converter: Converter = plugins.load("converters", name)
    if target not in converter.targets:
        begins = [name for name in converter.targets if name.startswith(target)]
        near = ", ".join(begins or get_close_matches(target, converter.targets, 4, 0.5) or list(converter.targets)[:4])
        raise UsageError(f"no export target {target!r}", f"Near it: {near}; edgeft export --list has all.")
    return converter


def default_name(name: str, target: str) -> str:
    """ "demo", "gguf-q4" -> "demo-q4.gguf"; "demo", "onnx-q4" -> "demo-q4-onnx", a folder."""
    kind, _, short = target.partition("-")
    made = converter_for(target).targets[target]
    if made.suffix:
        return f"{name}-{short}{made.suffix}" if short else f"{name}{made.suffix}"
    return f"{name}-{short or 'fit'}{'-' if made.directory else '.'}{kind}"


def find(model: str, adapter: Path | None, progress: Progress) -> Origin:
    """Resolve a reference into base, adapter and template. Raises: UsageError, ModelError."""
    found = resolve(model, progress=progress)
    if adapter is not None and found.kind in ("run", "adapter"):
        raise UsageError(f"{model} has its own adapter", "Leave out --adapter, or give the base model instead.")
    if found.kind == "run":
        return _from_run(found, progress)
    if found.kind == "adapter":
        return _from_adapter(found, progress)
    base = found if found.kind == "hf" else resolve(model, want="hf", progress=progress)
    source = Source(base.path, _adapter_folder(adapter), found.reference)
    name = adapter.absolute().name if adapter else _short(model)
    return Origin(source, name, licence=base.licence or found.licence)


def _from_run(found: ResolvedModel, progress: Progress) -> Origin:
    run = Run(found.path)
    manifest = run.manifest()
    if gguf := manifest.base.get("gguf"):
        return _from_gguf_run(run, manifest, Path(gguf), progress)
    base = run.model
    if not base.is_dir():
        # The store may have been moved or emptied since; the reference still says what it was.
        base = resolve(str(manifest.base["reference"]), want="hf", progress=progress).path
    full = manifest.method == "full"
    nf4 = manifest.method == "qlora"
    packed = run.packed if manifest.target else None
    source = Source(base, run.adapter, str(manifest.base["reference"]), manifest.chat_template, nf4, packed)
    digest = None if full else manifest.base.get("digest")
    return Origin(source, run.path.absolute().name, run, digest, manifest.licence)


def _from_gguf_run(run: Run, manifest: RunManifest, file: Path, progress: Progress) -> Origin:
    reference = str(manifest.base["reference"])
    if not file.is_file():
        file = resolve(reference, want="gguf", progress=progress).path
    base = run.model if run.model.is_dir() else text_side(file)
    source = Source(base, run.adapter, reference, manifest.chat_template, gguf=file)
    return Origin(source, run.path.absolute().name, run, str(manifest.base["digest"]), manifest.licence)


def _from_adapter(found: ResolvedModel, progress: Progress) -> Origin:
    settings = _read_json(found.path / "adapter_config.json")
    reference = settings.get("base_model_name_or_path")
    if not reference:
        raise UsageError(
            f"{found.reference} does not say what its base model is",
            f"edgeft export BASE --adapter {found.reference}",
        )
    base = resolve(str(reference), want="hf", progress=progress)
    return Origin(Source(base.path, found.path, str(reference)), found.path.name, licence=base.licence)


def _read_json(file: Path) -> Mapping[str, Any]:
    try:
        content = parse_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} cannot be read: {error}") from error
    return content if isinstance(content, dict) else {}


def _adapter_folder(path: Path | None) -> Path | None:
    if path is None or (path / "adapter_config.json").is_file():
        return path
    inside = path / "adapter"
    if (inside / "adapter_config.json").is_file():
        return inside
    raise ModelError(f"{path} is not an adapter: it has no adapter_config.json")


def _short(reference: str) -> str:
    """Last part of a path or hub name, without revision and ending."""
    last = Path(reference.rstrip("/")).absolute().name if ":" not in reference else reference.rsplit("/", 1)[-1]
    return last.split("@")[0].split(":")[0].removesuffix(".gguf")
