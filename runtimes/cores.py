"""How many threads: decoding is bound by memory and wants physical cores, the prompt wants all of them."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def available_cores() -> int:
    """Logical cores this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else (os.cpu_count() or 1)


def physical_cores(topology: Path = Path("/sys/devices/system/cpu")) -> int:
    """Physical cores behind the logical ones this process may use; all logical ones where that cannot be told."""
    if sys.platform != "linux":
        return available_cores()
    siblings = {
        file.read_text().strip()
        for cpu in os.sched_getaffinity(0)
        if (file := topology / f"cpu{cpu}" / "topology" / "thread_siblings_list").is_file()
    }
    return len(siblings) or available_cores()
