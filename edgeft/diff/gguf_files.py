"""Two GGUF files: metadata, template, types, and every tensor's values, read by ggml's own code. No torch."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from edgeft.diff.report import Changed, TensorDifference
from edgeft.errors import UnsupportedModel
from edgeft.models import ggml_rows
from edgeft.models.gguf_header import GgufHeader, TensorInfo
from edgeft.models.gguf_values import packed_rows

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_TEMPLATE = "tokenizer.chat_template"
_SHOWN = 60
"""Characters of a long value that are shown."""

_SLAB = 1 << 22
"""Weights of each side that are widened at once."""

_PLAIN = {"F32": "<f4", "F16": "<f2", "F64": "<f8", "I8": "i1", "I16": "<i2", "I32": "<i4", "I64": "<i8"}


def metadata(a: GgufHeader, b: GgufHeader) -> Iterator[Changed]:
    """Keys whose values differ, in name order; the template is told by itself."""
    for key in sorted({*a.metadata, *b.metadata} - {_TEMPLATE}):
        left, right = a.metadata.get(key), b.metadata.get(key)
        if left != right:
            yield Changed(key, _brief(left), _brief(right))


def _brief(value: Any) -> Any:
    """A value as it can be shown: long lists by length and digest."""
    if isinstance(value, list) and len(value) > 8:
        digest = hashlib.sha256(repr(value).encode()).hexdigest()[:12]
        return f"{len(value)} values, SHA-256 {digest}…"
    if isinstance(value, str) and len(value) > _SHOWN:
        return value[:_SHOWN] + "…"
    return value


def template(a: str | None, b: str | None) -> str:
    if a is None and b is None:
        return "neither has one"
    if a is None or b is None:
        return "different"
    return "same" if a == b else "different"


def types(a: dict[str, int], b: dict[str, int]) -> Iterator[Changed]:
    """Types that hold another number of weights in one of them."""
    left, right = Counter(a), Counter(b)
    for kind in sorted({*left, *right}):
        if left[kind] != right[kind]:
            yield Changed(kind, left[kind], right[kind])


def tensors(a: GgufHeader, b: GgufHeader) -> Iterator[TensorDifference]:
    """Every tensor of either file, in the order of the first. Raises: MissingDependency, UnsupportedModel."""
    left, right = ({tensor.name: tensor for tensor in header.tensors} for header in (a, b))
    for name in [*left, *(name for name in right if name not in left)]:
        yield _tensor(a, b, left.get(name), right.get(name))


def _tensor(a: GgufHeader, b: GgufHeader, left: TensorInfo | None, right: TensorInfo | None) -> TensorDifference:
    known = left or right
    assert known is not None
    described: dict[str, Any] = {
        "name": known.name,
        "type_a": left and left.type,
        "type_b": right and right.type,
        "shape_a": left and left.shape[::-1],
        "shape_b": right and right.shape[::-1],
        "bytes_a": left.bytes if left else 0,
        "bytes_b": right.bytes if right else 0,
    }
    if left is None or right is None or left.shape != right.shape:
        return TensorDifference(**described, equal=False)
    if left.type == right.type and _same_bytes(a, b, left, right):
        return TensorDifference(**described, equal=True, relative_rms=0.0, largest=0.0)
    rms, largest = _distance(a, b, left, right)
    return TensorDifference(**described, equal=False, relative_rms=rms, largest=largest)


def _same_bytes(a: GgufHeader, b: GgufHeader, left: TensorInfo, right: TensorInfo) -> bool:
    import numpy as np

    one, other = packed_rows(a, left).reshape(-1), packed_rows(b, right).reshape(-1)
    step = 1 << 24
    return all(
        np.array_equal(one[at : at + step], other[at : at + step]) for at in range(0, max(len(one), len(other)), step)
    )


def _distance(a: GgufHeader, b: GgufHeader, left: TensorInfo, right: TensorInfo) -> tuple[float | None, float | None]:
    """(‖a - b‖ / ‖a‖, largest |a - b|); None for a tensor of zeros and for a type ggml cannot read."""
    import numpy as np

    squares, norm, largest = 0.0, 0.0, 0.0
    rows, step = left.elements // left.shape[0], max(1, _SLAB // left.shape[0])
    try:
        for start in range(0, rows, step):
            one = widened(packed_rows(a, left)[start : start + step], left)
            other = widened(packed_rows(b, right)[start : start + step], right)
            apart = one.astype(np.float64) - other
            squares += float(np.square(apart).sum())
            norm += float(np.square(one, dtype=np.float64).sum())
            largest = max(largest, float(np.abs(apart).max()))
    except UnsupportedModel:
        return None, None
    return (float(np.sqrt(squares / norm)) if norm else None), largest


def widened(packed: NDArray[np.uint8], info: TensorInfo) -> NDArray[np.float32]:
    """Stored rows as numbers (rows, columns). Raises: MissingDependency, UnsupportedModel."""
    import numpy as np

    packed = np.ascontiguousarray(packed)
    if info.type in _PLAIN:
        return packed.view(_PLAIN[info.type]).astype(np.float32)
    if info.type == "BF16":
        return (packed.view("<u2").astype(np.uint32) << 16).view(np.float32)
    made = np.empty((len(packed), info.shape[0]), np.float32)
    ggml_rows.to_float32(info.type)(packed.ctypes.data, made.ctypes.data, made.size)
    return made
