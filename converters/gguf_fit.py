"""Types of all tensors for a given size: the ones with the least expected loss.

Storing W as W + D moves the model's answers by about

    KL = 1/2 * sum over ij of G_i X_j D_ij^2        (nats per token)

with X_j the mean squared input of column j and G_i the mean squared gradient of row i's output, of the log-probability
of a next token drawn from the model itself. That is the Fisher information with its two factors taken as diagonal
(Martens & Grosse 2015, arXiv 1503.05671, section 3); errors of different tensors add up. D is measured: a sample of
rows goes through ggml's quantizer and back. Bytes are then spent where a byte buys the most.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .ggml import TYPES, Ggml, GgmlType
from .safetensors_rows import Reader

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .merge import LoadedTensor, MergedTensor

    Floats = NDArray[np.float32]

KINDS = ("Q2_K", "Q3_K", "IQ4_XS", "IQ4_NL", "Q4_0", "Q4_K", "Q4_1", "Q5_0", "Q5_K", "Q5_1", "Q6_K", "Q8_0")
"""With fast kernels on every CPU that llama.cpp knows, and none that needs an importance matrix."""

SAMPLE_WEIGHTS = 1 << 14
"""Weights per tensor whose error is measured; the error of their mean is a few percent."""


@dataclass(frozen=True)
class Sensitivity:
    """How much an error in one tensor costs: sum over terms of rows_i * columns_j * error_ij^2, in nats."""

    terms: tuple[tuple[Floats, Floats], ...]
    """(rows,) and (columns,) each. A tied embedding has two terms: as embedding and as head."""

    def loss(self, errors: Floats, rows: NDArray[np.intp]) -> float:
        """Expected KL of errors that are known of some rows, (sampled rows, columns), for all.

        A ratio estimate: the rows' mean error, weighted as they matter, times how much all rows matter. Figures of rows
        differ by orders of magnitude; errors hardly do.
        """
        squares = np.square(errors, dtype=np.float64)
        return 0.5 * sum(_mean(squares @ right, left[rows]) * float(left.sum()) for left, right in self.terms)


def _mean(values: NDArray[np.float64], weights: Floats) -> float:
    """Weighted; the plain mean when no weight counts, as of tokens that calibration never met."""
    return float(np.average(values, weights=weights if weights.any() else None))


@dataclass(frozen=True)
class Choice:
    """One type for one tensor."""

    type: GgmlType
    bytes: int
    loss: float
    """Expected KL, nats per token."""
    weighted: bool = False
    """Whether the importance matrix weighs errors as the tensor is quantized."""


@dataclass(frozen=True)
class Part:
    """One matrix: a whole tensor, or one expert of a stacked one."""

    source: MergedTensor
    sensitivity: Sensitivity
    importance: Floats | None
    """Mean squared input of every column, (columns,)."""


@dataclass(frozen=True)
class Request:
    """One tensor to choose a type for; stacked experts share theirs."""

    name: str
    parts: tuple[Part, ...]
    group: int = 1
    """Rows that must be read together."""


def measure(requests: Sequence[Request], ggml: Ggml, threads: int) -> dict[str, list[Choice]]:
    """Every type worth considering for every tensor, from small to large.

    Raises:
        ModelError: a weight is damaged.
    """
    found: dict[str, list[Choice]] = {}
    under_way: deque[tuple[str, Future[list[Choice]]]] = deque()
    with Reader() as reader, ThreadPoolExecutor(threads) as pool:
        for request in requests:
            # Files are opened by one thread: here, not in the pool.
            loaded = [part.source.load(reader, ggml) for part in request.parts]
            under_way.append((request.name, pool.submit(choices_of, request, loaded, ggml)))
            if len(under_way) > threads:
                name, done = under_way.popleft()
                found[name] = done.result()
        found |= {name: done.result() for name, done in under_way}
    return found


def choices_of(request: Request, loaded: Sequence[LoadedTensor], ggml: Ggml) -> list[Choice]:
    """The types that fit the rows; what takes more bytes and loses more is left out."""
    rows, columns = request.parts[0].source.shape
    total: dict[tuple[GgmlType, bool], float] = {}
    for part, tensor in zip(request.parts, loaded, strict=True):
        sample = _sample(rows, columns * len(request.parts), request.group)
        starts = sample[:: request.group]
        weights = np.concatenate([tensor.rows(int(row), int(row) + request.group).copy() for row in starts])
        for way, errors in _errors(weights, part.importance, ggml):
            total[way] = total.get(way, 0.0) + part.sensitivity.loss(errors, sample)
    stored = rows * len(request.parts)
    found = [Choice(kind, stored * kind.row_bytes(columns), loss, way) for (kind, way), loss in total.items()]
    return list(_frontier(found)) or [Choice(TYPES["F16"], stored * columns * 2, 0.0)]


def _sample(rows: int, cost: int, group: int) -> NDArray[np.intp]:
    """Some rows, in whole groups, ascending: about `SAMPLE_WEIGHTS` weights when each row costs `cost`."""
    groups = np.random.default_rng(0).permutation(rows // group)
    chosen = np.sort(groups[: max(1, SAMPLE_WEIGHTS // (cost * group))]) * group
    return (chosen[:, None] + np.arange(group)).reshape(-1)


def _errors(weights: Floats, importance: Floats | None, ggml: Ggml) -> Iterator[tuple[tuple[GgmlType, bool], Floats]]:
    """What each type that fits does to some rows, weighted and not; either may be better."""
    columns = weights.shape[1]
    for kind in (TYPES[name] for name in KINDS):
        if columns % kind.block == 0:
            for known in (None, importance)[: 1 if importance is None else 2]:
                stored = ggml.quantize(kind, weights, known)
                yield (kind, known is not None), ggml.dequantize(kind, stored, columns) - weights


def _frontier(choices: Sequence[Choice]) -> Iterator[Choice]:
    """The lower convex hull of loss over bytes: what is above it is never the best use of a byte."""
    hull: list[Choice] = []
    for choice in sorted(choices, key=lambda choice: (choice.bytes, choice.loss)):
        if hull and choice.loss >= hull[-1].loss:
            continue
        while len(hull) > 1 and _gain(hull[-2], hull[-1]) <= _gain(hull[-1], choice):
            hull.pop()
        hull.append(choice)
    return iter(hull)


def _gain(small: Choice, large: Choice) -> float:
    """Loss saved per byte."""
    return (small.loss - large.loss) / (large.bytes - small.bytes)


def least(choices: Mapping[str, Sequence[Choice]]) -> int:
    """Bytes of the smallest types."""
    return sum(options[0].bytes for options in choices.values())


def allocate(choices: Mapping[str, Sequence[Choice]], budget: int) -> dict[str, Choice]:
    """Spend `budget` bytes, at least `least(choices)`: always on the step that saves most per byte.

    On convex choices this greedy order is optimal but for the last steps that do not fit.
    """
    at = dict.fromkeys(choices, 0)
    spent = least(choices)
    steps = [(-_gain(*options[:2]), name) for name, options in choices.items() if len(options) > 1]
    heapq.heapify(steps)
    while steps:
        _, name = heapq.heappop(steps)
        options, place = choices[name], at[name]
        extra = options[place + 1].bytes - options[place].bytes
        if spent + extra > budget:
            continue
        spent += extra
        at[name] = place + 1
        if place + 2 < len(options):
            heapq.heappush(steps, (-_gain(*options[place + 1 : place + 3]), name))
    return {name: options[at[name]] for name, options in choices.items()}
