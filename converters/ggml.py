"""ggml's own quantizers, called in the shared library that a llama.cpp binding brings along.

Both `llama-cpp-python` (`libggml-base`) and `xllamacpp` (its extension module) export them. `ctypes.CDLL` drops
the GIL during a call, so threads quantize in parallel.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from edgeft.errors import MissingDependency, ModelError
from edgeft.models.ggml_library import ggml_library
from edgeft.openmp import short_spins

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]
    Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class GgmlType:
    """How weights are stored: `block` weights share `bytes` bytes."""

    name: str
    id: int
    block: int
    bytes: int

    def row_bytes(self, columns: int) -> int:
        return columns // self.block * self.bytes

    @property
    def bits(self) -> float:
        return 8 * self.bytes / self.block


TYPES: Mapping[str, GgmlType] = {
    kind.name: kind
    for kind in (
        GgmlType("F32", 0, 1, 4),
        GgmlType("F16", 1, 1, 2),
        GgmlType("BF16", 30, 1, 2),
        GgmlType("Q4_0", 2, 32, 18),
        GgmlType("Q4_1", 3, 32, 20),
        GgmlType("Q5_0", 6, 32, 22),
        GgmlType("Q5_1", 7, 32, 24),
        GgmlType("Q8_0", 8, 32, 34),
        GgmlType("Q2_K", 10, 256, 84),
        GgmlType("Q3_K", 11, 256, 110),
        GgmlType("Q4_K", 12, 256, 144),
        GgmlType("Q5_K", 13, 256, 176),
        GgmlType("Q6_K", 14, 256, 210),
        GgmlType("IQ1_S", 19, 256, 50),
        GgmlType("IQ1_M", 29, 256, 56),
        GgmlType("IQ2_XXS", 16, 256, 66),
        GgmlType("IQ2_XS", 17, 256, 74),
        GgmlType("IQ2_S", 22, 256, 82),
        GgmlType("IQ3_XXS", 18, 256, 98),
        GgmlType("IQ3_S", 21, 256, 110),
        GgmlType("IQ4_NL", 20, 32, 18),
        GgmlType("IQ4_XS", 23, 256, 136),
        GgmlType("TQ1_0", 34, 256, 54),
        GgmlType("TQ2_0", 35, 256, 66),
        GgmlType("MXFP4", 39, 32, 17),
    )
}
"""Numbers and sizes from `ggml.h` and `ggml-common.h`; a library that disagrees is refused."""

_WEIGHTED = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS")
"""ggml aborts the process when these are quantized without an importance matrix."""

_SYMBOLS = (
    "ggml_quantize_chunk",
    "ggml_get_type_traits",
    "ggml_validate_row_data",
    "ggml_blck_size",
    "ggml_type_size",
    "ggml_type_name",
    "ggml_bf16_to_fp32_row",
    "ggml_fp16_to_fp32_row",
    "ggml_fp32_to_bf16_row_ref",
    "ggml_fp32_to_fp16_row",
)


class _Traits(ctypes.Structure):
    """The head of `struct ggml_type_traits` in `ggml.h`."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("block", ctypes.c_int64),
        ("interleave", ctypes.c_int64),
        ("bytes", ctypes.c_size_t),
        ("quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
    )


