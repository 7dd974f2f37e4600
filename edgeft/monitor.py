"""Watching a server by its request log: how answers are liked, how fast they come, and whether that has changed.

Change is measured by the population stability index, sum over bins of (p - q) ln(p / q), with ten bins that hold a
tenth of the baseline each. By custom 0.1 is worth a look and 0.25 a change. With few requests chance alone gives more:
without any change the index is distributed as (1/n + 1/m) times chi-square with bins - 1 degrees of freedom (Yurdakul,
"Statistical Properties of Population Stability Index", Western Michigan University, 2018), so an alert also needs to
be above the 99 % point of that.
"""

from __future__ import annotations

import bisect
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgeft.errors import DataError
from edgeft.paths import parse_json, write_json
from edgeft.request_log import Rated

BINS = 10
ENOUGH = 50
"""Values on each side below which drift is not judged."""
_SMOOTH = 0.5
"""Added to the count of every bin: an empty one would make the index infinite."""
_Z99 = 2.3263
"""99 % point of the standard normal distribution."""
MEASURES = ("ttft_ms", "tokens_per_s", "confidence", "prompt_tokens", "completion_tokens")


@dataclass(frozen=True)
class Reference:
    """What was usual: per measure, edges between bins and how many values fell into each."""

    edges: Mapping[str, Sequence[float]]
    counts: Mapping[str, Sequence[int]]

    def save(self, path: Path) -> None:
        write_json(path, asdict(self))


@dataclass(frozen=True)
class Limits:
    """What is still well; None: not watched."""

    psi: float | None = 0.25
    errors: float | None = 0.05
    """Share of requests that ended in a fault of the server."""
    deferrals: float | None = None
    """Share of answers that the cloud wrote."""
    liked: float | None = 0.5
    """Least share of thumbs up among ratings."""
    ratings: int = 10
    """Ratings below which `liked` is not judged."""
    ttft_ms: float | None = None
    """95 % of first tokens come within this."""
    cost: float | None = None


@dataclass(frozen=True)
class Drift:
    measure: str
    psi: float
    by_chance: float
    """What chance alone stays below in 99 of 100 cases."""
    values: int


@dataclass(frozen=True)
class Report:
    requests: int
    answered: int
    error_rate: float
    deferral_rate: float
    deferrals: Mapping[str, int]
    """Reason -> how often."""
    up: int
    down: int
    ttft_p50_ms: float | None
    ttft_p95_ms: float | None
    tokens_per_s_p50: float | None
    cost: float
    drift: tuple[Drift, ...]
    alerts: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def reference(requests: Sequence[Rated]) -> Reference:
    """What was usual among these requests, for measures with enough values."""
    edges, counts = {}, {}
    for measure in MEASURES:
        values = _values(requests, measure)
        if len(values) >= ENOUGH:
            # Values of which there are many would make edges equal: bins between them would always be empty.
            edges[measure] = sorted(set(statistics.quantiles(values, n=BINS)))
            counts[measure] = _counts(values, edges[measure])
    return Reference(edges, counts)


def read_reference(path: Path) -> Reference:
    """Raises: DataError when it is not one."""
    try:
        value = parse_json(path.read_bytes())
        edges = {str(name): [float(edge) for edge in found] for name, found in value["edges"].items()}
        counts = {str(name): [int(count) for count in found] for name, found in value["counts"].items()}
        if any(len(counts[name]) != len(found) + 1 for name, found in edges.items()):
            raise ValueError("bins and edges do not agree")
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(
            f"{path} is not a baseline: {error}", "Make one: edgeft monitor --save-baseline FILE"
        ) from error
    return Reference(edges, counts)


