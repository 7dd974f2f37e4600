"""Memory of this process, from the kernel's own books."""

from __future__ import annotations

import sys
from pathlib import Path

_STATUS = Path("/proc/self/status")


def status_bytes(field: str, status: Path = _STATUS) -> int | None:
    """A field of /proc/self/status in bytes: VmHWM, VmRSS, RssAnon; None where there is none."""
    if not status.is_file():
        return None
    lines = status.read_text(encoding="utf-8").splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), None)


def peak_bytes() -> int | None:
    """The most that was resident at once.

    On Linux not by getrusage: a child's `ru_maxrss` begins with that of the process it was forked from.
    """
    if sys.platform == "linux":
        return status_bytes("VmHWM")
    if sys.platform == "darwin":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return None
