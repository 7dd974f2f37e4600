"""Unfinished files of exports that were killed: found by their name, told from running ones by a lock."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import IO


def claim(stream: IO[bytes]) -> None:
    """Lock a temporary file for as long as it is open; the system lets go of it however the process ends."""
    _lock(stream.fileno())


def remove_leftovers(out: Path) -> None:
    """Delete temporary files that an export to `out` left behind and nobody is writing now."""
    for file in out.parent.glob(f".{out.name}.*.tmp"):
        # Somebody else's file, or one that vanished meanwhile, is no reason not to export.
        with contextlib.suppress(OSError):
            handle = os.open(file, os.O_RDWR)
            try:
                if _lock(handle):
                    file.unlink()
            finally:
                os.close(handle)


def _lock(handle: int) -> bool:
    try:
        import fcntl
    except ImportError:  # Windows: an open file cannot be deleted there, which is the same protection
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
