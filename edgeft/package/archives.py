"""Bundles as one file: writing archives that are equal when their content is, and reading them without trust."""

from __future__ import annotations

import contextlib
import io
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from edgeft.bundle import MANIFEST, SIGNATURE, Bundle, decode, safe_path
from edgeft.errors import ModelError, require
from edgeft.paths import atomic_write

_LARGEST_TEXT = 4 << 20


def add(archive: tarfile.TarFile, folder: Path, prefix: str = "") -> None:
    """Everything below `folder`, in name order, without owners and dates; the manifest first."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))
    for name in sorted(names, key=lambda n: (n not in (MANIFEST, SIGNATURE), n)):
        path = folder / name
        if path.is_dir():
            add_folder(archive, prefix + name)
        else:
            with path.open("rb") as stream:
                info = _entry(prefix + name, 0o755 if path.stat().st_mode & 0o100 else 0o644)
                info.size = path.stat().st_size
                archive.addfile(info, stream)


def add_folder(archive: tarfile.TarFile, name: str) -> None:
    info = _entry(name, 0o755)
    info.type = tarfile.DIRTYPE
    archive.addfile(info)


def add_text(archive: tarfile.TarFile, name: str, text: str, mode: int = 0o644) -> None:
    info = _entry(name, mode)
    info.size = len(text.encode())
    archive.addfile(info, io.BytesIO(text.encode()))


def _entry(name: str, mode: int) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.mode, info.mtime, info.uid, info.gid = mode, 0, 0, 0
    return info


def write_tar_zst(folder: Path, out: Path) -> None:
    """Raises: WriteError, MissingDependency."""
    zstandard = require("zstandard", "deploy")
    # Quantized weights hardly shrink; wheels are compressed already. Level 3 is a third of the time of higher ones.
    with (
        atomic_write(out) as raw,
        zstandard.ZstdCompressor(level=3, threads=-1).stream_writer(raw, closefd=False) as packed,
        tarfile.open(fileobj=packed, mode="w|", format=tarfile.PAX_FORMAT) as archive,
    ):
        add(archive, folder)


@contextlib.contextmanager
def reading(file: Path) -> Iterator[tarfile.TarFile]:
    """A `.tar.zst` or `.tar` as a stream. Raises: ModelError when it is neither."""
    with file.open("rb") as raw:
        try:
            with contextlib.ExitStack() as stack:
                source: IO[bytes] = raw
                if raw.read(4) == b"\x28\xb5\x2f\xfd":
                    raw.seek(0)
                    zstandard: Any = require("zstandard", "deploy")
                    # 128 MB of window at most: an archive cannot ask for all of a small device's memory.
                    unpacker = zstandard.ZstdDecompressor(max_window_size=1 << 27)
                    source = stack.enter_context(unpacker.stream_reader(raw))
                else:
                    raw.seek(0)
                yield stack.enter_context(tarfile.open(fileobj=source, mode="r|"))
        except (tarfile.TarError, EOFError) as error:
            raise ModelError(f"{file} is not a bundle: {error}", "Copy it again.") from error
        except Exception as error:
            if type(error).__module__.startswith("zstandard"):
                raise ModelError(f"{file} is damaged: {error}", "Copy it again.") from error
            raise


def unpack(file: Path, folder: Path) -> Bundle:
    """Write an archive's files below `folder`: exactly those that its manifest, which comes first, lists.

    Raises:
        ModelError: another first entry, a link or device, a path outside, a file that is not listed or too long.
    """
    with reading(file) as archive:
        first = archive.next()
        if first is None or first.name != MANIFEST or not first.isreg() or first.size > _LARGEST_TEXT:
            raise ModelError(f"{file} is not a bundle: it does not begin with {MANIFEST}", "Make one: edgeft package.")
        content = _read(archive, first)
        bundle = decode(content, str(file))
        (folder / MANIFEST).write_bytes(content)
        allowed = {entry.path: entry for entry in bundle.files}
        for member in archive:
            if member is first:
                continue
            safe_path(member.name, str(file))
            if member.isdir():
                continue
            if not member.isreg():
                raise ModelError(f"{member.name} in {file} is not an ordinary file", "Do not use this bundle.")
            if member.name == SIGNATURE and member.size <= 4096:
                (folder / SIGNATURE).write_bytes(_read(archive, member))
                continue
            entry = allowed.pop(member.name, None)
            if entry is None or member.size != entry.bytes:
                raise ModelError(f"{member.name} in {file} is not what {MANIFEST} lists", "Do not use this bundle.")
            _write(archive, member, folder / entry.path, entry.executable)
    return bundle


def _read(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    stream = archive.extractfile(member)
    assert stream is not None
    return stream.read()


def _write(archive: tarfile.TarFile, member: tarfile.TarInfo, place: Path, executable: bool) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    source = archive.extractfile(member)
    assert source is not None
    with place.open("xb") as stream:
        while block := source.read(1 << 20):
            stream.write(block)
    if executable:
        place.chmod(0o755)
