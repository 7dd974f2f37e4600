"""Making a bundle: everything is checked and listed before a byte is written, and it appears under its name whole."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.resources
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgeft import __version__, paths
from edgeft.artifact import Artifact, manifest_path, open_artifact
from edgeft.bundle import MANIFEST, NAME, VERSION, Bundle, Target, encode, entries
from edgeft.errors import ModelError, UsageError, WriteError
from edgeft.progress import Progress, Silent

from . import sbom, service, signing, wheels
from .runtime import Choice, choose


@dataclass(frozen=True)
class Request:
    """What to put into a bundle."""

    model: Path
    target: Target
    name: str
    version: str
    adapters: Sequence[Path] = ()
    question: str = "Say hello."
    expected: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    wheels: Sequence[Path] = ()
    """Wheels that take the place of those from the index."""
    with_wheels: bool = True
    key: Path | None = None
    """Private key to sign with."""


@dataclass(frozen=True)
class Content:
    """What a bundle will hold, before it is written."""

    artifact: Artifact
    adapters: Mapping[str, Artifact]
    runtime: Choice
    model_bytes: int
    warnings: Sequence[str]

    @property
    def requirements(self) -> Sequence[str]:
        return self.runtime.requirements


def default_version() -> str:
    """The moment, so that every new bundle is newer than the one before."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y.%m%d.%H%M%S")


def plan(request: Request) -> Content:
    """What would be packed.

    Raises:
        ModelError: the model has no manifest, has changed since it was made, or an adapter is of another base.
        UsageError: a name or version that bundles cannot have, or a format no wheel runs.
    """
    if not NAME.fullmatch(request.name) or not VERSION.fullmatch(request.version):
        raise UsageError(
            f"a bundle cannot be called {request.name!r} {request.version!r}",
            "A name has small letters, digits, dots and dashes; a version has numbers with dots.",
        )
    artifact = open_artifact(request.model)
    adapters = {_adapter_name(path): open_artifact(path) for path in request.adapters}
    if len(adapters) != len(request.adapters):
        raise UsageError("two adapters have the same name", "Rename one of the files.")
    format_ = _format(artifact)
    warnings = _check_lineage(artifact, adapters)
    runtime = choose(format_, request.target, request.wheels) if request.with_wheels else Choice("auto")
    size = sum(_bytes(a.path) for a in (artifact, *adapters.values()))
    return Content(artifact, adapters, runtime, size, [*warnings, *runtime.warnings])


def _format(artifact: Artifact) -> str:
    if artifact.manifest:
        return artifact.manifest.format
    if artifact.path.is_file():
        return "litertlm" if artifact.path.suffix == ".litertlm" else "gguf"
    raise ModelError(f"{artifact.path} has no manifest", "Bundles are made of artifacts: edgeft export.")


def _adapter_name(path: Path) -> str:
    return path.stem.lower().replace(" ", "-")


def _bytes(path: Path) -> int:
    from edgeft.artifact import size_of

    return size_of(path)


def _check_lineage(artifact: Artifact, adapters: Mapping[str, Artifact]) -> list[str]:
    """Warnings; raises ModelError when a digest says that files do not belong together."""
    from edgeft.artifact import digest_of

    warnings = []
    if artifact.manifest is None:
        warnings.append(f"{artifact.path.name} has no manifest: nothing is known of where it comes from")
    elif digest_of(artifact.path) != artifact.manifest.sha256:
        raise ModelError(f"{artifact.path} has changed since it was made", "Export it again.")
    elif not artifact.manifest.licence:
        warnings.append(f"the licence of {artifact.path.name} is not known")
    for path in adapters.values():
        wanted = (path.manifest.base if path.manifest else {}).get("sha256")
        here = artifact.manifest.sha256 if artifact.manifest else digest_of(artifact.path)
        if wanted and wanted != here:
            raise ModelError(
                f"{path.path} was made for another base than {artifact.path}", "Pack it with its own base."
            )
    return warnings


def build(request: Request, out: Path, progress: Progress | None = None) -> Bundle:
    """Write the bundle's folder at `out`, atomically.

    Raises:
        UsageError: `out` exists. ModelError, WriteError, EdgeftError: as `plan`, and when wheels cannot be had.
    """
    if out.exists():
        raise UsageError(f"{out} exists", "Remove it, or choose another --out.")
    content, shown = plan(request), progress or Silent()
    try:
        with wheels.temporary_folder(out) as temporary:
            folder = Path(temporary) / out.name
            folder.mkdir()
            bundle = _fill(folder, request, content, shown)
            folder.replace(out)
            paths.sync_directory(out.parent)
    except OSError as error:
        raise WriteError.from_os_error(error, out) from error
    return bundle


