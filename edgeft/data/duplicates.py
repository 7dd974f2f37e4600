"""Near-duplicates by MinHash and locality-sensitive hashing, each find confirmed with the exact similarity.

Texts are sets of five-byte shingles, compared by Jaccard similarity. 120 hash functions in 12 bands of 10 rows make two
texts of similarity s meet with probability 1 - (1 - s^10)^12 (Leskovec et al., Mining of Massive Datasets, 3.4): 0.994
at 0.9. Whatever meets is compared exactly, so nothing below the threshold is ever called a duplicate.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from edgeft.errors import require

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_BANDS, _ROWS, _SHINGLE = 12, 10, 5
_PER_BUCKET = 32
"""Texts remembered per bucket: templated data would make the comparison quadratic."""


class NearIndex:
    """Texts seen so far, each under a key."""

    def __init__(self, threshold: float = 0.9) -> None:
        """Raises: MissingDependency without numpy."""
        self._np: Any = require("numpy", "device")
        self._threshold = threshold
        self._buckets: defaultdict[int, list[int]] = defaultdict(list)
        self._shingles: list[NDArray[np.uint64]] = []
        # Odd multipliers: multiply-shift hashing (Dietzfelbinger et al. 1997).
        weights = self._mix(self._np.arange(1, _BANDS * _ROWS + 1, dtype=self._np.uint64))
        self._weights = weights | self._np.uint64(1)

    def find(self, text: str) -> int | None:
        """Position of a near-duplicate among the texts added so far."""
        shingles = self._shingled(text)
        return self._match(shingles, self._keys(shingles))

    def add(self, text: str) -> None:
        shingles = self._shingled(text)
        self._insert(shingles, self._keys(shingles))

    def find_or_add(self, text: str) -> int | None:
        """As `find`; a text that has no near-duplicate is added."""
        shingles = self._shingled(text)
        keys = self._keys(shingles)
        found = self._match(shingles, keys)
        if found is None:
            self._insert(shingles, keys)
        return found

    def _match(self, shingles: NDArray[np.uint64], keys: list[int]) -> int | None:
        compared: set[int] = set()
        for key in keys:
            for other in self._buckets.get(key, ()):
                if other not in compared and self._similarity(shingles, self._shingles[other]) >= self._threshold:
                    return other
                compared.add(other)
        return None

    def _insert(self, shingles: NDArray[np.uint64], keys: list[int]) -> None:
        for key in keys:
            if len(self._buckets[key]) < _PER_BUCKET:
                self._buckets[key].append(len(self._shingles))
        self._shingles.append(shingles)

    def _shingled(self, text: str) -> NDArray[np.uint64]:
        """Distinct five-byte windows as sorted 40-bit numbers; a shorter text is padded."""
        numpy = self._np
        raw = numpy.frombuffer(text.encode().ljust(_SHINGLE), dtype=numpy.uint8).astype(numpy.uint64)
        count = len(raw) - _SHINGLE + 1
        packed = numpy.zeros(count, dtype=numpy.uint64)
        for place in range(_SHINGLE):
            packed = (packed << numpy.uint64(8)) | raw[place : place + count]
        result: NDArray[np.uint64] = numpy.unique(packed)
        return result

    def _keys(self, shingles: NDArray[np.uint64]) -> list[int]:
        numpy = self._np
        hashed = self._mix(shingles)
        # In slices: a book has a million shingles, times 120.
        signature = numpy.full(_BANDS * _ROWS, numpy.iinfo(numpy.uint64).max, dtype=numpy.uint64)
        for start in range(0, len(hashed), 4096):
            block = (hashed[start : start + 4096, None] * self._weights) >> numpy.uint64(32)
            signature = numpy.minimum(signature, block.min(axis=0))
        # Each band's rows as one number; its own weights keep the bands apart.
        bands = (self._mix(signature) * self._weights).reshape(_BANDS, _ROWS).sum(axis=1)
        return [int(key) for key in self._mix(bands)]

    def _mix(self, values: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """The finalizer of splitmix64 (Steele et al. 2014); arithmetic wraps around."""
        numpy = self._np
        mixed = values * numpy.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> numpy.uint64(30))) * numpy.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> numpy.uint64(27))) * numpy.uint64(0x94D049BB133111EB)
        result: NDArray[np.uint64] = mixed ^ (mixed >> numpy.uint64(31))
        return result

    def _similarity(self, one: NDArray[np.uint64], other: NDArray[np.uint64]) -> float:
        # Sizes alone bound the similarity; most pairs end here.
        if min(len(one), len(other)) < self._threshold * max(len(one), len(other)):
            return 0.0
        shared = len(self._np.intersect1d(one, other, assume_unique=True))
        return float(shared / (len(one) + len(other) - shared))


def near_duplicates(texts: Iterable[str], threshold: float = 0.9) -> list[int | None]:
    """For each text the index of an earlier one that it nearly repeats, or None. Earlier means kept: no chains."""
    index = NearIndex(threshold)
    kept: list[int] = []
    result: list[int | None] = []
    for number, text in enumerate(texts):
        found = index.find_or_add(text)
        result.append(None if found is None else kept[found])
        if found is None:
            kept.append(number)
    return result
