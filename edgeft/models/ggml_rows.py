"""Stored rows of a GGUF as numbers, by ggml's own code: every type, exactly as llama.cpp reads it.

Works on addresses alone, so that it serves numpy and torch alike. ctypes lets go of the GIL during a call.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any

from edgeft.errors import MissingDependency, UnsupportedModel
from edgeft.models.ggml_library import ggml_library
from edgeft.openmp import short_spins

Rows = Callable[[int, int, int], None]
"""(address of the stored bytes, address of the values, number of values)."""


@cache
def to_float32(kind: str) -> Rows:
    """The function that makes float32 values of a quantized type's blocks.

    Args:
        kind: a type's name in `gguf_header.TENSOR_TYPES`.

    Raises:
        MissingDependency: no library with ggml is installed.
        UnsupportedModel: the library cannot read the type.
    """
    # ggml spells IQ4_XS as iq4_xs, but Q4_K as q4_K.
    name = kind.lower()
    return _function(f"dequantize_row_{name[:-1] + 'K' if kind.endswith('_K') else name}", kind)


@cache
def to_bfloat16() -> Rows:
    """The function that rounds float32 values to the nearest bfloat16 (ties to even)."""
    return _function("ggml_fp32_to_bf16_row", "BF16")


@cache
def library() -> Any:
    """The shared library with ggml. Raises: MissingDependency."""
    path = ggml_library()
    try:
        with short_spins():
            return ctypes.CDLL(str(path))
    except OSError as error:
        raise MissingDependency(
            f"{path} cannot be loaded: {error}", "pip install --force-reinstall 'edgeft[export]'"
        ) from error


def _function(name: str, kind: str) -> Rows:
    function = getattr(library(), name, None)
    if function is None:
        raise UnsupportedModel(f"weights of type {kind} cannot be read: the installed ggml has no {name}")
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    function.restype = None
    rows: Rows = function
    return rows
