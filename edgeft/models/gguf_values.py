"""Stored tensors of a GGUF as numbers, by gguf-py's numpy code: a reading of its own, not the runtime's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from edgeft.errors import ModelError, UnsupportedModel, require
from edgeft.models.gguf_header import TENSOR_TYPES, GgufHeader, TensorInfo

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

SLAB = 1 << 22
"""Weights that are widened at once: 16 MB of float32."""

_NUMBERS = {name: number for number, (name, _, _) in TENSOR_TYPES.items()}
_BLOCKS = {name: (weights, size) for name, weights, size in TENSOR_TYPES.values()}


def packed_rows(header: GgufHeader, info: TensorInfo) -> NDArray[np.uint8]:
    """The stored bytes, shape (rows, bytes per row), mapped from the file; all but the first dimension are rows."""
    import numpy as np

    weights, size = _BLOCKS[info.type]
    width = info.shape[0] // weights * size
    shape = (info.elements // info.shape[0], width)
    return np.memmap(header.path, np.uint8, "r", header.data_offset + info.offset, shape)


def slabs(header: GgufHeader, info: TensorInfo, size: int = SLAB) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """(first row, values (rows, columns)) of a tensor, at most about `size` values at once.

    Raises:
        UnsupportedModel: the installed gguf package cannot read the type.
    """
    packed = packed_rows(header, info)
    step = max(1, size // info.shape[0])
    for start in range(0, len(packed), step):
        yield start, _widened(packed[start : start + step], info)


def values(header: GgufHeader, info: TensorInfo) -> NDArray[np.float32]:
    """A whole tensor in row-major order: shape (rows, columns), or (columns,) of a vector.

    Raises: UnsupportedModel.
    """
    import numpy as np

    whole = np.empty(info.shape[::-1], np.float32)
    flat = whole.reshape(-1, info.shape[0])
    for start, part in slabs(header, info):
        flat[start : start + len(part)] = part
    return whole


def _widened(packed: NDArray[np.uint8], info: TensorInfo) -> NDArray[np.float32]:
    import numpy as np

    quants = require("gguf.quants", "export")
    kind = require("gguf", "export").GGMLQuantizationType(_NUMBERS[info.type])
    try:
        # Blocks that random bytes made can overflow; what comes out is looked at, not how.
        with np.errstate(all="ignore"):
            made = quants.dequantize(np.ascontiguousarray(packed), kind)
    except NotImplementedError as error:
        raise UnsupportedModel(f"weights of type {info.type} cannot be read: gguf has no numpy code for it") from error
    if made.shape[-1] != info.shape[0]:
        raise ModelError(f"tensor {info.name} came out with rows of {made.shape[-1]}, not {info.shape[0]}")
    result: NDArray[np.float32] = np.asarray(made, np.float32)
    return result
