"""How long the threads of llama.cpp and torch spin while they wait for each other.

GCC's OpenMP (libgomp) spins 300,000 times at a barrier before it sleeps. A spin is one PAUSE instruction, and since
Skylake Intel's takes 140 cycles instead of 10 (Intel 64 and IA-32 Architectures Optimization Reference Manual, "Pause
latency in Skylake"): 14 ms of a core doing nothing while the thread that is waited for may have none. With as many
other busy programs as cores, two threads decoded SmolLM2-135M at 0.3 to 1.6 tokens/s and one thread at 17. A thousand
spins cost nothing on a quiet machine (10.6 against 10.7 ms per token) and give 12 tokens/s on the busy one; at 300
a quiet machine loses a third, and OMP_WAIT_POLICY=passive more than half.

Training in torch has the same trouble on a busy machine (two busy programs made a step seven times as long), but also
longer gaps between its threads' work: a step of 512 tokens reached 450 tokens/s with 1,000 spins, 644 with 10,000 and
678 with 30,000.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

DECODING, TRAINING = 1_000, 10_000
"""Spins; twenty take about a microsecond."""
_VARIABLE = "GOMP_SPINCOUNT"


@contextlib.contextmanager
def short_spins(spins: int = DECODING, cpuinfo: Path = Path("/proc/cpuinfo")) -> Iterator[None]:
    """Around the loading of a library that uses libgomp, which reads its environment when it is loaded.

    Does nothing on processors whose spins are short, or when the user has set how to wait.
    """
    if _VARIABLE in os.environ or "OMP_WAIT_POLICY" in os.environ or not _pauses_long(cpuinfo):
        yield
        return
    os.environ[_VARIABLE] = str(spins)
    try:
        yield
    finally:
        del os.environ[_VARIABLE]


def _pauses_long(cpuinfo: Path) -> bool:
    """Intel's processors since Skylake, the first with CLFLUSHOPT."""
    if not cpuinfo.is_file():
        return False
    text = cpuinfo.read_text(encoding="utf-8", errors="replace").partition("\n\n")[0]
    return "GenuineIntel" in text and "clflushopt" in text
