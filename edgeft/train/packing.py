"""Which examples go together: best-fit-decreasing packs, in an order fixed by the seed before training starts.

A pack is one forward and backward pass: documents end to end, no padding (`edgeft.train.attention` keeps them
apart). All packs of all epochs are known at step 0, so a resumed run continues with the very next one.
"""

from __future__ import annotations

import bisect
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

Pack = tuple[int, ...]
"""Indices of the examples in one pack."""


@dataclass(frozen=True)
class Schedule:
    packs: tuple[Pack, ...]
    per_step: int
    """Packs per optimizer step."""
    packs_per_epoch: int
    prefix: int = 0
    """Tokens that all examples begin with; each pack has them once."""

    @property
    def steps(self) -> int:
        return -(-len(self.packs) // self.per_step)

    def epoch_at(self, step: int) -> float:
        """Passes over the data after so many optimizer steps."""
        return min(step * self.per_step, len(self.packs)) / self.packs_per_epoch


def best_fit_decreasing(lengths: Sequence[int], capacity: int, order: Sequence[int]) -> list[Pack]:
    """Fill bins of `capacity` tokens, longest example first, each into the fullest bin it fits.

    At most 11/9 of the smallest possible number of bins (Johnson 1974). Examples longer than a bin get one each.
    O(n log n): open bins are kept sorted by free space.

    Args:
        order: indices of the examples; equal lengths are taken in this order.
    """
    bins: list[list[int]] = []
    open_bins: list[tuple[int, int]] = []  # (free tokens, bin), sorted
    for index in sorted(order, key=lambda item: -lengths[item]):
        length = lengths[index]
        place = bisect.bisect_left(open_bins, (length, -1))
        if place < len(open_bins):
            free, number = open_bins.pop(place)
            bins[number].append(index)
        else:
            free, number = max(capacity, length), len(bins)
            bins.append([index])
        if free > length:
            bisect.insort(open_bins, (free - length, number))
    return [tuple(members) for members in bins]


def schedule(
    lengths: Sequence[int], capacity: int, per_step: int, epochs: float, seed: int, prefix: int = 0
) -> Schedule:
    """All packs of a run. Each epoch sees every example once, in other company and another order.

    A fractional epoch takes that share of its packs.
    """
    lengths, capacity = [length - prefix for length in lengths], capacity - prefix
    packs: list[Pack] = []
    per_epoch = 0
    for epoch in range(math.ceil(epochs)):
        generator = random.Random(f"{seed}/{epoch}")
        order = list(range(len(lengths)))
        generator.shuffle(order)
        filled = best_fit_decreasing(lengths, capacity, order)
        generator.shuffle(filled)
        per_epoch = per_epoch or len(filled)
        share = min(1.0, epochs - epoch)
        packs += filled[: max(1, round(share * len(filled)))]
    return Schedule(tuple(packs), per_step, per_epoch, prefix)
