"""Fitting a policy to the very model that ships, and choosing its threshold for a stated goal."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from edgeft.cascade.answers import Case
from edgeft.cascade.boosted import fit_boosted
from edgeft.cascade.calibration import Calibration, certain_threshold, conformal_threshold, fit_logistic
from edgeft.cascade.policies import Evidence, Policy, make_policy
from edgeft.cascade.projection import Projection, fit_projection
from edgeft.cascade.settings import PolicySettings
from edgeft.errors import CheckFailed, DataError, UsageError

TUNABLE = ("learned", "boosted", "quantile", "margin", "entropy")
_FEWEST = 20
_FOLDS = 5


@dataclass(frozen=True)
class Goal:
    """quality: share of the cloud's quality to keep at least cost; cost: mean per request; risk: of a wrong answer."""

    kind: Literal["quality", "cost", "risk"]
    value: float
    certainty: float | None = None
    """Of a risk: share of calibration sets for which it holds; None: it holds on average over them."""

    def __str__(self) -> str:
        return f"{self.kind}={self.value:g}" + (f"@{self.certainty:g}" if self.certainty else "")


def parse_goal(text: str) -> Goal:
    """Raises: UsageError."""
    kind, _, rest = text.partition("=")
    value, at, share = rest.partition("@")
    try:
        number, certainty = float(value), float(share) if at else None
    except ValueError:
        number, certainty = math.nan, None
    if kind == "risk" and 0 < number < 1 and (certainty is None or 0 < certainty < 1):
        return Goal("risk", number, certainty)
    if at:
        number = math.nan
    if kind == "quality" and 0 < number <= 1:
        return Goal("quality", number)
    if kind == "cost" and 0 <= number < math.inf:
        return Goal("cost", number)
    raise UsageError(f"{text!r} is no goal", "quality=0.95, cost=0.0005, risk=0.05 or risk=0.05@0.95.")


def halves(cases: Sequence[Case], salt: str = "") -> tuple[list[Case], list[Case]]:
    """For fitting and for the threshold, by a hash of the example: the same halves every time."""
    sides: tuple[list[Case], list[Case]] = ([], [])
    for case in cases:
        sides[hashlib.sha256((salt + case.key).encode()).digest()[0] % 2].append(case)
    return sides


def tune(
    cases: Sequence[Case],
    settings: PolicySettings,
    kind: str,
    goal: Goal,
    artifact: str,
    salt: str = "",
    embedder: str = "",
) -> Calibration:
    """A calibration for one policy.

    Args:
        artifact, embedder: SHA-256 of the local model and of what made the vectors of the cases.

    Raises:
        DataError: too few cases.
        CheckFailed: no threshold meets the goal; the message has the bound.
    """
    fit, hold = halves(cases, salt)
    if len(fit) < _FEWEST or len(hold) < _FEWEST:
        raise DataError(f"{len(cases)} answered examples are too few", f"Give at least {4 * _FEWEST}.")
    if kind not in _FITS:
        # Nothing is fitted, so that every answer can choose the threshold.
        parts, hold = {}, list(cases)
        risk = risks(policy_for(settings, kind), hold)
    elif goal.kind == "risk":
        # The promise needs answers that the fit has not seen.
        parts = _FITS[kind](fit)
        risk = risks(fitted_policy(kind, parts), hold)
    else:
        parts, hold = _FITS[kind](cases), list(cases)
        risk = cross_fitted(hold, salt, kind)
    threshold = choose(risk, hold, goal)
    measured = outcome(risk, hold, threshold)
    return Calibration(
        kind,
        threshold,
        settings.judge_tokens,
        artifact,
        embedder=embedder if parts.get("projection") else "",
        goal=str(goal),
        measured=measured,
        curve=deferral(risk, hold),
        **parts,
    )


def deferral(
    risk: Sequence[float], cases: Sequence[Case], most: int = 200
) -> tuple[tuple[float, float, float, float], ...]:
    """(threshold, share of deferred answers, quality, mean cost) from deferring none to all; at most `most` points."""
    import numpy as np

    from edgeft.cascade.metrics import curve

    risks = np.array(risk)
    local, cloud, cost = (
        np.array([float(getattr(case, name)) for case in cases]) for name in ("local_right", "cloud_right", "cost")
    )
    one = curve(risks, local, cloud, cost)
    levels = np.unique(risks)[::-1]
    thresholds = [*levels.tolist(), math.nextafter(float(levels[-1]), -math.inf)]
    points = list(zip(thresholds, one.share.tolist(), one.quality.tolist(), one.cost.tolist(), strict=True))
    kept = sorted({round(at) for at in np.linspace(0, len(points) - 1, min(most, len(points)))})
    return tuple(points[at] for at in kept)


