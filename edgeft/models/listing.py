"""What is in the store, and taking things out of it."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from edgeft.errors import UsageError, WriteError
from edgeft.models import packages
from edgeft.models.aliases import ALIASES, Alias
from edgeft.models.gguf_header import read_header
from edgeft.models.store import alias_dir, hub_dir, imports_dir, locked, read_sidecar


@dataclass(frozen=True)
class StoredModel:
    """One line of `edgeft models list`."""

    name: str
    """What `edgeft models rm` and, but for imports, every other command takes."""
    kind: str
    """alias, import or hub."""
    here: bool
    bytes: int
    bits_per_weight: float | None
    licence: str | None
    path: Path | None
    description: str = ""


def stored_models() -> list[StoredModel]:
    """Every alias, pulled or not, then what was imported or came from the hub."""
    return [*map(_alias, ALIASES.values()), *_imports(), *_hub()]


def _alias(alias: Alias) -> StoredModel:
    file = packages.pulled(alias)
    bits = round(read_header(file).bits_per_weight, 2) if file else None
    return StoredModel(alias.name, "alias", file is not None, alias.bytes, bits, alias.licence, file, alias.description)


def _imports() -> list[StoredModel]:
    return [
        StoredModel(
            folder.name,
            "import",
            True,
            size_on_disk(folder),
            16.0 if (folder / "model.safetensors").is_file() else None,
            read_sidecar(folder).get("licence"),
            folder,
        )
        for folder in _folders(imports_dir())
        if (folder / "config.json").is_file()
    ]


def _hub() -> list[StoredModel]:
    found = []
    for folder in _folders(hub_dir()):
        kind, *parts = folder.name.split("--")
        if kind == "models" and parts:
            found.append(StoredModel("hf:" + "/".join(parts), "hub", True, size_on_disk(folder), None, None, folder))
    return found


def _folders(parent: Path) -> list[Path]:
    if not parent.is_dir():
        return []
    return sorted(folder for folder in parent.iterdir() if folder.is_dir() and not folder.name.startswith("."))


def size_on_disk(path: Path) -> int:
    """Bytes of a file, or of all files below a folder; links are not followed, so shared files count once."""
    if path.is_file():
        return path.stat().st_size
    return sum(file.lstat().st_size for file in path.rglob("*") if file.is_file() and not file.is_symlink())


def find_stored(name: str) -> StoredModel:
    """Raises: UsageError when the store has nothing of that name."""
    for model in stored_models():
        if model.name == name and model.here:
            return model
    raise UsageError(f"the store has no model {name!r}", "edgeft models list shows what there is.")


def remove(model: StoredModel) -> None:
    """Delete a model from the store; the files of an alias can be pulled again.

    Raises:
        WriteError: when the store cannot be written.
    """
    assert model.path is not None
    folder = alias_dir(model.name) if model.kind == "alias" else model.path
    with locked(folder.name):
        try:
            shutil.rmtree(folder)
        except OSError as error:
            raise WriteError.from_os_error(error, folder) from error
