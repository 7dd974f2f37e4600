"""A file of a given size: the types of its tensors, chosen for the least expected loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from edgeft.errors import ModelError, UsageError
from edgeft.plugins import ConvertOptions

from .ggml import Ggml
from .gguf_fit import Request, Sensitivity, fit
from .gguf_items import Item, available_cores
from .gguf_writer import ALIGNMENT, padded
from .importance import EMBEDDING, HEAD, read_sensitivities
from .merge import MergedTensor

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]


def fit_to_size(items: Sequence[Item], overhead: int, options: ConvertOptions, ggml: Ggml) -> list[Item]:
    """The same tensors in the types that lose least for the size asked for.

    Args:
        overhead: bytes of the file besides tensors.

    Raises:
        UsageError: no size or importance matrix is given, or the size is too small.
        ModelError: the importance matrix is of another model.
    """
    budget, file = _budget(items, options), options.extra.get("imatrix")
    if file is None:
        raise UsageError(
            "choosing types takes what errors cost", "Give --imatrix FILE (edgeft imatrix) or --calibrate."
        )
    known = read_sensitivities(Path(file))
    requests = [_request(item, known) for item in items if item.name.endswith("weight") and item.type.name != "F32"]
    free = {request.name for request in requests}
    fixed = sum(padded(item.info.bytes) for item in items if item.name not in free)
    spare = len(requests) * ALIGNMENT
    chosen = fit(requests, budget - overhead - fixed - spare, ggml, options.threads or available_cores())
    return [replace(item, type=chosen[item.name].type, note="") if item.name in chosen else item for item in items]


def _budget(items: Sequence[Item], options: ConvertOptions) -> int:
    """Bytes of the file."""
    size, bits = options.extra.get("bytes"), options.extra.get("bits_per_weight")
    if size is not None:
        return int(size)
    if bits is None:
        raise UsageError("--to gguf takes a size", "Give --fit 90MB or --bpw 4.5.")
    return int(float(bits) * sum(item.weights for item in items) / 8)


def _request(item: Item, known: Mapping[str, list[tuple[Floats, Floats]]]) -> Request:
    names = (item.name, HEAD) if item.name == EMBEDDING else (item.name,)
    terms = [term for name in names for term in known.get(name, ())]
    if not isinstance(item.source, MergedTensor):
        raise UsageError(
            f"{item.name} holds experts; their types cannot be chosen yet", "Take a mixture: --to gguf-q4."
        )
    if not terms or any((len(rows), len(columns)) != item.shape for rows, columns in terms):
        raise ModelError(f"the importance matrix does not fit {item.name}", "It was made for another model.")
    order = item.source.order
    if order is not None:
        terms = [(rows[order], columns) for rows, columns in terms]
    return Request(item.name, item.source, Sensitivity(tuple(terms)), item.importance, item.row_group)
