"""Whether a build of ggml may use this processor's AMX tiles: some crash the process at the first prompt.

GCC's `_tile_loadconfig` told the optimizer that it reads 8 of the configuration's 64 bytes (GCC bug 114098, mended in
11.5, 12.4, 13.3 and 14). ggml keeps its configuration on the stack, the rest of it is optimized away, and the
processor faults (ggml-org/llama.cpp issue 20824, pull request 26954). Debian 12 compiles with 12.2.
"""

from __future__ import annotations

import functools
import mmap
import re
from pathlib import Path

_MENDED_IN = {11: 5, 12: 4, 13: 3}
"""GCC major -> the minor release that has the repair; older majors cannot compile ggml's AMX code."""


@functools.cache  # searching a library of 106 MB takes a quarter of a second
def crashes_on_amx(library: Path, cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether this processor has AMX and the ggml beside (or inside) `library` was compiled into that fault."""
    if not _has_amx(cpuinfo):
        return False
    cpu_part = library.with_name("libggml-cpu.so")
    with (cpu_part if cpu_part.is_file() else library).open("rb") as stream:
        content = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        try:
            return content.find(b"ggml_backend_amx_mul_mat") >= 0 and _miscompiled(content)
        finally:
            content.close()


def _has_amx(cpuinfo: Path) -> bool:
    if not cpuinfo.is_file():
        return False
    with cpuinfo.open(encoding="utf-8", errors="replace") as lines:
        return any("amx_tile" in line for line in lines if line.startswith("flags"))


def _miscompiled(content: mmap.mmap | bytes) -> bool:
    """Compilers sign the files they make: `GCC: (Debian 12.2.0-14+deb12u1) 12.2.0`."""
    signatures = re.findall(rb"GCC: \([^)]*\) (\d+)\.(\d+)", content)
    return any(int(minor) < _MENDED_IN.get(int(major), 0) for major, minor in signatures)
