"""Opening a model: from what a user names to a loaded session on a runtime that can run it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeft import plugins
from edgeft.artifact import Artifact, manifest_path, open_artifact, read_manifest
from edgeft.bundle import is_bundle, read_bundle
from edgeft.errors import EdgeftError, MissingDependency, ModelError, PluginError, UsageError
from edgeft.models import resolve
from edgeft.overflow import overflow_choice
from edgeft.paths import states_dir
from edgeft.plugins import (
    AdapterScale,
    Capability,
    Choice,
    LoadOptions,
    Overflow,
    Runtime,
    Session,
    Support,
    capabilities,
    check_levers,
)
from edgeft.progress import Progress

AUTO = "auto"


@dataclass(frozen=True)
class Opened:
    """A loaded model, and what was chosen to load it."""

    session: Session
    artifact: Artifact
    runtime: str
    reason: str
    """Why this runtime."""
    adapters: tuple[AdapterScale, ...] = ()
    overflow: Overflow = "refuse"

    @property
    def choices(self) -> list[Choice]:
        """What it runs with and why, as far as the runtime can tell."""
        told = getattr(self.session, "choices", ())
        return [Choice("runtime", self.runtime, self.reason), *told, overflow_choice(self.overflow)]

    @property
    def system(self) -> str | None:
        """The system prompt of the training: of the adapters, when they agree on one, else of the model."""
        manifests = [read_manifest(adapter.path) for adapter in self.adapters]
        prompts = {manifest.system for manifest in manifests if manifest and manifest.system}
        if len(prompts) == 1:
            return prompts.pop()
        return self.artifact.manifest.system if self.artifact.manifest and not prompts else None


def load_options(values: Mapping[str, Any]) -> LoadOptions:
    """How the `run.*` settings, by their short names, say a model is loaded."""
    return LoadOptions(
        context=values["context"] or None,
        threads=values["threads"] or None,
        threads_batch=values["threads-batch"] or None,
        **levers(values),
        state=states_dir() if values["state"] == "on" else None,
    )


_SWITCH = {"auto": None, "on": True, "off": False}


def levers(values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that trade speed, memory and text, as arguments of `LoadOptions`."""
    return {
        "kv_type": None if values["kv-type"] == "auto" else values["kv-type"],
        **{name.replace("-", "_"): _SWITCH[values[name]] for name in ("lookup", "mmap", "repack", "flash-attention")},
        "overflow": values["overflow"],
    }


def open_session(
    reference: str,
    runtime: str = AUTO,
    options: LoadOptions | None = None,
    progress: Progress | None = None,
    *,
    adapters: Sequence[AdapterScale] = (),
    needs: Capability | None = None,
) -> Opened:
    """Load a model by reference, with adapters on it.

    Args:
        reference: anything `edgeft.models.resolve` understands that is, or was pulled as, a file a runtime runs.
        runtime: a runtime's name, or "auto": the first one that can run it.
        needs: what "auto" must find in a runtime besides.

    Raises:
        UsageError, ModelError: the model cannot be found or read, or an adapter belongs to another.
        MissingDependency: no runtime that could run it is installed.
    """
    artifact = find_artifact(reference, runtime, progress)
    if not adapters:
        adapters = _bundled_adapters(reference)
    if artifact.manifest and artifact.manifest.format == "adapter":
        raise UsageError(f"{reference} is an adapter", f"Give its base, and --adapter {reference}.")
    name, reason = choose(artifact, needs) if runtime == AUTO else (runtime, "asked for")
    plugin: Runtime = plugins.load("runtimes", name)
    with _border(name):
        support = plugin.supports(artifact)
    if not support.ok:
        raise _unsupported(name, support)
    options = options or LoadOptions()
    check_levers(plugin, options)
    with _border(name):
        session = plugin.load(artifact, options)
        if adapters:
            try:
                session.set_adapters(adapters)
            except BaseException:
                session.close()
                raise
    return Opened(session, artifact, name, reason, tuple(adapters), options.overflow)


def find_artifact(reference: str, runtime: str = AUTO, progress: Progress | None = None) -> Artifact:
    """The file behind a reference; a folder counts when it has a manifest.

    Which files are models is for the runtimes to say: one that somebody else wrote may read what edgeft does not.
    """
    if reference.startswith(("http://", "https://")):
        return Artifact(Path(reference.rpartition("#")[2]), address=reference)
    path = Path(reference).expanduser().absolute()
    if is_bundle(path):
        return open_artifact(path / read_bundle(path).model)
    if path.is_file() or (path.is_dir() and manifest_path(path).is_file()):
        return open_artifact(path)
    if runtime == "echo":
        return Artifact(path)
    found = resolve(reference, progress=progress)
    if runtime == "transformers" and found.kind in ("hf", "run"):
        return Artifact(found.path)
    if found.kind not in ("gguf", "onnx"):
        raise UsageError(
            f"{reference} is not a file a runtime can run",
            f"Make one first: edgeft export {reference} --to gguf-q4",
        )
    return open_artifact(found.path)


def _bundled_adapters(reference: str) -> list[AdapterScale]:
    """The adapter of a bundle that has one; where there are several, the user chooses."""
    path = Path(reference).expanduser().absolute()
    adapters = list(read_bundle(path).adapters.values()) if is_bundle(path) else []
    return [AdapterScale(path / adapters[0])] if len(adapters) == 1 else []


def choose(artifact: Artifact, needs: Capability | None = None) -> tuple[str, str]:
    """The first runtime that can run the artifact, and why.

    A binding compiled on this machine comes first: it uses instructions that a prebuilt wheel may not.

    Raises:
        MissingDependency: one could, if its package were installed.
        ModelError: none can.
    """
    refusals: list[tuple[str, Support]] = []
    for name in plugins.names("runtimes"):
        try:
            plugin: Runtime = plugins.load("runtimes", name)
            with _border(name):
                support = plugin.supports(artifact)
                if support.ok and needs is not None and needs not in capabilities(plugin):
                    support = Support(False, f"{name} has no {needs}: {getattr(plugin, 'lacks', {}).get(needs)}")
        except (MissingDependency, PluginError) as error:
            support = Support(False, error.message, error.hint)
        if support.ok:
            passed_over = ", ".join(other for other, _ in refusals)
            return name, f"first that can{f' (not {passed_over})' if passed_over else ''}"
        refusals.append((name, support))
    installable = next((support for _, support in reversed(refusals) if support.install), None)
    if installable:
        raise MissingDependency("no runtime for this model is installed", installable.install)
    raise ModelError(
        f"no runtime can run {artifact.path}: " + "; ".join(f"{name}: {support.reason}" for name, support in refusals)
    )


@contextlib.contextmanager
def _border(name: str) -> Iterator[None]:
    """Whatever a stranger's runtime raises becomes one typed message; faults of our own keep their traceback."""
    try:
        yield
    except EdgeftError:
        raise
    except Exception as error:
        if name in plugins.built_in_names("runtimes"):
            raise
        raise PluginError(f"the runtime {name!r} failed: {type(error).__name__}: {error}") from error


def _unsupported(name: str, support: Support) -> MissingDependency | ModelError:
    if support.install:
        return MissingDependency(support.reason, support.install)
    return ModelError(f"{name} cannot run this model: {support.reason}")
