"""Whether a build of ggml may use this processor's AMX tiles: some crash the process at the first prompt.

GCC's `_tile_loadconfig` told the optimizer that it reads 8 of the configuration's 64 bytes (GCC bug 114098, mended in
11.5, 12.4, 13.3 and 14). ggml keeps its configuration on the stack, the rest of it is optimized away, and the
processor faults (ggml-org/llama.cpp issue 20824, pull request 26954). Debian 12 compiles with 12.2.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path

_MENDED_IN = {11: 5, 12: 4, 13: 3}
"""GCC major -> the minor release that has the repair; older majors cannot compile ggml's AMX code."""

_BLOCK, _OVERLAP = 1 << 22, 128


@functools.cache  # searching a library of 106 MB takes a quarter of a second
def crashes_on_amx(library: Path, cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether this processor has AMX and the ggml beside (or inside) `library` was compiled into that fault."""
    if not _has_amx(cpuinfo):
        return False
    cpu_part = library.with_name("libggml-cpu.so")
    used, compilers = _scan(cpu_part if cpu_part.is_file() else library)
    return used and any(int(minor) < _MENDED_IN.get(int(major), 0) for major, minor in compilers)


def _has_amx(cpuinfo: Path) -> bool:
    if not cpuinfo.is_file():
        return False
    with cpuinfo.open(encoding="utf-8", errors="replace") as lines:
        return any("amx_tile" in line for line in lines if line.startswith("flags"))


def _scan(library: Path) -> tuple[bool, set[tuple[bytes, bytes]]]:
    """Whether the AMX code is in it, and the versions of the compilers.

    These sign the files they make: `GCC: (Debian 12.2.0-14+deb12u1) 12.2.0`. Read block by block: mapped as a whole,
    the library would count as memory of this process.
    """
    used, compilers, rest = False, set(), b""
    with library.open("rb") as stream:
        while block := stream.read(_BLOCK):
            text = rest + block
            used = used or b"ggml_backend_amx_mul_mat" in text
            compilers |= set(re.findall(rb"GCC: \([^)]{,60}\) (\d+)\.(\d+)\.", text))
            rest = text[-_OVERLAP:]
    return used, compilers
