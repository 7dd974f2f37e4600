"""Work on rows of matrices in parts that stay in a core's cache, on as many threads as torch uses."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch
from torch import Tensor

_SLAB = 1 << 16
"""Weights that a thread takes at once: 256 kB of float32 there and back stay in a core's cache."""

_LOCAL = threading.local()

Part = tuple[Tensor, Tensor, Tensor | None]
"""Weights, where their values go, and what each block's scale is multiplied by; see `edgeft.train.grids.Grid`."""


def in_slabs(matrices: Sequence[Tensor], work: Callable[[int, int, int], None], size: int = _SLAB) -> None:
    """Call `work(which, first row, end)` for all slabs of `size` weights of all matrices."""
    spans = []
    for which, weights in enumerate(matrices):
        assert weights.is_contiguous() and weights.dtype == torch.float32
        step = max(1, size // weights.shape[1])
        spans += [(which, start, min(start + step, len(weights))) for start in range(0, len(weights), step)]
    threads = min(torch.get_num_threads(), len(spans))
    if threads < 2:
        for span in spans:
            work(*span)
        return

    def share(first: int) -> None:
        for span in spans[first::threads]:
            work(*span)

    list(_pool(threads).map(share, range(threads)))


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="edgeft-quantize")


def address(tensor: Tensor, row: int) -> int:
    return int(tensor.data_ptr() + row * tensor.stride(0) * tensor.element_size())


def scratch(*sizes: int) -> list[Tensor]:
    """This thread's buffers of at least so many bytes."""
    held = getattr(_LOCAL, "held", None)
    if held is None or any(buffer.numel() < size for buffer, size in zip(held, sizes, strict=True)):
        held = _LOCAL.held = [torch.empty(size, dtype=torch.uint8) for size in sizes]
    return list(held)
