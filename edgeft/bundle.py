"""Bundle: a model with everything it needs on a device; its manifest, and the checks before anything of it is used."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from edgeft.errors import ModelError
from edgeft.paths import sha256_file

MANIFEST = "bundle.json"
SIGNATURE = "bundle.json.sig"
SCHEMA = 1
_LARGEST_MANIFEST = 4 << 20
NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
VERSION = re.compile(r"\d+(\.\d+){0,3}")
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Target:
    """What a bundle was made for."""

    device: str
    """Name of a device profile."""
    architecture: str
    """As `uname -m` says: aarch64, x86_64."""
    python: str
    """Major and minor version of the Python on the device, such as 3.11."""
    glibc: str
    """Oldest C library that the wheels run on, such as 2.28."""


@dataclass(frozen=True)
class Entry:
    """One file of a bundle."""

    path: str
    """Relative, with forward slashes."""
    bytes: int
    sha256: str
    executable: bool = False


@dataclass(frozen=True)
class Bundle:
    """The content of bundle.json."""

    name: str
    version: str
    """Numbers with dots; a device refuses to go back without being told to."""
    created: str
    """UTC, ISO 8601."""
    target: Target
    model: str
    """Path of the artifact inside the bundle: a file or a folder."""
    files: tuple[Entry, ...]
    adapters: Mapping[str, str] = field(default_factory=dict)
    """Name -> path inside the bundle."""
    runtime: str = "auto"
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Values of `run.*` keys for the device."""
    question: str = "Say hello."
    """Asked after an installation; an answer is the sign of health."""
    expected: str | None = None
    """The beginning of the right answer, when there is one."""
    lineage: Mapping[str, Any] = field(default_factory=dict)
    """Base, data, adapter and their digests, from the artifact's manifest."""
    ledger: Mapping[str, float] = field(default_factory=dict)
    licence: str | None = None
    edgeft_version: str = ""
    schema: int = SCHEMA

    @property
    def id(self) -> str:
        """Version and a digest of the content: two different bundles never share an id."""
        return f"{self.version}-{digest(self)[:12]}"

    @property
    def total_bytes(self) -> int:
        return sum(entry.bytes for entry in self.files)


def encode(bundle: Bundle) -> bytes:
    """The very bytes that are written and signed."""
    return (json.dumps(dataclasses.asdict(bundle), indent=1, ensure_ascii=False, sort_keys=True) + "\n").encode()


def digest(bundle: Bundle) -> str:
    return hashlib.sha256(encode(bundle)).hexdigest()


def read_bundle(folder: Path) -> Bundle:
    """The manifest of the bundle in `folder`; its files are not looked at.

    Raises:
        ModelError: there is none, or it is malformed, of another schema, or names a path outside the bundle.
    """
    file = folder / MANIFEST
    try:
        if file.is_symlink() or file.stat().st_size > _LARGEST_MANIFEST:
            raise ModelError(f"{file} is not a bundle's manifest")
        return decode(file.read_bytes(), str(file))
    except OSError as error:
        raise ModelError(
            f"{folder} is not a bundle: {MANIFEST} cannot be read ({error.strerror})", "Make one: edgeft package MODEL."
        ) from error


def decode(content: bytes, where: str) -> Bundle:
    """Raises: ModelError naming the key that is wrong."""
    try:
        raw = json.loads(content)
        if raw.get("schema") != SCHEMA:
            raise ModelError(
                f"{where} has schema {raw.get('schema')!r}; this edgeft reads schema {SCHEMA}", "Update edgeft."
            )
        raw["target"] = Target(**raw["target"])
        raw["files"] = tuple(Entry(**entry) for entry in raw["files"])
        bundle = Bundle(**raw)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{where} is not a bundle's manifest: {error}") from error
    _check(bundle, where)
    return bundle


