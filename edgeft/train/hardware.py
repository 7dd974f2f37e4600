"""What this machine can do for training, and why."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Precision = Literal["bfloat16", "float32"]


@dataclass(frozen=True)
class Hardware:
    device: Literal["cpu", "cuda"]
    dtype: Precision
    reason: str
    available_bytes: int
    """Memory free for training: of the GPU, or what the kernel says programs can still get."""


def detect(device: str = "auto", dtype: str = "auto") -> Hardware:
    """Where training runs and in which precision.

    Args:
        device, dtype: "auto", or what the user insists on.
    """
    import psutil
    import torch

    if device == "cuda" or (device == "auto" and torch.cuda.is_available()):
        native, why = torch.cuda.is_bf16_supported(), torch.cuda.get_device_name()
        available, where = torch.cuda.mem_get_info()[0], "cuda"
    else:
        native, why = cpu_bfloat16()
        available, where = psutil.virtual_memory().available, "cpu"
    chosen = dtype if dtype != "auto" else "bfloat16" if native else "float32"
    reason = f"as asked; {why}" if dtype != "auto" else why
    return Hardware(
        "cuda" if where == "cuda" else "cpu",
        "bfloat16" if chosen == "bfloat16" else "float32",
        reason,
        available,
    )


def cpu_bfloat16(cpuinfo: Path = Path("/proc/cpuinfo")) -> tuple[bool, str]:
    """Whether the CPU multiplies bfloat16 in hardware, and how one can tell."""
    try:
        words = set(cpuinfo.read_text(encoding="utf-8").split())
    except OSError:
        return False, "no /proc/cpuinfo: bfloat16 support is unknown, float32 is safe"
    names = {"amx_bf16": "AMX", "avx512_bf16": "AVX-512", "bf16": "Arm"}
    for flag, name in names.items():
        if flag in words:
            return True, f"the CPU multiplies bfloat16 in hardware ({name})"
    return False, "the CPU has no bfloat16 instructions; emulating them would be slower than float32"


def matmul_rate(hardware: Hardware, rows: int, width: int, inner: int) -> float:
    """Floating-point operations per second of the model's typical matrix product, timed here for a moment."""
    import torch

    dtype = torch.bfloat16 if hardware.dtype == "bfloat16" else torch.float32
    left = torch.ones(rows, inner, dtype=dtype, device=hardware.device)
    right = torch.ones(width, inner, dtype=dtype, device=hardware.device)
    best = float("inf")
    deadline = time.perf_counter() + 0.3
    while time.perf_counter() < deadline or best == float("inf"):
        started = time.perf_counter()
        float((left @ right.t())[0, 0])  # reading a value waits for a GPU
        best = min(best, time.perf_counter() - started)
    return 2.0 * rows * width * inner / best


def keep_freed_memory() -> None:
    """Tell glibc's malloc not to hand large blocks back to the kernel between two layers.

    By default every tensor above 32 MB (and, adaptively, smaller ones) is mapped and zeroed page by page on each use,
    which costs a CPU training step about a tenth of its time. Other C libraries are left alone.
    """
    import ctypes

    try:
        libc = ctypes.CDLL("libc.so.6")
        mallopt = libc.mallopt
    except (OSError, AttributeError):
        return
    trim_threshold, mmap_threshold = -1, -3  # malloc.h
    mallopt(mmap_threshold, 1 << 25)
    mallopt(trim_threshold, (1 << 31) - 1)
