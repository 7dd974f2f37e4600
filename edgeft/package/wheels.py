"""The wheels a device needs: fetched for its processor and Python, never built there; and edgeft itself as a wheel."""

from __future__ import annotations

import base64
import email.parser
import hashlib
import importlib
import importlib.metadata
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from edgeft import __version__
from edgeft.bundle import Target, safe_path
from edgeft.errors import EdgeftError, ModelError, UsageError

_EXTRAS = {"gguf": "device", "adapter": "device", "onnx": "onnx"}
"""Format of the artifact -> the extra whose packages run it."""
_PACKAGES = ("edgeft", "edgeft.converters", "edgeft.runtimes", "edgeft.devices")
_GLIBCS = ("2.17", "2.28", "2.31", "2.34", "2.35", "2.36", "2.39", "2.41")
"""Versions that wheels are built for: PEP 600's `manylinux_2_x`, and what Debian and Ubuntu ship."""
_LEGACY = {"2.5": "manylinux1", "2.12": "manylinux2010", "2.17": "manylinux2014"}
PROJECT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class Wheel:
    """What a wheel's own metadata say."""

    file: Path
    name: str
    version: str
    licence: str | None


def requirements(format_: str) -> list[str]:
    """What runs artifacts of this format, pinned to the versions installed here: what was measured is what ships.

    Returns:
        Requirements such as "numpy==2.4.6"; without a pin for what is not installed here.

    Raises:
        UsageError: no package runs the format.
    """
    if format_ not in _EXTRAS:
        raise UsageError(f"no wheel runs artifacts of format {format_}", "Use --format assets for phones.")
    wanted = []
    for text in importlib.metadata.requires("edgeft") or []:
        requirement, _, marker = text.partition(";")
        extra = re.search(r"extra\s*==\s*['\"]([\w-]+)['\"]", marker)
        name = PROJECT.match(requirement.strip())
        if name and name[0] != "edgeft" and (extra is None or extra[1] == _EXTRAS[format_]):
            wanted.append(_pinned(name[0], requirement.strip()))
    return sorted(set(wanted))


def _pinned(name: str, requirement: str) -> str:
    try:
        return f"{name}=={importlib.metadata.version(name)}"
    except importlib.metadata.PackageNotFoundError:
        return requirement


def platforms(target: Target) -> list[str]:
    """The platform tags of wheels that run on the target, best first (PEP 600)."""
    newest = _number(target.glibc)
    tags = []
    for version in reversed([v for v in _GLIBCS if _number(v) <= newest]):
        tags.append(f"manylinux_{version.replace('.', '_')}_{target.architecture}")
        if version in _LEGACY:
            tags.append(f"{_LEGACY[version]}_{target.architecture}")
    if not tags:
        raise UsageError(f"no wheels are built for glibc {target.glibc}", "The oldest is 2.17.")
    return tags


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def fetch(wanted: Sequence[str], target: Target, folder: Path) -> None:
    """Download wheels for the target with pip, and all they need.

    Raises:
        EdgeftError: a package has no wheel for the target, or pip cannot reach its index.
    """
    digits = target.python.replace(".", "")
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--only-binary=:all:",
        "--dest", str(folder), "--implementation", "cp", "--python-version", target.python,
        *(f"--abi={abi}" for abi in (f"cp{digits}", "abi3", "none")),
        *(f"--platform={tag}" for tag in platforms(target)), *wanted,
    ]  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        said = [line for line in done.stdout.splitlines() if line.startswith("ERROR")] or done.stdout.splitlines()[-1:]
        raise EdgeftError(
            f"no wheels for {target.architecture}, Python {target.python}, glibc {target.glibc}: " + " ".join(said),
            "Try another --python, give a wheel of your own with --wheel, or leave wheels out: --no-wheels.",
        )