def _check(bundle: Bundle, where: str) -> None:
    for what, value, pattern in (("name", bundle.name, NAME), ("version", bundle.version, VERSION)):
        if not isinstance(value, str) or not pattern.fullmatch(value):
            raise ModelError(f"{where}: {what} {value!r} is not allowed")
    seen = set()
    for entry in bundle.files:
        safe_path(entry.path, where)
        if entry.path in seen or entry.path in (MANIFEST, SIGNATURE):
            raise ModelError(f"{where} lists {entry.path} twice")
        seen.add(entry.path)
        whole = isinstance(entry.bytes, int) and not isinstance(entry.bytes, bool) and entry.bytes >= 0
        if not whole or not isinstance(entry.sha256, str) or not _DIGEST.fullmatch(entry.sha256):
            raise ModelError(f"{where}: size or digest of {entry.path} is malformed")
    for path in (bundle.model, *bundle.adapters.values()):
        safe_path(path, where)
        if path not in seen and not any(name.startswith(f"{path}/") for name in seen):
            raise ModelError(f"{where} names {path}, which is not among its files")
    if not all(NAME.fullmatch(name) for name in bundle.adapters):
        raise ModelError(f"{where}: an adapter's name is not allowed")


def safe_path(path: object, where: str) -> PurePosixPath:
    """A relative path that stays inside its folder.

    Raises:
        ModelError: absolute, climbing, empty, or with characters that systems read in different ways.
    """
    parts = path.split("/") if isinstance(path, str) else []
    if not parts or any(part in ("", ".", "..") or "\\" in part or not part.isprintable() for part in parts):
        raise ModelError(f"{where} names {path!r}, which is not a path inside the bundle", "Do not use this bundle.")
    assert isinstance(path, str)
    return PurePosixPath(path)


def version_key(version: str) -> tuple[int, ...]:
    """Orders versions; 1.0 and 1 are equal."""
    numbers = [int(part) for part in version.split(".")]
    while len(numbers) > 1 and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def check_files(folder: Path, bundle: Bundle) -> None:
    """Every file is there, as listed, and nothing else is.

    Raises:
        ModelError: naming the first file that is missing, changed, additional, or a link.
    """
    listed = {entry.path: entry for entry in bundle.files}
    for path in sorted(_walk(folder)):
        if path not in listed and path not in (MANIFEST, SIGNATURE):
            raise ModelError(f"{folder} holds {path}, which {MANIFEST} does not list", "Do not use this bundle.")
    for entry in bundle.files:
        check_file(folder / entry.path, entry, str(folder))


def check_file(file: Path, entry: Entry, where: str) -> None:
    """Raises: ModelError when `file` is not exactly what the entry says."""
    try:
        found = os.lstat(file)
    except OSError:
        raise ModelError(f"{where} lacks {entry.path}", "Copy the bundle again.") from None
    if not stat.S_ISREG(found.st_mode):
        raise ModelError(f"{entry.path} in {where} is not an ordinary file", "Do not use this bundle.")
    if found.st_size != entry.bytes or sha256_file(file) != entry.sha256:
        raise ModelError(f"{entry.path} in {where} is not the file its manifest lists", "Copy the bundle again.")


def _walk(folder: Path) -> list[str]:
    """Relative paths of everything that is not a plain folder; links are not followed.

    Raises:
        ModelError: a symbolic link, a device or a socket is among them.
    """
    found = []
    for parent, folders, files in os.walk(folder, followlinks=False):
        for name in (*folders, *files):
            path = Path(parent) / name
            mode = os.lstat(path).st_mode
            relative = path.relative_to(folder).as_posix()
            if stat.S_ISDIR(mode):
                continue
            if not stat.S_ISREG(mode):
                raise ModelError(f"{relative} in {folder} is not an ordinary file", "Do not use this bundle.")
            found.append(relative)
    return found


def is_bundle(folder: Path) -> bool:
    return (folder / MANIFEST).is_file()


def entries(folder: Path) -> tuple[Entry, ...]:
    """The files of a folder that is becoming a bundle, in name order."""
    names = [name for name in sorted(_walk(folder)) if name not in (MANIFEST, SIGNATURE)]
    return tuple(
        Entry(
            name,
            (folder / name).stat().st_size,
            sha256_file(folder / name),
            bool((folder / name).stat().st_mode & stat.S_IXUSR),
        )
        for name in names
    )