def report(requests: Sequence[Rated], baseline: Reference, limits: Limits) -> Report:
    """What the requests say, and where they are outside the limits."""
    answered = [rated.request for rated in requests if rated.request.status == 200]
    faults = sum(rated.request.status >= 500 for rated in requests)
    reasons = [request.deferral for request in answered if request.deferral]
    first = sorted(_values(requests, "ttft_ms"))
    speeds = _values(requests, "tokens_per_s")
    made = Report(
        len(requests),
        len(answered),
        faults / len(requests) if requests else 0.0,
        len(reasons) / len(answered) if answered else 0.0,
        {reason: reasons.count(reason) for reason in sorted(set(reasons))},
        sum(rated.rating == 1 for rated in requests),
        sum(rated.rating == -1 for rated in requests),
        statistics.median(first) if first else None,
        first[math.ceil(0.95 * len(first)) - 1] if first else None,
        statistics.median(speeds) if speeds else None,
        sum(rated.request.cost for rated in requests),
        tuple(_drifts(requests, baseline)),
        (),
    )
    return Report(**{**vars(made), "alerts": tuple(_alerts(made, limits))})


def _alerts(made: Report, limits: Limits) -> list[str]:
    alerts = []
    if limits.errors is not None and made.error_rate > limits.errors:
        alerts.append(f"{made.error_rate:.1%} of requests failed, above {limits.errors:.1%}")
    if limits.deferrals is not None and made.deferral_rate > limits.deferrals:
        alerts.append(f"{made.deferral_rate:.1%} of answers came from the cloud, above {limits.deferrals:.1%}")
    ratings = made.up + made.down
    if limits.liked is not None and ratings >= limits.ratings and made.up / ratings < limits.liked:
        alerts.append(f"{made.up / ratings:.1%} of {ratings} ratings are thumbs up, below {limits.liked:.1%}")
    if limits.ttft_ms is not None and made.ttft_p95_ms is not None and made.ttft_p95_ms > limits.ttft_ms:
        alerts.append(f"the first token took {made.ttft_p95_ms:.0f} ms (95 %), above {limits.ttft_ms:.0f} ms")
    if limits.cost is not None and made.cost > limits.cost:
        alerts.append(f"the cloud cost {made.cost:.4f}, above {limits.cost:.4f}")
    for drift in made.drift if limits.psi is not None else ():
        if drift.psi > max(limits.psi or 0.0, drift.by_chance):
            alerts.append(f"{drift.measure} has drifted: PSI {drift.psi:.2f}, above {limits.psi:.2f}")
    return alerts


def _drifts(requests: Sequence[Rated], baseline: Reference) -> list[Drift]:
    drifts = []
    for measure, edges in baseline.edges.items():
        values = _values(requests, measure)
        if len(values) >= ENOUGH:
            before, now = baseline.counts[measure], _counts(values, edges)
            drifts.append(Drift(measure, psi(before, now), _by_chance(before, now), len(values)))
    return drifts


def psi(before: Sequence[int], now: Sequence[int]) -> float:
    """Population stability index of counts in the same bins."""
    p, q = _shares(now), _shares(before)
    return sum((one - other) * math.log(one / other) for one, other in zip(p, q, strict=True))


def _shares(counts: Sequence[int]) -> list[float]:
    whole = sum(counts) + _SMOOTH * len(counts)
    return [(count + _SMOOTH) / whole for count in counts]


def _by_chance(before: Sequence[int], now: Sequence[int]) -> float:
    """99 % point of the index without change; chi-square by Wilson and Hilferty's approximation."""
    free = len(before) - 1
    if not free:
        return 0.0
    chi = free * (1 - 2 / (9 * free) + _Z99 * math.sqrt(2 / (9 * free))) ** 3
    return (1 / sum(before) + 1 / sum(now)) * chi


def _counts(values: Sequence[float], edges: Sequence[float]) -> list[int]:
    counts = [0] * (len(edges) + 1)
    for value in values:
        counts[bisect.bisect_left(edges, value)] += 1
    return counts


def _values(requests: Sequence[Rated], measure: str) -> list[float]:
    """A measure of the requests that were answered."""
    found = (getattr(rated.request, measure) for rated in requests if rated.request.status == 200)
    return [float(value) for value in found if value is not None]
