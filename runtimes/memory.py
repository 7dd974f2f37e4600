"""How much memory is left: llama.cpp clears a context's cache at once, and what does not fit ends the process."""

from __future__ import annotations

from pathlib import Path


def available_bytes(meminfo: Path = Path("/proc/meminfo"), group: Path = Path("/sys/fs/cgroup")) -> int | None:
    """What could still be allocated, within the limit of a container (control group); None where that is unknown."""
    found = [int(line.split()[1]) * 1024 for line in _read(meminfo).splitlines() if line.startswith("MemAvailable:")]
    limit, used = _read(group / "memory.max").strip(), _read(group / "memory.current").strip()
    if limit.isdecimal() and used.isdecimal():
        found.append(int(limit) - int(used))
    return min(found, default=None)


def _read(file: Path) -> str:
    return file.read_text(encoding="utf-8") if file.is_file() else ""
