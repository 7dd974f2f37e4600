"""Keeps numpy's matrix products on the calling thread, for code that brings its own threads."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from pathlib import Path

_PREFIXES = ("scipy_openblas", "openblas")
_SUFFIXES = ("64_", "")


@contextlib.contextmanager
def single_threaded() -> Iterator[None]:
    """One thread per product inside; the old number again afterwards.

    Two pools on the same cores wait for each other: on two cores the low-rank products take three times as long.
    Only the OpenBLAS in numpy's wheels is known; another library is left as it is, which costs speed and nothing else.
    """
    library = _openblas()
    if library is None:
        yield
        return
    before = library[0]()
    library[1](1)
    try:
        yield
    finally:
        library[1](before)


def _openblas() -> tuple[Callable[[], int], Callable[[int], None]] | None:
    """(get, set) of the number of threads."""
    import numpy as np

    for path in sorted(Path(np.__file__).parent.with_name("numpy.libs").glob("*openblas*")):
        library = ctypes.CDLL(str(path))
        for prefix in _PREFIXES:
            for suffix in _SUFFIXES:
                get, put = (f"{prefix}_{verb}_num_threads{suffix}" for verb in ("get", "set"))
                if hasattr(library, put):
                    return getattr(library, get), getattr(library, put)
    return None
