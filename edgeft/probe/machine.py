"""What the system says of the machine: processor, cores, instruction sets, memory, C library."""

from __future__ import annotations

import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path

ISA = (
    "avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "amx_bf16",
    "asimd", "asimddp", "i8mm", "bf16", "sve", "sve2", "sme",
)  # fmt: skip
"""Instruction sets that inference kernels are written for, as Linux' cpuinfo names them."""


@dataclass(frozen=True)
class Machine:
    cpu: str
    architecture: str
    cores: int
    """Logical cores this process may use."""
    isa: tuple[str, ...]
    memory: int
    """Bytes this process may take at most: RAM, or the limit of its container."""
    in_use: int
    """Bytes of it that are taken now."""
    system: str
    python: str
    glibc: str


def machine(proc: Path = Path("/proc"), group: Path = Path("/sys/fs/cgroup")) -> Machine:
    cpuinfo = _read(proc / "cpuinfo")
    memory, in_use = _memory(_read(proc / "meminfo"), _read(group / "memory.max").strip())
    libc, version = platform.libc_ver()
    return Machine(
        cpu=_cpu(cpuinfo),
        architecture=platform.machine(),
        cores=len(os.sched_getaffinity(0)) if sys.platform == "linux" else (os.cpu_count() or 1),
        isa=_isa(cpuinfo),
        memory=memory,
        in_use=in_use,
        system=_system(),
        python=f"{sys.version_info.major}.{sys.version_info.minor}",
        glibc=version if libc == "glibc" else "",
    )


def _cpu(cpuinfo: str) -> str:
    """A board's name, since ARM's cpuinfo has none of the processor; elsewhere the processor's."""
    board = _read(Path("/proc/device-tree/model")).strip("\0 \n")
    return board or _field(cpuinfo, "model name") or platform.processor() or platform.machine()


def _isa(cpuinfo: str) -> tuple[str, ...]:
    flags = set((_field(cpuinfo, "flags") or _field(cpuinfo, "Features")).split())
    return tuple(name for name in ISA if name in flags)


def _field(text: str, key: str) -> str:
    lines = (line.partition(":") for line in text.splitlines())
    return next((value.strip() for name, _, value in lines if name.strip() == key), "")


def _memory(meminfo: str, limit: str) -> tuple[int, int]:
    fields = {
        key: int(value.split()[0]) * 1024 for key, _, value in (line.partition(":") for line in meminfo.splitlines())
    }
    if not fields:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return total, total // 4
    total, free = fields["MemTotal"], fields.get("MemAvailable", fields["MemTotal"] // 2)
    return min(total, int(limit)) if limit.isdecimal() else total, total - free


def _system() -> str:
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        return platform.platform(terse=True)


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