def moved(calibration: Calibration, threshold: float) -> Calibration:
    """The calibration with a threshold that somebody chose, and what it gave on the stored curve.

    Raises:
        UsageError: there is no curve.
    """
    _, deferred, quality, cost = at_threshold(calibration, threshold)
    measured = {**calibration.measured, "quality": quality, "deferred": deferred, "cost": cost}
    measured.pop("kept_wrong", None)  # known for the tuned threshold only
    return dataclasses.replace(calibration, threshold=threshold, goal="chosen by hand", measured=measured)


def at_threshold(calibration: Calibration, threshold: float) -> tuple[float, float, float, float]:
    """The point of the curve that holds at a threshold: the one with the highest threshold not above it."""
    if not calibration.curve:
        raise UsageError("the calibration has no deferral curve", "edgeft cascade tune writes one.")
    below = [point for point in calibration.curve if point[0] <= threshold]
    return below[0] if below else calibration.curve[-1]


def cross_fitted(cases: Sequence[Case], salt: str = "", kind: str = "learned") -> list[float]:
    """Of each answer the risk by a fit to the folds that it is not in."""
    place = [hashlib.sha256((salt + case.key).encode()).digest()[1] % _FOLDS for case in cases]
    policies = [
        fitted_policy(kind, _FITS[kind]([case for case, other in zip(cases, place, strict=True) if other != fold]))
        for fold in range(_FOLDS)
    ]
    return [risks(policies[fold], [case])[0] for case, fold in zip(cases, place, strict=True)]


def fitted_policy(kind: str, parts: Mapping[str, Any]) -> Policy:
    """Of what `fitted` or `grown` found, without a threshold."""
    return policy_for(PolicySettings(kind=kind), kind, Calibration(kind, 0.0, -1, "", **parts))


def fitted(cases: Sequence[Case]) -> dict[str, Any]:
    """Weights for the target "local wrong and cloud right", not "local wrong": see docs/cascade.md."""
    target = [case.cloud_right and not case.local_right for case in cases]
    rows, projection = _rows(cases)
    names, mean, scale, weights = fit_logistic(rows, target)
    return {"names": names, "mean": mean, "scale": scale, "weights": weights, "projection": projection}


def grown(cases: Sequence[Case]) -> dict[str, Any]:
    """Trees for the same target."""
    target = [case.cloud_right and not case.local_right for case in cases]
    rows, projection = _rows(cases)
    return {"trees": fit_boosted(rows, target), "projection": projection}


def _rows(cases: Sequence[Case]) -> tuple[list[Mapping[str, float]], Projection | None]:
    """Features to fit to; the projection among them is that of these very cases."""
    projection = fit_projection([case.vector for case in cases])
    if projection is None:
        return [case.features for case in cases], None
    return [{**case.features, **projection.features(case.vector)} for case in cases], projection


_FITS: Mapping[str, Callable[[Sequence[Case]], dict[str, Any]]] = {"learned": fitted, "boosted": grown}


def policy_for(settings: PolicySettings, kind: str, calibration: Calibration | None = None) -> Policy:
    return make_policy(dataclasses.replace(settings, kind=kind), calibration)


def risks(policy: Policy, cases: Sequence[Case]) -> list[float]:
    return [policy.risk(Evidence("", case.tokens, case.features, vector=case.vector)) for case in cases]


def choose(risk: Sequence[float], cases: Sequence[Case], goal: Goal) -> float:
    """The threshold for a goal. Raises: CheckFailed."""
    if goal.kind == "risk":
        loss = [case.cloud_right and not case.local_right for case in cases]
        if goal.certainty is not None:
            return certain_threshold(risk, loss, goal.value, goal.certainty)
        return conformal_threshold(risk, loss, goal.value)
    below = math.nextafter(min(risk), -math.inf)
    candidates = sorted({*risk, below}, reverse=True)  # from keeping all to deferring all
    if goal.kind == "quality":
        wanted = goal.value * sum(case.cloud_right for case in cases) / len(cases)
        for threshold in candidates:
            if outcome(risk, cases, threshold)["quality"] >= wanted - 1e-12:
                return threshold
        raise CheckFailed(f"no threshold reaches a quality of {wanted:.3f}")
    affordable = [one for one in candidates if outcome(risk, cases, one)["cost"] <= goal.value + 1e-15]
    return min(affordable)  # deferring nothing costs nothing, so there is one


def outcome(risk: Sequence[float], cases: Sequence[Case], threshold: float) -> dict[str, float]:
    """Quality, share of deferred answers, mean cost per request and share of harmfully kept answers."""
    count = len(cases)
    deferred = [value > threshold for value in risk]
    right = sum(case.cloud_right if away else case.local_right for case, away in zip(cases, deferred, strict=True))
    lost = sum(
        case.cloud_right and not case.local_right and not away for case, away in zip(cases, deferred, strict=True)
    )
    return {
        "examples": count,
        "quality": right / count,
        "local_quality": sum(case.local_right for case in cases) / count,
        "cloud_quality": sum(case.cloud_right for case in cases) / count,
        "deferred": sum(deferred) / count,
        "cost": sum(case.cost for case, away in zip(cases, deferred, strict=True) if away) / count,
        "kept_wrong": lost / count,
    }
