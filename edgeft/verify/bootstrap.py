"""How sure a figure is: the percentile bootstrap over examples (Efron & Tibshirani 1993, chapter 13).

Tokens of one answer hang together, so whole examples are drawn, with replacement. Every figure of every step is
computed on the same draws: a difference between two steps is then as sure as it can be, for what both have in common
falls out of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

DRAWS = 1000
"""Enough for the ends of a 95 % interval to be within a few percent of its width."""

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A figure, and the ends of its 95 % interval; None where there is but one example."""

    value: float
    low: float | None = None
    high: float | None = None

    def as_dict(self) -> dict[str, float | None]:
        return {"value": self.value, "low": self.low, "high": self.high}

    def through(self, function: Callable[[float], float]) -> Interval:
        """The interval of an increasing function of the figure."""
        low, high = (None if end is None else function(end) for end in (self.low, self.high))
        return Interval(function(self.value), low, high)


class Draws:
    """How often each example is in each draw."""

    def __init__(self, owner: NDArray[np.int64], draws: int = DRAWS, seed: int = 0) -> None:
        """
        Args:
            owner: the example of every token, (tokens,), ascending.
        """
        import numpy as np

        self.owner = owner
        self.examples = int(owner[-1]) + 1 if len(owner) else 0
        self._tokens = np.bincount(owner, minlength=self.examples).astype(np.float64)
        random = np.random.default_rng(seed)
        share = np.full(self.examples, 1 / max(self.examples, 1))
        self._counts = random.multinomial(self.examples, share, size=draws).astype(np.float64)

    def per_token(self, values: NDArray[np.float32] | NDArray[np.bool_]) -> Interval:
        """The mean over tokens of (tokens,) values."""
        import numpy as np

        sums = np.bincount(self.owner, weights=values.astype(np.float64), minlength=self.examples)
        means = (self._counts @ sums) / (self._counts @ self._tokens)
        return self._interval(float(sums.sum() / self._tokens.sum()), means)

    def per_example(self, values: NDArray[np.bool_] | Floats) -> Interval:
        """The mean over examples of (examples,) values."""
        import numpy as np

        wide = values.astype(np.float64)
        return self._interval(float(np.mean(wide)), (self._counts @ wide) / self.examples)

    def percentile(self, values: NDArray[np.float32], share: float) -> Interval:
        """The value that `share` of the tokens do not exceed."""
        import numpy as np

        order = np.argsort(values, kind="stable")
        ordered, owner = values[order], self.owner[order]
        found = np.empty(len(self._counts))
        for at, counts in enumerate(self._counts):
            reached = np.cumsum(counts[owner])
            found[at] = ordered[np.searchsorted(reached, share * reached[-1])]
        place = min(len(ordered) - 1, int(np.ceil(share * len(ordered))) - 1)
        return self._interval(float(ordered[max(place, 0)]), found)

    def _interval(self, value: float, drawn: Floats) -> Interval:
        import numpy as np

        if self.examples < 2:
            return Interval(value)
        ends = (1 - CONFIDENCE) / 2
        low, high = np.quantile(drawn, (ends, 1 - ends))
        return Interval(value, float(low), float(high))