def build_own(folder: Path) -> Path:
    """edgeft as it is installed here, as a wheel; works for an editable installation too.

    The layout is PEP 427's. Files get the same date always, so equal code makes equal bytes.
    """
    version = __version__
    info = f"edgeft-{version}.dist-info"
    installed = importlib.metadata.distribution("edgeft")  # an egg-info where a checkout is the working folder
    metadata = (installed.read_text("METADATA") or installed.read_text("PKG-INFO") or "").encode()
    content = {f"{info}/METADATA": metadata, f"{info}/WHEEL": _WHEEL, f"{info}/entry_points.txt": _ENTRY_POINTS}
    for package in _PACKAGES:
        for place in importlib.import_module(package).__path__:
            for file in sorted(Path(place).rglob("*")):
                inside = file.relative_to(place)
                if file.is_file() and "__pycache__" not in inside.parts:
                    content[(PurePosixPath(*package.split(".")) / inside.as_posix()).as_posix()] = file.read_bytes()
    wheel = folder / f"edgeft-{version}-py3-none-any.whl"
    write_wheel(wheel, info, content)
    return wheel


def write_wheel(wheel: Path, info: str, content: Mapping[str, bytes]) -> None:
    """Files by their names in the wheel, with a RECORD of them in the folder `info`."""
    record = "".join(f"{name},{_record_digest(data)},{len(data)}\n" for name, data in sorted(content.items()))
    whole = {**content, f"{info}/RECORD": f"{record}{info}/RECORD,,\n".encode()}
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in sorted(whole.items()):
            archive.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), data, zipfile.ZIP_DEFLATED)


_WHEEL = b"Wheel-Version: 1.0\nGenerator: edgeft\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
_ENTRY_POINTS = b"[console_scripts]\nedgeft = edgeft.cli.main:entry\n"


def _record_digest(data: bytes) -> str:
    return "sha256=" + base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()


def describe(file: Path) -> Wheel:
    """Raises: ModelError when it is not a wheel."""
    try:
        with zipfile.ZipFile(file) as archive:
            name = next(n for n in archive.namelist() if n.count("/") == 1 and n.endswith(".dist-info/METADATA"))
            metadata = email.parser.BytesParser().parsebytes(archive.read(name))
    except (OSError, zipfile.BadZipFile, StopIteration) as error:
        raise ModelError(f"{file} is not a wheel: {error}") from error
    licence = metadata["License-Expression"] or metadata["License"]
    return Wheel(file, metadata["Name"], metadata["Version"], licence.splitlines()[0][:80] if licence else None)


def unpack(wheels: Sequence[Path], folder: Path) -> None:
    """Put the content of wheels side by side into `folder`, from where Python imports them.

    The modules of `….data/purelib` and `platlib` belong at the top (PEP 427); scripts and headers are left out, a
    device runs `python -m`.

    Raises:
        ModelError: a wheel is damaged or names a path outside the folder.
    """
    for wheel in wheels:
        try:
            with zipfile.ZipFile(wheel) as archive:
                for member in archive.infolist():
                    if not member.is_dir() and (place := _place(member.filename, wheel)) is not None:
                        _extract(archive, member, folder / place)
        except zipfile.BadZipFile as error:
            raise ModelError(f"{wheel.name} is damaged: {error}", "Copy the bundle again.") from error


def _place(name: str, wheel: Path) -> PurePosixPath | None:
    path = safe_path(name, wheel.name)
    if not path.parts[0].endswith(".data"):
        return path
    return PurePosixPath(*path.parts[2:]) if path.parts[1] in ("purelib", "platlib") else None


def _extract(archive: zipfile.ZipFile, member: zipfile.ZipInfo, place: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    with archive.open(member) as source, place.open("wb") as stream:
        while block := source.read(1 << 20):
            stream.write(block)
        stream.flush()
        os.fsync(stream.fileno())


def wheel_set(folder: Path) -> tuple[list[Path], str]:
    """The wheels in a folder and a digest of their names and sizes' content, which names the unpacked copy."""
    from edgeft.paths import sha256_file

    wheels = sorted(folder.glob("*.whl"))
    lines = "".join(f"{wheel.name} {sha256_file(wheel)}\n" for wheel in wheels)
    return wheels, hashlib.sha256(lines.encode()).hexdigest()


def temporary_folder(beside: Path) -> tempfile.TemporaryDirectory[str]:
    """A hidden folder on the same disk, for what is not finished."""
    beside.parent.mkdir(parents=True, exist_ok=True)
    return tempfile.TemporaryDirectory(prefix=f".{beside.name}.", suffix=".tmp", dir=beside.parent)
