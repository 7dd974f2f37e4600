"""Keys and values of a system prompt, kept on disk between sessions.

A file is a line of JSON (what the state belongs to, how long it is, its SHA-256) and then llama.cpp's own bytes. Those
are given to llama.cpp only after both were found right: it ends the process over some damaged states.

A state contains its prompt. Folder and files are readable by their owner alone, and there is no state unless
`LoadOptions.state` names a folder.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeft.chat import TokenIds
from edgeft.errors import WriteError
from edgeft.paths import atomic_write, parse_json

from .llama_api import Library

SHORTEST = 32
"""Tokens below which reading a file gains nothing that anyone notices: a tenth of a second on a Raspberry Pi 5."""
LARGEST = 256 * 2**20
"""Bytes that the folder may hold; the states that were not used for longest go first."""
_SUFFIX = ".state"
_FORMAT = 1
_SAMPLES, _SAMPLE = 16, 1 << 16


@dataclass(frozen=True)
class Found:
    """What there was for a prompt."""

    data: bytes | None
    note: str = ""
    """Why a file that was there is not used."""


class StateFolder:
    def __init__(self, path: Path, largest: int = LARGEST) -> None:
        self.path, self.largest = path, largest

    def file(self, identity: Mapping[str, Any]) -> Path:
        return self.path / f"{_digest(identity)[:32]}{_SUFFIX}"

    def find(self, identity: Mapping[str, Any]) -> Found:
        """The state that belongs to exactly this. Never raises: without one the prompt is computed."""
        file = self.file(identity)
        try:
            with file.open("rb") as stream:
                head = parse_json(stream.readline(1 << 16))
                if head["format"] != _FORMAT or head["identity"] != _digest(identity):
                    return Found(None, f"{file} belongs to another model or prompt: not used")
                data = stream.read(head["bytes"] + 1)
            if len(data) != head["bytes"] or hashlib.sha256(data).hexdigest() != head["sha256"]:
                return Found(None, f"{file} is damaged: not used, written anew")
            os.utime(file)  # the clock of `_make_room`
        except FileNotFoundError:
            return Found(None)
        except (OSError, ValueError, KeyError, TypeError) as error:
            return Found(None, f"{file} cannot be read ({error}): not used")
        return Found(data)

    def keep(self, identity: Mapping[str, Any], data: bytes) -> str:
        """Write a state; the reason when it was not written, "" when it was."""
        if len(data) > self.largest:
            return f"a state of {len(data) / 1e6:.0f} MB is more than {self.path} may hold: not kept"
        head = {"format": _FORMAT, "identity": _digest(identity), "bytes": len(data)}
        head["sha256"] = hashlib.sha256(data).hexdigest()
        try:
            self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._make_room(len(data))
            with atomic_write(self.file(identity), mode=0o600) as stream:
                stream.write(json.dumps(head).encode() + b"\n")
                stream.write(data)
        except (OSError, WriteError) as error:
            return f"the state of the system prompt was not kept: {error}"
        return ""

    def _make_room(self, wanted: int) -> None:
        files = [(entry.stat(), entry) for entry in self.path.glob(f"*{_SUFFIX}")]
        total = wanted + sum(stat.st_size for stat, _ in files)
        for stat, entry in sorted(files, key=lambda file: file[0].st_mtime_ns):
            if total <= self.largest:
                return
            entry.unlink(missing_ok=True)
            total -= stat.st_size


def fingerprint(file: Path) -> str:
    """Which file this is, without reading gigabytes at every start: size, time, and samples from all parts.

    The time alone would do on one machine; the samples tell files apart that a copy gave the same time.
    """
    about = file.stat()
    digest = hashlib.sha256(f"{about.st_size} {about.st_mtime_ns}".encode())
    with file.open("rb") as stream:
        for part in range(_SAMPLES):
            stream.seek(about.st_size * part // _SAMPLES)
            digest.update(stream.read(_SAMPLE))
    return digest.hexdigest()


def save(library: Library, context: int) -> bytes:
    """The keys and values of sequence 0."""
    room = ctypes.create_string_buffer(library.llama_state_seq_get_size(context, 0))
    size = library.llama_state_seq_get_data(context, room, len(room), 0)
    return room.raw[:size]


def restore(library: Library, context: int, data: bytes) -> bool:
    """Make the sequence what it was; False when llama.cpp refuses."""
    return bool(library.llama_state_seq_set_data(context, data, len(data), 0))


def common(first: TokenIds, second: TokenIds) -> TokenIds:
    """What both begin with."""
    pairs = zip(first, second, strict=False)
    whole = min(len(first), len(second))
    return first[: next((at for at, (mine, theirs) in enumerate(pairs) if mine != theirs), whole)]


def _digest(identity: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
