"""The loss ledger: what each step from training to the shipped file costs, on the same held-out tokens.

All steps score one span of one example after the other. A span's log-probabilities are held for every step at once and
forgotten; what stays are four numbers per token and step, from which means, percentiles and intervals come.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgeft.data.example import Encoded
from edgeft.errors import CheckFailed
from edgeft.progress import Progress, Silent
from edgeft.verify.bootstrap import CONFIDENCE, DRAWS, Draws, Interval
from edgeft.verify.divergence import ROWS, chunks, scored_rows
from edgeft.verify.steps import Skipped, Step, StepName

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]
    Bools = NDArray[np.bool_]

_HELD = 1 << 23
"""Log-probabilities of one step that are held at once: 32 MB of float32."""

PERCENTILES = (0.5, 0.75, 0.9, 0.95, 0.99, 0.999, 1.0)

_WORST = 10


@dataclass(frozen=True)
class Row:
    """One step. Means are per scored token, in nats; intervals are 95 %."""

    name: StepName
    title: str
    nll: Interval
    kl: Interval
    """Mean KL(reference ‖ this step)."""
    kl_p99: Interval
    """What 99 % of the tokens do not exceed."""
    kl_worst: float
    same_top: Interval
    """Share of tokens whose most probable next token is the reference's."""
    exact: Interval | None
    """Share of examples of which greedy decoding gives every token; None where the data has no answers."""
    bytes: int | None
    percentiles: tuple[float, ...]
    """Of the KL, at `PERCENTILES`."""
    lost: Interval | None = None
    """Mean KL(step before ‖ this step); None for the first."""
    nll_change: Interval | None = None
    """NLL minus that of the step before."""

    @property
    def perplexity(self) -> Interval:
        return self.nll.through(math.exp)

    def as_dict(self) -> dict[str, Any]:
        intervals = {
            "nll": self.nll,
            "perplexity": self.perplexity,
            "kl": self.kl,
            "kl_p99": self.kl_p99,
            "same_top": self.same_top,
            "exact_match": self.exact,
            "kl_from_step_before": self.lost,
            "nll_change": self.nll_change,
        }
        return {
            "step": self.name,
            "title": self.title,
            **{name: interval and interval.as_dict() for name, interval in intervals.items()},
            "kl_worst_token": self.kl_worst,
            "kl_percentiles": dict(zip(map(str, PERCENTILES), self.percentiles, strict=True)),
            "bytes": self.bytes,
        }


@dataclass(frozen=True)
class ChangedToken:
    """A token on which the file parts most from the reference."""

    example: int
    """Of those that were compared, from 0."""
    tokens: tuple[int, ...]
    """The last ones before it."""
    token: int
    kl: float
    reference: float
    """Probability the reference gives it."""
    file: float


@dataclass(frozen=True)
class Ledger:
    rows: tuple[Row, ...]
    reference: StepName
    """The step that KL and same top token are counted from."""
    examples: int
    tokens: int
    skipped: tuple[Skipped, ...] = ()
    changed: tuple[ChangedToken, ...] = ()
    """Those with the largest KL in the last step, the worst first."""

    def row(self, name: StepName) -> Row | None:
        return next((row for row in self.rows if row.name == name), None)

    @property
    def loses_most(self) -> Row | None:
        """The step whose answers are furthest from those of the step before it."""
        later = [row for row in self.rows if row.lost is not None]
        return max(later, key=lambda row: row.lost.value if row.lost else 0.0, default=None)

    def as_dict(self) -> dict[str, Any]:
        return {
            "reference": self.reference,
            "confidence": CONFIDENCE,
            "draws": DRAWS,
            "examples": self.examples,
            "tokens": self.tokens,
            "steps": [row.as_dict() for row in self.rows],
            "skipped": [{"step": step.name, "why": step.why} for step in self.skipped],
        }


@dataclass(frozen=True)
class StepScores:
    """What one step did on every token: arrays of shape (tokens,)."""

    nll: Floats
    kl: Floats
    """KL(reference ‖ this step)."""
    lost: Floats | None
    """KL(step before ‖ this step); None for the first."""
    same: Bools
    """Whether the most probable token is the reference's."""
    right: Bools
    """Whether it is the one that really came."""


@dataclass(frozen=True)
class Scores:
    """Every step on every token."""

    steps: tuple[StepScores, ...]
    reference: int
    """Which step it is."""
    owner: NDArray[np.int64]
    """The example of every token, (tokens,), ascending."""


class _Parts:
    """A step's scores while they come in, one span after the other."""

    def __init__(self) -> None:
        self.nll: list[Floats] = []
        self.kl: list[Floats] = []
        self.lost: list[Floats] = []
        self.same: list[Bools] = []
        self.right: list[Bools] = []

    def joined(self) -> StepScores:
        import numpy as np

        return StepScores(
            nll=np.concatenate(self.nll),
            kl=np.concatenate(self.kl),
            lost=np.concatenate(self.lost) if self.lost else None,
            same=np.concatenate(self.same),
            right=np.concatenate(self.right),
        )


class _Wide:
    """Log-probabilities in float64: differences of near-equal distributions drown in float32 sums."""

    def __init__(self, log_probs: Floats) -> None:
        import numpy as np

        self.log = log_probs.astype(np.float64)
        self.probability = np.exp(self.log)

    def kl(self, other: Floats) -> Floats:
        """KL(this ‖ other) per row; what float32 lets fall below zero is zero."""
        import numpy as np

        sums: NDArray[np.float64] = (self.probability * (self.log - other)).sum(axis=1)
        return np.maximum(sums, 0.0).astype(np.float32)


