"""Gradient boosting: finds what a line cannot, is JSON, and means the same when it is read again."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeft.cascade.answers import Case
from edgeft.cascade.boosted import fit_boosted, probability
from edgeft.cascade.calibration import read_calibration
from edgeft.cascade.metrics import curve
from edgeft.cascade.settings import PolicySettings
from edgeft.cascade.tune import Goal, policy_for, risks, tune
from edgeft.errors import ConfigError


def crossed(count: int, seed: int) -> list[Case]:
    """Hard where exactly one of two features is high: no weighted sum of them says so."""
    choose = random.Random(seed)
    found = []
    for number in range(count):
        one, other = choose.uniform(-1, 1), choose.uniform(-1, 1)
        local = choose.random() < (0.1 if (one > 0) != (other > 0) else 0.9)
        features = {"one": one, "other": other, "noise": choose.gauss(0, 1)}
        found.append(Case(f"{seed}-{number}", features, (), local, choose.random() < 0.95, 0.01))
    return found


def apgr(kind: str, fitted: Any, unseen: list[Case]) -> float:
    columns = [
        np.array([float(getattr(case, name)) for case in unseen]) for name in ("local_right", "cloud_right", "cost")
    ]
    return curve(np.array(risks(policy_for(PolicySettings(), kind, fitted), unseen)), *columns).apgr


def test_trees_find_what_no_weighted_sum_can() -> None:
    cases, unseen = crossed(800, 0), crossed(800, 1)
    found = {kind: tune(cases, PolicySettings(), kind, Goal("quality", 0.95), "x") for kind in ("learned", "boosted")}
    assert apgr("learned", found["learned"], unseen) < 0.6
    assert apgr("boosted", found["boosted"], unseen) > 0.66
    assert found["boosted"].measured["deferred"] < found["learned"].measured["deferred"]


def test_what_is_written_is_what_was_fitted(tmp_path: Path) -> None:
    cases = crossed(300, 2)
    made = tune(cases, PolicySettings(), "boosted", Goal("quality", 0.9), "x")
    made.write(tmp_path / "c.json")
    again = read_calibration(tmp_path / "c.json")
    assert [probability(again.trees, case.features) for case in cases] == [
        probability(made.trees, case.features) for case in cases
    ]
    assert 0 < probability(again.trees, {}) < 1  # features that a newer edgeft no longer has


def test_where_there_is_nothing_to_learn_chances_stay_near_the_mean() -> None:
    choose = random.Random(3)
    rows = [{"a": choose.gauss(0, 1), "b": 1.0} for _ in range(400)]
    trees = fit_boosted(rows, [choose.random() < 0.3 for _ in rows])
    assert len(trees) < 30
    assert all(0.15 < probability(trees, row) < 0.5 for row in rows)
    assert all(probability(fit_boosted(rows, [False] * 400), row) < 0.01 for row in rows[:5])


@pytest.mark.parametrize(
    "trees", ['[["a", 0.5, [1.0]]]', '[["a", NaN, [1], [2]]]', "[[]]", '["text"]', "7", '[["a", "x", [1], [2]]]']
)
def test_trees_that_are_none_are_refused(tmp_path: Path, trees: str) -> None:
    made = tune(crossed(200, 4), PolicySettings(), "boosted", Goal("quality", 0.5), "x")
    made.write(tmp_path / "c.json")
    value = json.loads((tmp_path / "c.json").read_text())
    text = json.dumps({**value, "trees": "HERE"}).replace('"HERE"', trees)
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(ConfigError, match="is not a calibration"):
        read_calibration(tmp_path / "c.json")