def _fill(folder: Path, request: Request, content: Content, progress: Progress) -> Bundle:
    progress.start("Packing", content.model_bytes, "bytes")
    try:
        model = _copy_artifact(content.artifact, folder / "model", progress)
        adapters = {name: _copy_artifact(a, folder / "adapters", progress) for name, a in content.adapters.items()}
    finally:
        progress.finish()
    if request.with_wheels:
        progress.start("Fetching wheels", None)
        try:
            _add_wheels(folder / "wheels", request, content)
        finally:
            progress.finish()
    described = [wheels.describe(file) for file in sorted((folder / "wheels").glob("*.whl"))]
    artifacts = [content.artifact, *content.adapters.values()]
    sbom.write(folder, sbom.document(request.name, request.version, artifacts, described))
    _add_texts(folder, request, content)
    bundle = _describe(folder, request, content, model, adapters)
    (folder / MANIFEST).write_bytes(encode(bundle))
    if request.key is not None:
        signing.sign(folder, request.key)
    return bundle


def _copy_artifact(artifact: Artifact, into: Path, progress: Progress) -> str:
    """The artifact and its manifest; returns its path inside the bundle."""
    into.mkdir(exist_ok=True)
    place = into / artifact.path.name
    if artifact.path.is_dir():
        shutil.copytree(artifact.path, place)
    else:
        _link_or_copy(artifact.path, place)
    if manifest_path(artifact.path).is_file():
        shutil.copyfile(manifest_path(artifact.path), manifest_path(place))
    progress.advance(_bytes(place), artifact.path.name)
    return f"{into.name}/{place.name}"


def _link_or_copy(source: Path, place: Path) -> None:
    """A copy that shares its blocks where the file system can (FICLONE), else an ordinary one."""
    import fcntl

    clone = 0x40049409  # linux/fs.h: FICLONE
    with source.open("rb") as read, place.open("wb") as written:
        try:
            fcntl.ioctl(written.fileno(), clone, read.fileno())
            return
        except OSError:
            pass
        shutil.copyfileobj(read, written, 1 << 20)
        written.flush()
        os.fsync(written.fileno())


def _add_wheels(folder: Path, request: Request, content: Content) -> None:
    folder.mkdir()
    wheels.fetch(content.runtime.requirements, request.target, folder)
    for file in content.runtime.wheels:
        shutil.copyfile(file, folder / file.name)
    wheels.build_own(folder)


def _add_texts(folder: Path, request: Request, content: Content) -> None:
    script = _template("install.sh")
    (folder / "install.sh").write_text(script, encoding="utf-8")
    (folder / "install.sh").chmod(0o755)
    model = content.artifact.manifest
    values = {
        "name": request.name,
        "version": request.version,
        "device": request.target.device,
        "python": request.target.python,
        "architecture": request.target.architecture,
        "model": content.artifact.path.name,
        "licence": (model.licence if model else None) or "not known",
    }
    (folder / "README.txt").write_text(_template("README.txt").format(**values), encoding="utf-8")
    (folder / "systemd").mkdir()
    unit = folder / "systemd" / f"{request.name}.service"
    unit.write_text(service.for_user(request.name), encoding="utf-8")


def _template(name: str) -> str:
    return importlib.resources.files("edgeft.package").joinpath("templates", name).read_text(encoding="utf-8")


def _describe(folder: Path, request: Request, content: Content, model: str, adapters: Mapping[str, str]) -> Bundle:
    known = content.artifact.manifest
    lineage = {}
    if known:
        lineage = {"base": dict(known.base), "adapter": known.adapter, "target": known.target, "sha256": known.sha256}
    return Bundle(
        name=request.name,
        version=request.version,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        target=request.target,
        model=model,
        files=entries(folder),
        adapters=adapters,
        runtime=content.runtime.runtime,
        settings=request.settings,
        question=request.question,
        expected=request.expected,
        lineage=lineage,
        ledger=dict(known.ledger) if known else {},
        licence=known.licence if known else None,
        edgeft_version=__version__,
    )


def summary(bundle: Bundle) -> dict[str, Any]:
    """For people and for `--json`."""
    value = dataclasses.asdict(bundle)
    return {key: value[key] for key in ("name", "version", "created", "target", "model", "adapters", "runtime")} | {
        "id": bundle.id,
        "bytes": bundle.total_bytes,
        "files": len(bundle.files),
    }