def measure(
    steps: Sequence[Step],
    reference: StepName,
    encoded: Sequence[Encoded],
    vocabulary: int,
    *,
    skipped: Sequence[Skipped] = (),
    answers: bool = True,
    progress: Progress | None = None,
) -> Ledger:
    """Score every learned token with every step, and sum up.

    Args:
        steps: in the order in which one comes from the other.
        reference: the name of one of them.
        vocabulary: tokens of the model, which decides how many rows are held at once.
        answers: whether the examples are conversations, whose answers can be right or wrong as a whole.

    Raises:
        CheckFailed: a step's values are not finite, or two vocabularies differ.
        ModelError: an example does not fit into a runtime's context.
    """
    scores = score(steps, reference, encoded, vocabulary, progress)
    return summary(steps, scores, encoded, skipped=skipped, answers=answers)


def score(
    steps: Sequence[Step],
    reference: StepName,
    encoded: Sequence[Encoded],
    vocabulary: int,
    progress: Progress | None = None,
) -> Scores:
    """Token by token, what every step makes of the examples. As `measure`."""
    import numpy as np

    progress = progress or Silent()
    at = [step.name for step in steps].index(reference)
    parts = [_Parts() for _ in steps]
    owner: list[int] = []
    held = max(1, min(ROWS, _HELD // vocabulary))
    progress.start("Comparing: " + ", ".join(step.name for step in steps), len(encoded), "examples")
    try:
        for number, example in enumerate(encoded):
            for rows in chunks(scored_rows(example), held):
                _add(parts, [_log_probs(step, example, rows) for step in steps], at, example, rows)
                owner += [number] * len(rows)
            progress.advance(1, f"KL {float(parts[-1].kl[-1].mean()):.4f}")
    finally:
        progress.finish()
    return Scores(tuple(part.joined() for part in parts), at, np.asarray(owner, np.int64))


def _log_probs(step: Step, example: Encoded, rows: Sequence[int]) -> Floats:
    import numpy as np

    found = step.log_probs(example.tokens, rows)
    if not np.isfinite(found).all():
        raise CheckFailed(f"{step.shown} gives log-probabilities that are not finite", "Export it again.")
    return found


def _add(parts: Sequence[_Parts], scored: Sequence[Floats], at: int, example: Encoded, rows: Sequence[int]) -> None:
    import numpy as np

    for found in scored:
        if found.shape != scored[at].shape:
            raise CheckFailed(f"the file has {found.shape[1]} tokens, the model {scored[at].shape[1]}")
    targets = np.asarray([example.tokens[row + 1] for row in rows])
    reference, tops = _Wide(scored[at]), [found.argmax(axis=1) for found in scored]
    before: _Wide | None = None
    for step, (part, found) in enumerate(zip(parts, scored, strict=True)):
        part.nll.append(-found[np.arange(len(rows)), targets])
        part.kl.append(reference.kl(found))
        if before is not None:
            part.lost.append(before.kl(found))
        part.same.append(tops[step] == tops[at])
        part.right.append(tops[step] == targets)
        before = reference if step == at else _Wide(found) if step + 1 < len(parts) else None


def summary(
    steps: Sequence[Step],
    scores: Scores,
    encoded: Sequence[Encoded],
    *,
    skipped: Sequence[Skipped] = (),
    answers: bool = True,
) -> Ledger:
    """Means, percentiles and intervals of scores."""
    draws = Draws(scores.owner)
    rows: list[Row] = []
    for number, (step, found) in enumerate(zip(steps, scores.steps, strict=True)):
        change = None if number == 0 else found.nll - scores.steps[number - 1].nll
        rows.append(_row(step, found, draws, change, answers))
    changed = tuple(_most_changed(encoded, scores))
    name = steps[scores.reference].name
    return Ledger(tuple(rows), name, draws.examples, len(scores.owner), tuple(skipped), changed)


def _row(step: Step, found: StepScores, draws: Draws, change: Floats | None, answers: bool) -> Row:
    import numpy as np

    wrong = np.bincount(draws.owner, weights=~found.right, minlength=draws.examples)
    return Row(
        name=step.name,
        title=step.shown,
        nll=draws.per_token(found.nll),
        kl=draws.per_token(found.kl),
        kl_p99=draws.percentile(found.kl, 0.99),
        kl_worst=float(found.kl.max()),
        same_top=draws.per_token(found.same),
        exact=draws.per_example(wrong == 0) if answers else None,
        bytes=step.bytes,
        percentiles=tuple(float(value) for value in np.quantile(found.kl, PERCENTILES)),
        lost=None if found.lost is None else draws.per_token(found.lost),
        nll_change=None if change is None else draws.per_token(change),
    )


def _most_changed(encoded: Sequence[Encoded], scores: Scores) -> Iterator[ChangedToken]:
    import numpy as np

    reference, last = scores.steps[scores.reference], scores.steps[-1]
    places = [row + 1 for example in encoded for row in scored_rows(example)]
    for at in np.argsort(-last.kl, kind="stable")[:_WORST]:
        owner = int(scores.owner[at])
        tokens, place = encoded[owner].tokens, places[at]
        yield ChangedToken(
            example=owner,
            tokens=tuple(tokens[max(0, place - 12) : place]),
            token=tokens[place],
            kl=float(last.kl[at]),
            reference=math.exp(-float(reference.nll[at])),
            file=math.exp(-float(last.nll[at])),
        )
