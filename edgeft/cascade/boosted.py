"""Gradient boosting for the learned policy: small trees that are written as JSON and read without any library.

Own trees and not scikit-learn's: those would bring 150 MB (with scipy) to a device that only compares numbers, and are
kept as pickles, which run what they contain. A few hundred examples and thirty features need no more than this.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgeft.cascade.features import NGRAM
from edgeft.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from edgeft.cascade.calibration import Calibration
    from edgeft.cascade.policies import Evidence, Extra

    Floats = NDArray[np.float64]

Node = Sequence[Any]
"""`[feature, threshold, low, high]`, low for values up to the threshold; a leaf is `[value]` (log-odds)."""

_ROUNDS, _RATE, _DEPTH = 200, 0.08, 3
_FEWEST = 8
"""Examples in a leaf, at least."""
_RIDGE = 3.0
_PATIENCE = 40
"""Rounds without gain on held-out examples after which no more trees are made: where only two features together say
anything, the first dozen trees may find nothing."""
_CUTS = 31
"""Thresholds tried per feature, at quantiles of its values."""


@dataclass(frozen=True)
class Boosted:
    """P(local wrong and cloud right), by the trees of a calibration."""

    calibration: Calibration
    name: str = "boosted"
    extra: Extra = ""

    def risk(self, evidence: Evidence) -> float:
        return probability(self.calibration.trees, self.calibration.projected(evidence.features, evidence.vector))


def boosted(calibration: Calibration | None) -> Boosted:
    """Raises: ConfigError when there are no trees."""
    if calibration is None or not calibration.trees:
        raise ConfigError("the boosted policy has no calibration", "edgeft cascade tune --policy boosted makes one.")
    return Boosted(calibration)


def probability(trees: Sequence[Node], features: Mapping[str, float]) -> float:
    """A feature that is missing goes the low way."""
    total = sum(_leaf(tree, features) for tree in trees)
    return 1.0 / (1.0 + math.exp(-max(-30.0, min(30.0, total))))


def _leaf(node: Node, features: Mapping[str, float]) -> float:
    while len(node) == 4:
        name, threshold, low, high = node
        node = high if features.get(name, -math.inf) > threshold else low
    return float(node[0])


def names_in(trees: Sequence[Node]) -> set[str]:
    """Of the features that trees ask for."""
    found = {str(tree[0]) for tree in trees if len(tree) == 4}
    return found.union(*(names_in(tree[2:]) for tree in trees if len(tree) == 4))


def check_trees(trees: Any) -> None:
    """Raises: ValueError for what is no list of trees, TypeError for what is no number."""
    for tree in trees:
        _check_node(tree, 8)


def _check_node(node: Any, depth: int) -> None:
    if not isinstance(node, (list, tuple)) or len(node) not in (1, 4) or depth == 0:
        raise ValueError("a tree in it is none")
    if not math.isfinite(node[0] if len(node) == 1 else node[1]):
        raise ValueError("a number in a tree is none")
    for child in node[2:]:
        _check_node(child, depth - 1)


# --- Fitting --------------------------------------------------------------------------------


def fit_boosted(rows: Sequence[Mapping[str, float]], target: Sequence[bool]) -> tuple[Node, ...]:
    """Trees on the gradient of the logistic loss, second order (Chen and Guestrin 2016, arXiv 1603.02754, eq. 5-7).

    Their number is where the loss on a quarter of the rows, left out, is least; with it, all rows are fitted.

    Args:
        rows: named features; every row has the same. Those of words are left out: a word is in too few rows for a leaf.
    """
    import numpy as np

    names = sorted(name for name in rows[0] if not name.startswith(NGRAM))
    table = np.array([[row[name] for name in names] for row in rows], dtype=np.float64)
    wanted = np.array(target, dtype=np.float64)
    held = np.arange(len(rows)) % 4 == 3
    count = _best_count(names, table, wanted, held)
    return tuple(_grown(names, table, wanted, count)[0])


def _best_count(names: Sequence[str], table: Floats, wanted: Floats, held: Any) -> int:
    import numpy as np

    trees, _ = _grown(names, table[~held], wanted[~held], _ROUNDS)
    total, losses = np.zeros(int(held.sum())), []
    for tree in trees:
        total = total + _values(tree, names, table[held])
        losses.append(float(np.mean(np.logaddexp(0, total) - wanted[held] * total)))
        if len(losses) - int(np.argmin(losses)) > _PATIENCE:
            break
    return int(np.argmin(losses)) + 1


def _grown(names: Sequence[str], table: Floats, wanted: Floats, count: int) -> tuple[list[Node], Floats]:
    """So many trees, the first of them a leaf with the overall log-odds; and what they say of every row."""
    import numpy as np

    mean = (wanted.sum() + 1) / (len(wanted) + 2)
    trees: list[Node] = [[math.log(mean / (1 - mean))]]
    total = np.full(len(wanted), trees[0][0])
    cuts = [np.unique(np.quantile(column, np.linspace(0, 1, _CUTS + 2)[1:-1])) for column in table.T]
    for _ in range(count - 1):
        chance = 1 / (1 + np.exp(-total))
        tree = _tree(names, table, cuts, chance - wanted, chance * (1 - chance), _DEPTH)
        trees.append(tree)
        total = total + _values(tree, names, table)
    return trees, total


def _tree(
    names: Sequence[str], table: Floats, cuts: Sequence[Floats], gradient: Floats, curvature: Floats, depth: int
) -> Node:
    """The split that gains most, and the same below it."""
    import numpy as np

    best, where, at = 1e-6, -1, 0.0
    before = _score(gradient.sum(), curvature.sum())
    for column in range(table.shape[1]) if depth else ():
        low = table[:, column, None] <= cuts[column]
        size = low.sum(0)
        slope, bend = gradient @ low, curvature @ low
        gain = _score(slope, bend) + _score(gradient.sum() - slope, curvature.sum() - bend) - before
        gain[(size < _FEWEST) | (len(table) - size < _FEWEST)] = -np.inf
        if len(gain) and gain.max() > best:
            best, where, at = float(gain.max()), column, float(cuts[column][int(gain.argmax())])
    if where < 0:
        return [round(float(-_RATE * gradient.sum() / (curvature.sum() + _RIDGE)), 6)]
    low = table[:, where] <= at
    sides = [_tree(names, table[side], cuts, gradient[side], curvature[side], depth - 1) for side in (low, ~low)]
    return [names[where], at, *sides]


def _score(slope: Any, bend: Any) -> Any:
    return slope * slope / (bend + _RIDGE)


def _values(tree: Node, names: Sequence[str], table: Floats) -> Floats:
    import numpy as np

    if len(tree) == 1:
        return np.full(len(table), tree[0])
    low = table[:, names.index(tree[0])] <= tree[1]
    return np.where(low, _values(tree[2], names, table), _values(tree[3], names, table))