class Ggml:
    """The functions of one loaded library."""

    def __init__(self, path: Path) -> None:
        """Raises: MissingDependency when the library cannot be loaded or is not the ggml this code knows."""
        self.path = path
        try:
            # The same library may chat later in this process, and only its first loading decides.
            with short_spins():
                self._library = ctypes.CDLL(str(path))
        except OSError as error:
            raise MissingDependency(f"{path} cannot be loaded: {error}", _REINSTALL) from error
        self._declare()
        self._check()

    def _declare(self) -> None:
        library = self._library
        missing = [name for name in _SYMBOLS if not hasattr(library, name)]
        if missing:
            raise MissingDependency(f"{self.path} lacks {', '.join(missing)}", _REINSTALL)
        pointer, count, kind = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
        library.ggml_quantize_chunk.argtypes = [kind, pointer, pointer, count, count, count, pointer]
        library.ggml_quantize_chunk.restype = ctypes.c_size_t
        library.ggml_validate_row_data.argtypes = [kind, pointer, ctypes.c_size_t]
        library.ggml_validate_row_data.restype = ctypes.c_bool
        library.ggml_get_type_traits.argtypes = [kind]
        library.ggml_get_type_traits.restype = pointer
        library.ggml_blck_size.restype = count
        library.ggml_type_size.restype = ctypes.c_size_t
        library.ggml_type_name.restype = ctypes.c_char_p
        for name in _SYMBOLS[-4:]:
            getattr(library, name).argtypes = [pointer, pointer, count]
            getattr(library, name).restype = None

    def _check(self) -> None:
        """A library with other type numbers would write a file that loads and answers nonsense."""
        library = self._library
        for kind in TYPES.values():
            found = (library.ggml_type_name(kind.id), library.ggml_blck_size(kind.id), library.ggml_type_size(kind.id))
            expected = (kind.name.lower().encode(), kind.block, kind.bytes)
            if (found[0].lower(), *found[1:]) != expected:
                raise MissingDependency(f"{self.path} has {found} where edgeft expects {expected}", _REINSTALL)

    def quantize(self, kind: GgmlType, weights: Floats, importance: Floats | None = None) -> Bytes:
        """Quantize whole rows with ggml's reference code.

        Args:
            weights: (rows, columns), C-contiguous, finite. ggml aborts the process on a shape it cannot store, so
                that is checked here.
            importance: (columns,), mean squared input of each column, float32.

        Returns:
            The rows as they are stored in a file, shape (rows, bytes per row).

        Raises:
            ModelError: columns do not fill whole blocks, or a value is too large for the type.
        """
        import numpy as np

        rows, columns = weights.shape
        if columns % kind.block or not weights.flags.c_contiguous or weights.dtype != np.float32:
            raise ModelError(f"{columns} columns of {weights.dtype} cannot be stored as {kind.name}")
        if importance is None and kind.name in _WEIGHTED:
            raise ModelError(f"{kind.name} cannot be written without an importance matrix", "Give one with --imatrix.")
        if importance is not None and (importance.shape != (columns,) or importance.dtype != np.float32):
            raise ModelError(f"importance of shape {importance.shape} for {columns} columns")
        out = np.empty((rows, kind.row_bytes(columns)), np.uint8)
        self._fill(kind, weights, out, importance)
        if not self._library.ggml_validate_row_data(kind.id, out.ctypes.data, out.nbytes):
            raise ModelError(f"values too large for {kind.name}: a block's scale does not fit into 16 bits")
        return out

    def _fill(self, kind: GgmlType, weights: Floats, out: Bytes, importance: Floats | None = None) -> None:
        library = self._library
        if kind.name == "F32":
            out[:] = weights.view("u1")
        elif kind.name == "F16":
            library.ggml_fp32_to_fp16_row(weights.ctypes.data, out.ctypes.data, weights.size)
        elif kind.name == "BF16":
            library.ggml_fp32_to_bf16_row_ref(weights.ctypes.data, out.ctypes.data, weights.size)
        else:
            known = None if importance is None else importance.ctypes.data
            library.ggml_quantize_chunk(
                kind.id, weights.ctypes.data, out.ctypes.data, 0, weights.shape[0], weights.shape[1], known
            )

    def dequantize(self, kind: GgmlType, raw: Bytes, columns: int) -> Floats:
        """What a runtime makes of stored rows: (rows, bytes per row) -> (rows, columns)."""
        import numpy as np

        if kind.name == "F32":
            return raw.view(np.float32)
        out = np.empty((len(raw), columns), np.float32)
        traits = _Traits.from_address(self._library.ggml_get_type_traits(kind.id))
        traits.to_float(raw.ctypes.data, out.ctypes.data, out.size)
        return out

    def widen(self, dtype: str, raw: Bytes, out: Floats) -> None:
        """Convert stored BF16, F16 or F32 values to float32, exactly. Both arrays are C-contiguous."""
        if dtype == "F32":
            out.reshape(-1).view("u1")[:] = raw.reshape(-1)
        elif dtype == "BF16":
            self._library.ggml_bf16_to_fp32_row(raw.ctypes.data, out.ctypes.data, out.size)
        else:
            self._library.ggml_fp16_to_fp32_row(raw.ctypes.data, out.ctypes.data, out.size)

    def round_to(self, kind: GgmlType, weights: Floats) -> None:
        """Round to the nearest BF16 or F16 value (ties to even), in place."""
        import numpy as np

        narrow = np.empty((weights.shape[0], kind.row_bytes(weights.shape[1])), np.uint8)
        self._fill(kind, weights, narrow)
        self.widen(kind.name, narrow, weights)


_REINSTALL = "pip install --force-reinstall 'edgeft[export]'"


@cache
def load() -> Ggml:
    """The installed library, loaded once. Raises: MissingDependency."""
    return Ggml(ggml_library())
