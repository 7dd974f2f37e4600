"""How well a risk tells which answers the cloud would mend: deferral curve, APGR, cost of a share of the gap."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

SHARES = (0.5, 0.8, 0.95, 0.99)
"""Of the gap between device and cloud, at which costs are told."""


@dataclass(frozen=True)
class Curve:
    """Quality over the share of deferred answers, both from 0 to 1; ties in the risk are one straight line."""

    share: Floats
    quality: Floats
    cost: Floats
    """Mean cost per request."""

    @property
    def area(self) -> float:
        steps = self.share[1:] - self.share[:-1]
        return float(((self.quality[1:] + self.quality[:-1]) / 2 * steps).sum())

    @property
    def apgr(self) -> float:
        """(AUC - local) / (cloud - local): 0.5 is random (RouteLLM, arXiv 2406.18665); nan without a gap."""
        local, gap = self.quality[0], self.quality[-1] - self.quality[0]
        return (self.area - float(local)) / float(gap) if gap > 0 else float("nan")

    def reaching(self, share_of_gap: float) -> tuple[float, float]:
        """The smallest share of deferred answers, and its mean cost, that recovers so much of the gap."""
        import numpy as np

        wanted = self.quality[0] + share_of_gap * (self.quality[-1] - self.quality[0])
        place = int(np.argmax(self.quality >= wanted - 1e-12))
        if place == 0:
            return 0.0, float(self.cost[0])
        low, high = self.quality[place - 1], self.quality[place]
        part = float((wanted - low) / (high - low))
        share = self.share[place - 1] + part * (self.share[place] - self.share[place - 1])
        return float(share), float(self.cost[place - 1] + part * (self.cost[place] - self.cost[place - 1]))


def curve(risk: Floats, local: Floats, cloud: Floats, cost: Floats) -> Curve:
    """Defer the highest risks first.

    Args:
        risk, local, cloud, cost: one value per answer; `local` and `cloud` are qualities, mostly 0 or 1.
    """
    import numpy as np

    order = np.argsort(-risk, kind="stable")
    count = len(risk)
    ends = np.flatnonzero(np.append(np.diff(risk[order]) != 0, True)) + 1
    places = np.concatenate([[0], ends])
    gained = np.concatenate([[0.0], np.cumsum((cloud - local)[order])])[places] / count
    spent = np.concatenate([[0.0], np.cumsum(cost[order])])[places] / count
    return Curve(places / count, local.mean() + gained, spent)


def interval(samples: Sequence[float]) -> tuple[float, float]:
    """The middle 95 % of what resampling gave."""
    import numpy as np

    known = np.array([value for value in samples if value == value])
    if not len(known):
        return float("nan"), float("nan")
    low, high = np.quantile(known, [0.025, 0.975])
    return float(low), float(high)


def resampled(
    risks: dict[str, Floats], local: Floats, cloud: Floats, cost: Floats, rounds: int = 1000, seed: int = 0
) -> dict[str, list[float]]:
    """APGR of every risk on the same bootstrap resamples, so that differences are paired."""
    import numpy as np

    choose = np.random.default_rng(seed)
    found: dict[str, list[float]] = {name: [] for name in risks}
    for _ in range(rounds):
        rows = choose.integers(0, len(local), len(local))
        for name, risk in risks.items():
            found[name].append(curve(risk[rows], local[rows], cloud[rows], cost[rows]).apgr)
    return found
