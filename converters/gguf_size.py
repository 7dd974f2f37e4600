"""A file of a given size: the types of its tensors, chosen for the least expected loss."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgeft.errors import CheckFailed, ModelError, UsageError
from edgeft.plugins import ConvertOptions

from . import gguf_types
from .ggml import Ggml
from .gguf_fit import Choice, Part, Request, Sensitivity, allocate, least, measure
from .gguf_items import Item, available_cores
from .gguf_types import Shape
from .gguf_writer import ALIGNMENT, padded
from .importance import EMBEDDING, HEAD, Cost, read_sensitivities
from .merge import MergedTensor, Stack

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]


def fit_to_size(items: Sequence[Item], overhead: int, options: ConvertOptions, ggml: Ggml) -> list[Item]:
    """The same tensors in the types that lose least for the size asked for.

    Args:
        overhead: bytes of the file besides tensors.

    Raises:
        UsageError: no size or importance matrix is given.
        CheckFailed: no file of this model is so small; the message has the smallest size.
        ModelError: the importance matrix is of another model.
    """
    budget, file = _budget(items, overhead, options), options.extra.get("imatrix")
    if file is None:
        raise UsageError(
            "choosing types takes what errors cost", "Give --imatrix FILE (edgeft imatrix) or --calibrate."
        )
    known = read_sensitivities(Path(file))
    tied = all(item.name != HEAD for item in items)
    quantized = [item for item in items if gguf_types.quantizable(Shape(item.name, item.shape))]
    requests = [_request(item, known, tied) for item in quantized]
    free = {request.name for request in requests}
    taken = overhead + sum(padded(item.info.bytes) for item in items if item.name not in free)
    taken += len(requests) * ALIGNMENT
    choices = measure(requests, ggml, options.threads or available_cores())
    if (smallest := taken + least(choices)) > budget:
        raise _impossible(smallest, overhead, items, options)
    chosen = allocate(choices, budget - taken)
    importance = {request.name: _stacked(request) for request in requests}
    return [
        _stored_as(item, chosen[item.name], importance[item.name]) if item.name in chosen else item for item in items
    ]


def _stored_as(item: Item, choice: Choice, importance: Floats | None) -> Item:
    return replace(item, type=choice.type, note="", importance=importance if choice.weighted else None)


def _stacked(request: Request) -> Floats | None:
    """(columns,), or (experts, columns), as `Item` has it."""
    known = [part.importance for part in request.parts if part.importance is not None]
    return None if not known else known[0] if len(known) == 1 else np.stack(known)


def _budget(items: Sequence[Item], overhead: int, options: ConvertOptions) -> int:
    """Bytes of the file. Bits per weight are those of the tensors, as a plan reports them."""
    size, bits = options.extra.get("bytes"), options.extra.get("bits_per_weight")
    if size is not None:
        return int(size)
    if bits is None:
        raise UsageError("--to gguf takes a size", "Give --fit 90MB or --bpw 4.5.")
    return overhead + int(float(bits) * _weights(items) / 8)


def _weights(items: Sequence[Item]) -> int:
    return sum(item.weights for item in items if not isinstance(item.source, np.ndarray))


def _impossible(smallest: int, overhead: int, items: Sequence[Item], options: ConvertOptions) -> CheckFailed:
    if (size := options.extra.get("bytes")) is not None:
        limit = f"{math.ceil(smallest / 1e5) / 10:.1f}MB"
        return CheckFailed(
            f"no file of this model fits into {size / 1e6:.1f} MB: the smallest types make {smallest / 1e6:.1f} MB",
            f"--fit {limit} is the least; or take a smaller model.",
        )
    bits = math.ceil((smallest - overhead) * 800 / _weights(items)) / 100
    return CheckFailed(
        f"no file of this model has {options.extra['bits_per_weight']:g} bits per weight: the smallest types make "
        f"{bits:.2f}, {smallest / 1e6:.1f} MB",
        f"--bpw {bits:.2f} is the least; or take a smaller model.",
    )


def _request(item: Item, known: Mapping[str, Cost], tied: bool) -> Request:
    assert isinstance(item.source, MergedTensor | Stack)  # trained codes have a type already
    names = (item.name, HEAD) if tied and item.name == EMBEDDING else (item.name,)
    costs = [known[name] for name in names if name in known]
    sources = item.source.parts
    shape = (len(sources), item.rows // len(sources), item.columns)
    if not costs or any((*cost.rows.shape, cost.columns.shape[1]) != shape for cost in costs):
        raise ModelError(f"the importance matrix does not fit {item.name}", "It was made for another model.")
    parts = []
    for at, source in enumerate(sources):
        terms = tuple((_ordered(cost.rows[at], source), cost.columns[at]) for cost in costs)
        # An embedding that is also the head is a matrix only as the head.
        parts.append(Part(source, Sensitivity(terms), costs[-1].columns[at]))
    return Request(item.name, tuple(parts), item.row_group)


def _ordered(rows: Floats, source: MergedTensor) -> Floats:
    return rows if source.order is None else rows[source.order]
