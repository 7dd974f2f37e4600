"""What there is: models, runs, artifacts, adapters, bundles, devices and jobs, each with the next sensible command."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from edgeft import jobs
from edgeft.artifact import Manifest, manifest_path, read_manifest
from edgeft.bundle import is_bundle, read_bundle
from edgeft.device import load_profile
from edgeft.device import names as device_names
from edgeft.errors import EdgeftError
from edgeft.item import KINDS, Item
from edgeft.models.listing import stored_models
from edgeft.run import Run, is_run

DEPTH = 3
"""Folders below the one looked into."""
FOLDERS = 2000
"""At most; a folder with more is not a place to look for models in."""
_SKIPPED = frozenset({"node_modules", "site-packages", "__pycache__", "checkpoints", "adapter", "packed", "venv"})


def inventory(folder: Path) -> list[Item]:
    """Everything in the store, below `folder`, installed, running, and known of devices."""
    found = [*_models(), *_below(folder.absolute()), *_installed(), *_jobs(), *_devices()]
    return sorted(found, key=lambda item: KINDS.index(item.kind))


def data_sets(folder: Path) -> list[str]:
    """Names that `--data` takes: built-in sets, prepared folders, and files of data, as one would type them."""
    from edgeft.data.load import BUILT_IN

    found: list[str] = []
    for root, folders, files in os.walk(folder):
        place = Path(root)
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in _SKIPPED)
        if len(place.relative_to(folder).parts) >= DEPTH or is_run(place) or is_bundle(place):
            folders.clear()
        if place != folder and any(name.startswith("train.") for name in files):
            found.append(shown(place))
            continue
        found += [
            shown(place / name) for name in sorted(files) if name.endswith((".jsonl", ".csv", ".tsv", ".parquet"))
        ]
        if len(found) > FOLDERS:
            break
    return [*BUILT_IN, *(name for name in found if Path(name).name not in ("metrics.jsonl", "events.jsonl"))]


def _models() -> Iterator[Item]:
    for model in stored_models():
        size = f"{model.bytes / 1e6:.0f} MB"
        bits = f", {model.bits_per_weight:g} bits per weight" if model.bits_per_weight else ""
        follow: tuple[str, ...] = ("chat", model.name) if model.here else ("models", "pull", model.name)
        if model.kind == "import":
            follow = ("train", "--model", str(model.path), "--data", "smart-home")
        yield Item("model", model.name, "here" if model.here else "not pulled", size + bits, follow)


def _below(folder: Path) -> Iterator[Item]:
    """Runs, artifacts and bundles in files; what cannot be read is listed with the reason."""
    count = 0
    for root, folders, files in os.walk(folder):
        place, count = Path(root), count + 1
        if count > FOLDERS:
            return
        item = _of_folder(place)
        if item is not None and place != folder:
            yield item
            folders.clear()
            continue
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in _SKIPPED)
        if len(place.relative_to(folder).parts) >= DEPTH:
            folders.clear()
        for name in sorted(files):
            if name.endswith((".gguf", ".pte", ".litertlm")):
                yield _artifact(place / name)


def item_at(path: Path) -> Item | None:
    """What a run, an artifact or a bundle at a place is; None when it is none of these."""
    if path.is_dir():
        return _of_folder(path)
    return _artifact(path) if path.is_file() and path.suffix in (".gguf", ".pte", ".litertlm") else None


def _of_folder(place: Path) -> Item | None:
    if is_run(place):
        return _run(place)
    if is_bundle(place):
        return _bundle(place)
    return _artifact(place) if manifest_path(place).is_file() else None


def shown(path: Path) -> str:
    """As one would type it here."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def _run(place: Path) -> Item:
    name, run = shown(place), Run(place)
    if not run.finished:
        return Item("run", name, "not finished", f"{_last_step(run)}", ("train", "--resume", name))
    try:
        manifest = run.manifest()
    except EdgeftError as error:
        return Item("run", name, "damaged", error.message, ("train", "--resume", name))
    loss = manifest.evaluation.get("nll_training_graph")
    detail = f"{manifest.method} of {manifest.base.get('reference')}" + (f", loss {loss:.4f}" if loss else "")
    target = manifest.target or ("gguf-lora" if manifest.method == "gguf" else "gguf-q4")
    return Item("run", name, "finished", detail, ("export", name, "--to", target))


def _last_step(run: Run) -> str:
    step = max((int(line.get("step", 0)) for line in run.metrics()), default=0)
    return f"step {step}"


def _artifact(place: Path) -> Item:
    name = shown(place)
    try:
        manifest = read_manifest(place)
    except EdgeftError as error:
        return Item("artifact", name, "damaged", error.message, ("chat", name))
    if manifest is None:
        return Item("artifact", name, "foreign", f"{place.stat().st_size / 1e6:.0f} MB", ("chat", name))
    detail = f"{manifest.bytes / 1e6:.1f} MB, {manifest.bits_per_weight:.2f} bits per weight"
    if manifest.format == "adapter":
        base = str(manifest.base.get("reference") or manifest.base.get("path") or "BASE")
        return Item("adapter", name, "made", detail, ("chat", base, "--adapter", name))
    return Item("artifact", name, _checked(manifest), detail, _after_export(name, manifest))


def _checked(manifest: Manifest) -> str:
    return "verified" if manifest.verification or manifest.ledger else "not verified"


def _after_export(name: str, manifest: Manifest) -> tuple[str, ...]:
    if _checked(manifest) == "verified" or not manifest.run or not is_run(Path(manifest.run)):
        return ("chat", name)
    return ("verify", shown(Path(manifest.run)), name)


def _bundle(place: Path) -> Item:
    name = shown(place)
    try:
        bundle = read_bundle(place)
    except EdgeftError as error:
        return Item("bundle", name, "damaged", error.message, ("install", name, "--dry-run"))
    return Item("bundle", name, "packed", f"{bundle.total_bytes / 1e6:.0f} MB", ("install", name))


def _installed() -> Iterator[Item]:
    from edgeft.package.install import apps_root, names, state

    for name in names(apps_root()):
        try:
            versions = state(apps_root(), name)
        except EdgeftError as error:
            yield Item("bundle", name, "damaged", error.message, ("install", "--list"))
            continue
        yield Item("bundle", name, "installed", f"version {versions.current}", ("install", "--list"))


def _jobs() -> Iterator[Item]:
    for job in jobs.list_jobs():
        retry = job.state in (jobs.State.FAILED, jobs.State.CANCELLED, jobs.State.LOST)
        yield Item("job", job.id, job.state.value, str(job), ("jobs", "retry" if retry else "watch", job.id))


def _devices() -> Iterator[Item]:
    for name in device_names():
        try:
            profile = load_profile(name)
        except EdgeftError as error:
            yield Item("device", name, "damaged", error.message, ("devices", "list"))
            continue
        yield Item(
            "device", name, "known", f"{profile.title}, {profile.memory.value / 1e9:.0f} GB", ("devices", "show", name)
        )
