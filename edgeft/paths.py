"""Where edgeft keeps things, and how files are written so that a kill leaves no half-written result."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from edgeft.errors import WriteError

_CHUNK = 1 << 20


def home() -> Path:
    """The user's edgeft folder: `EDGEFT_HOME`, or the platform's data folder."""
    override = os.environ.get("EDGEFT_HOME")
    if override:
        return Path(override).expanduser()
    import platformdirs

    return Path(platformdirs.user_data_dir("edgeft"))


def models_dir() -> Path:
    return home() / "models"


def states_dir() -> Path:
    """States of system prompts; whoever deletes it loses nothing but time."""
    return home() / "states"


def history_file() -> Path:
    return home() / "history.sqlite"


def user_config_file() -> Path:
    override = os.environ.get("EDGEFT_CONFIG_FILE")
    if override:
        return Path(override).expanduser()
    if os.environ.get("EDGEFT_HOME"):
        return home() / "config.toml"
    import platformdirs

    return Path(platformdirs.user_config_dir("edgeft")) / "config.toml"


@contextlib.contextmanager
def atomic_write(path: Path, mode: int = 0o666) -> Iterator[IO[bytes]]:
    """Open a temporary file beside `path`; on success fsync it and rename it over `path`, with `mode` less the umask.

    The temporary name starts with a dot and ends in `.tmp`, so no reader takes it for a result.

    Raises:
        WriteError: when the folder cannot be written or the disk is full.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    except OSError as error:
        raise WriteError.from_os_error(error, path) from error
    temporary = Path(name)
    try:
        with os.fdopen(handle, "w+b") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        # mkstemp makes files private; results are ordinary files.
        temporary.chmod(mode & ~_umask())
        temporary.replace(path)
        sync_directory(path.parent)
    except OSError as error:
        raise WriteError.from_os_error(error, path) from error
    finally:
        temporary.unlink(missing_ok=True)


def _umask() -> int:
    # There is no way to read the mask without setting it.
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def sync_directory(path: Path) -> None:
    """Make a rename inside `path` durable (POSIX: the directory itself must be synced)."""
    if os.name != "posix":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    with atomic_write(path) as stream:
        stream.write(text.encode())


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def parse_json(text: str | bytes, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """As `json.loads`, but nothing else than ValueError (which UnicodeDecodeError is) comes out of damaged text.

    Args:
        pairs: makes an object of its pairs, as `object_pairs_hook`.
    """
    try:
        return json.loads(text, object_pairs_hook=pairs)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_CHUNK):
            digest.update(block)
    return digest.hexdigest()
