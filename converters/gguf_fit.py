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
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edgeft.errors import UsageError

from .ggml import TYPES, Ggml, GgmlType
from .safetensors_rows import Reader

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .merge import LoadedTensor, MergedTensor

    Floats = NDArray[np.float32]

KINDS = ("Q2_K", "Q3_K", "IQ4_XS", "IQ4_NL", "Q4_0", "Q4_K", "Q4_1", "Q5_0", "Q5_K", "Q5_1", "Q6_K", "Q8_0")
"""With fast kernels on every CPU that llama.cpp knows, and none that needs an importance matrix."""

SAMPLE_WEIGHTS = 1 << 16
"""Weights per tensor whose error is measured; the error of their mean is about a percent."""


@dataclass(frozen=True)
class Sensitivity:
    """How much an error in one tensor costs: sum over terms of rows_i * columns_j * error_ij^2, in nats."""

    terms: tuple[tuple[Floats, Floats], ...]
    """(rows,) and (columns,) each. A tied embedding has two terms: as embedding and as head."""

    def loss(self, errors: Floats, rows: NDArray[np.intp], total: int) -> float:
        """Expected KL of errors in some rows, scaled to all: (sampled rows, columns)."""
        squares = np.square(errors, dtype=np.float64)
        cost = sum(float(left[rows].astype(np.float64) @ (squares @ right)) for left, right in self.terms)
        return 0.5 * cost * total / len(rows)


@dataclass(frozen=True)
class Choice:
    """One type for one tensor."""

    type: GgmlType
    bytes: int
    loss: float
    """Expected KL, nats per token."""


@dataclass(frozen=True)
class Request:
    """One tensor to choose a type for."""

    name: str
    source: MergedTensor
    sensitivity: Sensitivity
    importance: Floats | None
    group: int = 1
    """Rows that must be read together."""


def fit(requests: Sequence[Request], budget: int, ggml: Ggml, threads: int) -> dict[str, Choice]:
    """The types with the least expected loss in `budget` bytes.

    Raises:
        UsageError: even the smallest types do not fit.
        ModelError: a weight is damaged.
    """
    with Reader() as reader, ThreadPoolExecutor(threads) as pool:

        def measured(request: Request) -> list[Choice]:
            return measure(request, request.source.load(reader, ggml), ggml)

        found = dict(zip((request.name for request in requests), pool.map(measured, requests), strict=True))
    return allocate(found, budget)


def measure(request: Request, loaded: LoadedTensor, ggml: Ggml) -> list[Choice]:
    """Every type that fits the rows, from small to large; what costs more and loses more is left out."""
    rows, columns = request.source.shape
    groups = np.random.default_rng(0).permutation(rows // request.group)
    chosen = np.sort(groups[: max(1, SAMPLE_WEIGHTS // (columns * request.group))]) * request.group
    sample = (chosen[:, None] + np.arange(request.group)).reshape(-1)
    weights = np.concatenate([loaded.rows(int(row), int(row) + request.group).copy() for row in chosen])
    return _choices(request, rows, sample, weights, ggml)


def _choices(request: Request, rows: int, sample: NDArray[np.intp], weights: Floats, ggml: Ggml) -> list[Choice]:
    columns = weights.shape[1]
    found = []
    for kind in (TYPES[name] for name in KINDS):
        if columns % kind.block == 0:
            stored = ggml.quantize(kind, weights, request.importance)
            errors = ggml.dequantize(kind, stored, columns) - weights
            found.append(Choice(kind, rows * kind.row_bytes(columns), request.sensitivity.loss(errors, sample, rows)))
    return list(_frontier(found)) or [Choice(TYPES["F16"], rows * columns * 2, 0.0)]


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


def allocate(choices: Mapping[str, Sequence[Choice]], budget: int) -> dict[str, Choice]:
    """Spend `budget` bytes: always on the step that saves most per byte.

    On convex choices this greedy order is optimal but for the last step that does not fit.

    Raises:
        UsageError: even the smallest types do not fit.
    """
    at = dict.fromkeys(choices, 0)
    spent = sum(options[0].bytes for options in choices.values())
    if spent > budget:
        raise UsageError(
            f"{budget / 1e6:.1f} MB are too few for the weights: the smallest types take {spent / 1e6:.1f} MB",
            "Give it more, or take a smaller model.",
        )
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
