"""The store: a folder per alias, one for the hub, one for imports; a kill leaves nothing half-written in it.

models/
  .locks/                       one empty file per name that is being written
  smollm2-135m/                 an alias: its GGUF and edgeft.json (origin, digest, licence)
  imported/<name>-<digest>-rN/  Hugging Face directories made from GGUF files
  hub/                          huggingface_hub's own cache layout, so its downloads resume
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edgeft import config
from edgeft.errors import ModelError, Unreachable, WriteError
from edgeft.paths import models_dir, parse_json, sync_directory

SIDECAR = "edgeft.json"
"""What edgeft knows about a model folder: where it came from, digest, licence."""


def alias_dir(name: str) -> Path:
    return models_dir() / name


def hub_dir() -> Path:
    return models_dir() / "hub"


def imports_dir() -> Path:
    return models_dir() / "imported"


def refuse_when_offline(what: str) -> None:
    """Raises: Unreachable when the user has forbidden the network."""
    value = config.load()["models.offline"]
    if value.value:
        raise Unreachable(
            f"{what} is not on this machine, and models.offline (from {value.origin}) forbids fetching it",
            "Fetch it where the network is allowed: edgeft models pull.",
        )


def read_sidecar(folder: Path) -> dict[str, Any]:
    """What edgeft.json says, or {} when there is none. Raises: ModelError when it cannot be read."""
    file = folder / SIDECAR
    if not file.is_file():
        return {}
    try:
        content = parse_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} cannot be read: {error}", "Remove the model and fetch it again.") from error
    if not isinstance(content, dict):
        raise ModelError(f"{file} is not a JSON object", "Remove the model and fetch it again.")
    return content


@contextlib.contextmanager
def locked(name: str) -> Iterator[None]:
    """One process at a time works on `name`; the others wait, then find the work done."""
    folder = models_dir() / ".locks"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / name.replace("/", "--"), os.O_RDWR | os.O_CREAT)
    except OSError as error:
        raise WriteError.from_os_error(error, folder) from error
    try:
        _lock(handle)
        yield
    finally:
        os.close(handle)


def _lock(handle: int) -> None:
    try:
        import fcntl
    except ModuleNotFoundError:
        # Without POSIX locks two processes may do the same work; the atomic renames keep that harmless.
        return
    fcntl.flock(handle, fcntl.LOCK_EX)


def sweep(folder: Path, pattern: str) -> None:
    """Remove what a killed process left; only while holding the lock of what the pattern names."""
    for leftover in folder.glob(pattern):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path` that becomes `path` on success and vanishes otherwise.

    Raises:
        WriteError: when the place cannot be written, or `path` exists and is not empty.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    except OSError as error:
        raise WriteError.from_os_error(error, path) from error
    try:
        yield temporary
        for file in temporary.rglob("*"):
            _sync(file)
        temporary.chmod(0o777 & ~_umask())
        temporary.rename(path)
        sync_directory(path.parent)
    except OSError as error:
        raise WriteError.from_os_error(error, path) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _sync(file: Path) -> None:
    if file.is_file():
        with file.open("rb") as stream:
            os.fsync(stream.fileno())


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
