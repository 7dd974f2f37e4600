"""A bundle on its way: checked before the first byte leaves, and cut into chunks with a digest each."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from edgeft.bundle import MANIFEST, SIGNATURE, Bundle, Entry, check_files, read_bundle
from edgeft.errors import ModelError
from edgeft.package import install, signing

CHUNK = 64 << 10
"""Bytes; a cut connection loses this times `WINDOW` at most."""
WINDOW = 4
"""Chunks on the way before the first of them must be confirmed."""


@dataclass(frozen=True)
class Parcel:
    """A bundle whose files are what its manifest lists."""

    folder: Path
    bundle: Bundle
    manifest: str
    signature: str | None
    _digests: dict[str, list[str]] = field(default_factory=dict, repr=False)

    def digests(self, entry: Entry) -> list[str]:
        """SHA-256 of each chunk of a file; read once, however many devices it goes to.

        Raises:
            ModelError: the file has changed since it was checked.
        """
        if entry.sha256 not in self._digests:
            whole, found = hashlib.sha256(), []
            for chunk in self.chunks(entry, 0):
                whole.update(chunk)
                found.append(hashlib.sha256(chunk).hexdigest())
            if whole.hexdigest() != entry.sha256:
                raise ModelError(f"{self.folder / entry.path} has changed since it was checked", "Package it again.")
            self._digests[entry.sha256] = found
        return self._digests[entry.sha256]

    def chunks(self, entry: Entry, start: int) -> Iterator[bytes]:
        """From chunk number `start` on."""
        with (self.folder / entry.path).open("rb") as stream:
            stream.seek(start * CHUNK)
            while chunk := stream.read(CHUNK):
                yield chunk

    def files(self) -> dict[str, Entry]:
        """Each content once, by its digest."""
        return {entry.sha256: entry for entry in self.bundle.files}

    def unpacked_bytes(self, entries: list[Entry]) -> int:
        """What the wheels among `entries` will take besides themselves."""
        wheels = [entry for entry in entries if entry.path.endswith(".whl")]
        return sum(install.unpacked_size(self.folder / entry.path) for entry in wheels)


def load(folder: Path, key: Path | None = None) -> Parcel:
    """The bundle in `folder`, checked whole.

    Raises:
        ModelError: damaged or tampered with. CheckFailed: not signed with `key`.
    """
    if key is not None:
        signing.verify(folder, key)
    bundle = read_bundle(folder)
    check_files(folder, bundle)
    signature = folder / SIGNATURE
    return Parcel(
        folder,
        bundle,
        (folder / MANIFEST).read_text(encoding="utf-8"),
        signature.read_text(encoding="utf-8") if signature.is_file() else None,
    )
