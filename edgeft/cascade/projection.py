"""What a prompt is about, in a few numbers: its embedding along the directions in which prompts differ most."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgeft.cascade.features import EMBEDDING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from edgeft.cascade.embedder import Vector

    Floats = NDArray[np.float64]

_MOST = 16
_SMALLEST = 1e-3
"""Standard deviation (of vectors of length one) below which a component is rounding and not prompts."""


@dataclass(frozen=True)
class Projection:
    """The first principal components of prompts' embeddings."""

    mean: tuple[float, ...]
    """One per dimension."""
    components: tuple[tuple[float, ...], ...]
    """Of length one each, the widest first."""

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(f"{EMBEDDING}{place:02d}" for place in range(len(self.components)))

    @functools.cached_property
    def _arrays(self) -> tuple[Floats, Floats]:
        import numpy as np

        return np.array(self.mean), np.array(self.components)

    def features(self, vector: Vector | None) -> dict[str, float]:
        """Of an embedding, shape (dimensions,); a prompt that has none is taken for the mean."""
        mean, components = self._arrays
        found = [0.0] * len(self.names) if vector is None else (components @ (vector - mean)).tolist()
        return dict(zip(self.names, found, strict=True))


def fit_projection(vectors: Sequence[Vector | None]) -> Projection | None:
    """At most 16 components, and fewer than a quarter of the vectors; None where these do not differ.

    Numbers are rounded as they are kept, so that a fit on these features is one on those that are made later.
    """
    import numpy as np

    known = [vector for vector in vectors if vector is not None]
    if not known:
        return None
    table = np.array(known, dtype=np.float64)
    mean = table.mean(0)
    _, widths, components = np.linalg.svd(table - mean, full_matrices=False)
    wide = int((widths > _SMALLEST * math.sqrt(len(known))).sum())
    count = min(_MOST, (len(known) - 1) // 4, wide)
    return Projection(_rounded(mean), tuple(map(_rounded, components[:count]))) if count else None


def _rounded(numbers: Floats) -> tuple[float, ...]:
    return tuple(float(f"{number:.6g}") for number in numbers)


def read_projection(value: Any) -> Projection | None:
    """Of a calibration. Raises: ValueError, TypeError, KeyError for what is none."""
    if value is None:
        return None
    found = Projection(tuple(value["mean"]), tuple(map(tuple, value["components"])))
    rows = (found.mean, *found.components)
    if not found.components or len({len(row) for row in rows}) != 1:
        raise ValueError("the components of its projection do not belong together")
    if not all(math.isfinite(number) for row in rows for number in row):
        raise ValueError("a number in its projection is none")
    return found
