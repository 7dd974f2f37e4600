"""What tuning found out: weights, threshold, and the very model they are for. JSON, nothing that runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeft.cascade.boosted import check_trees, names_in
from edgeft.cascade.features import NAMES, NGRAM
from edgeft.cascade.projection import Projection, read_projection
from edgeft.errors import CheckFailed, ConfigError
from edgeft.paths import parse_json, write_json

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from edgeft.cascade.embedder import Vector

    Floats = NDArray[np.float64]

SCHEMA = 1
RIDGES = (300.0, 100.0, 30.0, 10.0, 3.0, 1.0)
WORD_RIDGES = (30.0, 10.0, 3.0, 1.0, 0.5)
"""Tried from the strongest to the weakest, each fit beginning at the one before."""


@dataclass(frozen=True)
class Calibration:
    policy: str
    threshold: float
    judge_tokens: int
    artifact: str
    """SHA-256 of the local model, with its adapters."""
    names: tuple[str, ...] = ()
    mean: tuple[float, ...] = ()
    scale: tuple[float, ...] = ()
    weights: tuple[float, ...] = ()
    """One per name, then the constant."""
    trees: tuple[Any, ...] = ()
    """Of the boosted policy (`edgeft.cascade.boosted`)."""
    embedder: str = ""
    """SHA-256 of the embedder that the projection is for."""
    projection: Projection | None = None
    goal: str = ""
    measured: Mapping[str, Any] = field(default_factory=dict)
    curve: tuple[tuple[float, float, float, float], ...] = ()
    """(threshold, share of deferred answers, quality, mean cost), from deferring none to all, on the answers that the
    threshold was chosen on."""
    schema: int = SCHEMA

    def probability(self, features: Mapping[str, float]) -> float:
        """Logistic regression; a feature far outside what was seen counts as four standard deviations."""
        total = self.weights[-1]
        for name, mean, scale, weight in zip(self.names, self.mean, self.scale, self.weights[:-1], strict=True):
            total += weight * max(-4.0, min(4.0, (features.get(name, mean) - mean) / scale))
        return 1.0 / (1.0 + math.exp(-max(-30.0, min(30.0, total))))

    def projected(self, features: Mapping[str, float], vector: Vector | None) -> Mapping[str, float]:
        """Features with those that the projection makes of the prompt's embedding, where there is a projection."""
        return {**features, **self.projection.features(vector)} if self.projection else features

    def stale(self, artifact: str, judge_tokens: int, embedder: str = "") -> str:
        """Why this calibration does not hold for a model any more; "" when it does."""
        if self.artifact != artifact:
            return "the local model, its adapter or its quantization changed"
        if self.judge_tokens != judge_tokens:
            return f"it judged {self.judge_tokens} tokens, now {judge_tokens} are judged"
        if self.projection and self.embedder != embedder:
            return "it was tuned with another embedder" if embedder else "its embedder is not in the settings any more"
        made = NAMES.union(self.projection.names if self.projection else ())
        if unknown := {*self.names, *names_in(self.trees)} - made:
            return f"it needs features that this edgeft does not make, such as {min(unknown)}"
        return ""

    def write(self, path: Path) -> None:
        write_json(path, asdict(self))


def read_calibration(path: Path) -> Calibration:
    """Raises: ConfigError."""
    try:
        value = parse_json(path.read_text(encoding="utf-8"))
        lists = {name: tuple(value.get(name, ())) for name in ("names", "mean", "scale", "weights", "trees")}
        lists["curve"] = tuple((float(t), float(d), float(q), float(c)) for t, d, q, c in value.get("curve", ()))
        found = Calibration(**{**value, **lists, "projection": read_projection(value.get("projection"))})
        if found.schema != SCHEMA:
            raise ValueError(f"its schema is {found.schema}, this edgeft reads {SCHEMA}")
        numbers = (found.threshold, *found.mean, *found.scale, *found.weights, *chain(*found.curve))
        if not all(isinstance(number, (int, float)) and math.isfinite(number) for number in numbers):
            raise ValueError("a number in it is none")
        if found.weights and len(found.weights) != len(found.names) + 1:
            raise ValueError("weights and names do not belong together")
        check_trees(found.trees)
        return found
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(f"{path} is not a calibration: {error}", "edgeft cascade tune writes one.") from error


def fit_logistic(
    rows: Sequence[Mapping[str, float]], target: Sequence[bool]
) -> tuple[tuple[str, ...], tuple[float, ...], tuple[float, ...], tuple[float, ...]]:
    """Ridge logistic regression by Newton's method; each ridge is the one with the least leave-one-out loss.

    Features are standardized and share one ridge. Those of words are 0 or 1 and stay so, with a ridge of their own:
    standardized, a word that one example has would count as much as the answer's probability.

    Returns:
        names, mean, scale and weights as in `Calibration`.
    """
    import numpy as np

    names = tuple(rows[0])
    table = np.array([[row[name] for name in names] for row in rows], dtype=np.float64)
    kept = table.std(0) > 1e-9
    names, table = tuple(name for name, keep in zip(names, kept, strict=True) if keep), table[:, kept]
    words = np.array([name.startswith(NGRAM) for name in names], dtype=bool)
    mean, scale = table.mean(0), np.where(words, 1.0, table.std(0))
    inputs = np.hstack([np.clip((table - mean) / scale, -4, 4), np.ones((len(rows), 1))])
    weights = _chosen(inputs, np.append(words, False), np.array(target, dtype=np.float64))
    return names, tuple(mean.tolist()), tuple(scale.tolist()), tuple(weights.tolist())


def _chosen(inputs: Floats, words: NDArray[np.bool_], target: Floats) -> Floats:
    """Weights by the best ridges: first that of the other features alone, then that of the words beside them."""
    import numpy as np

    weights, best, chosen = np.zeros(inputs.shape[1]), math.inf, 0.0
    found = weights[~words]
    for ridge in RIDGES:
        found, loss = _newton(inputs[:, ~words], target, np.full(len(found), ridge), found)
        if loss < best:
            best, chosen, weights[~words] = loss, ridge, found
    found = weights
    for ridge in WORD_RIDGES if words.any() else ():
        found, loss = _newton(inputs, target, np.where(words, ridge, chosen), found)
        if loss < best:
            best, weights = loss, found
    return weights


def _newton(inputs: Floats, target: Floats, penalty: Floats, start: Floats) -> tuple[Floats, float]:
    """Weights, the constant last, and the mean leave-one-out loss (nats).

    Leaving one example out moves its log-odds by (p - y) h / (1 - w h) to second order, with w = p (1 - p) and
    leverage h (Rad and Maleki 2020, arXiv 1801.10243): no further fit is needed.
    """
    import numpy as np

    weights, penalty = start, penalty.copy()
    penalty[-1] = 1e-3  # the constant is free, but finite where only one class was seen
    for _ in range(50):
        probability = 1 / (1 + np.exp(-np.clip(inputs @ weights, -30, 30)))
        gradient = inputs.T @ (probability - target) + penalty * weights
        curvature = (inputs * (probability * (1 - probability))[:, None]).T @ inputs + np.diag(penalty)
        step = np.linalg.solve(curvature, gradient)
        weights = weights - np.clip(step, -5, 5)
        if float(np.abs(step).max()) < 1e-7:
            break
    spread = probability * (1 - probability)
    leverage = np.einsum("ij,ji->i", inputs, np.linalg.solve(curvature, inputs.T))
    unseen = inputs @ weights + (probability - target) * leverage / np.maximum(1 - spread * leverage, 1e-6)
    return weights, float(np.mean(np.logaddexp(0, unseen) - target * unseen))


def conformal_threshold(risk: Sequence[float], loss: Sequence[bool], alpha: float) -> float:
    """The loosest threshold whose expected loss is at most `alpha`: conformal risk control.

    Angelopoulos et al. 2024 (arXiv 2208.02814): with L(t) = mean of loss over the answers kept at t, which rises
    with t, any t with (n L(t) + 1) / (n + 1) <= alpha keeps E[loss of a new answer] <= alpha.

    Args:
        risk: of each calibration answer; kept when at most the threshold.
        loss: whether keeping it is a loss: the device was wrong and the cloud was right.

    Raises:
        CheckFailed: alpha is below 1 / (n + 1), which no threshold can promise with n answers.
    """
    count = len(risk)
    bound = 1 / (count + 1)
    if alpha < bound:
        raise CheckFailed(
            f"a risk of {alpha:g} cannot be promised with {count} calibration answers: the bound is {bound:.4g}",
            f"Give at least {math.ceil(1 / alpha) - 1 if alpha > 0 else 'infinitely many'} answers, or a higher risk.",
        )
    return _loosest(risk, loss, math.floor(alpha * (count + 1) - 1 + 1e-9))


def certain_threshold(risk: Sequence[float], loss: Sequence[bool], alpha: float, certainty: float) -> float:
    """The loosest threshold whose risk is at most `alpha` for all but 1 - `certainty` of calibration sets.

    Bates et al. 2021 (arXiv 2101.02703): the loss rises with the threshold, so it is enough that the exact binomial
    bound holds at each threshold up to the chosen one: P(Binomial(n, alpha) <= losses) <= 1 - certainty.

    Args:
        risk, loss: as for `conformal_threshold`.

    Raises:
        CheckFailed: even no loss at all among n answers would not make it so certain.
    """
    count, doubt = len(risk), 1 - certainty
    if (1 - alpha) ** count > doubt:
        needed = math.ceil(math.log(doubt) / math.log1p(-alpha))
        raise CheckFailed(
            f"a risk of {alpha:g} cannot be promised with a certainty of {certainty:g} by {count} calibration answers:"
            f" the bound is {1 - doubt ** (1 / count):.4g}",
            f"Give at least {needed} answers, a higher risk or less certainty.",
        )
    return _loosest(risk, loss, _allowed_losses(count, alpha, doubt))


def _allowed_losses(count: int, alpha: float, doubt: float) -> int:
    """The largest k with P(Binomial(count, alpha) <= k) <= doubt."""
    total = 0.0
    for losses in range(count + 1):
        chosen = math.lgamma(count + 1) - math.lgamma(losses + 1) - math.lgamma(count - losses + 1)
        total += math.exp(chosen + losses * math.log(alpha) + (count - losses) * math.log1p(-alpha))
        if total > doubt:
            return losses - 1
    return count


def _loosest(risk: Sequence[float], loss: Sequence[bool], allowed: int) -> float:
    """The highest threshold that keeps at most so many losses, answers of the same risk being kept together."""
    best, lost = math.nextafter(min(risk), -math.inf), 0
    ordered = sorted(zip(risk, loss, strict=True))
    for position, (value, bad) in enumerate(ordered):
        lost += bad
        last_of_ties = position + 1 == len(ordered) or ordered[position + 1][0] > value
        if lost > allowed:
            break
        if last_of_ties:
            best = value
    return best
