"""How far two models are apart on the same tokens, summed up while streaming: never tokens x vocabulary at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from edgeft.data.example import Encoded
from edgeft.errors import CheckFailed

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

ROWS = 128
"""Rows of log-probabilities held at once: 25 MB of float32 for a vocabulary of 49,152."""


class Reference(Protocol):
    def log_probs(self, tokens: Sequence[int], rows: Sequence[int]) -> NDArray[np.float32]: ...


class Scorer(Protocol):
    """The part of a runtime session that is needed."""

    def score(self, tokens: list[int], start: int = 0) -> NDArray[np.float32]: ...


@dataclass
class Divergence:
    """Sums over scored tokens; means are per token, in nats."""

    tokens: int = 0
    examples: int = 0
    _kl: float = 0.0
    _agree: int = 0
    _nll_reference: float = 0.0
    _nll_file: float = 0.0
    worst_kl: float = field(default=0.0)

    def add(self, reference: NDArray[np.float32], file: NDArray[np.float32], targets: NDArray[np.int64]) -> None:
        """Add rows (rows, vocabulary) of both models and the token that really came next (rows,).

        Raises:
            CheckFailed: when the file's values are not finite.
        """
        import numpy as np

        if not np.isfinite(file).all():
            raise CheckFailed("the file gives log-probabilities that are not finite", "Export it again.")
        rows = np.arange(len(targets))
        # float64: the differences of near-equal distributions drown in float32 sums over 50,000 terms.
        wide = reference.astype(np.float64)
        kl = (np.exp(wide) * (wide - file)).sum(axis=1)
        self._kl += float(kl.sum())
        self.worst_kl = max(self.worst_kl, float(kl.max()))
        self._agree += int((reference.argmax(axis=1) == file.argmax(axis=1)).sum())
        self._nll_reference -= float(reference[rows, targets].sum(dtype=np.float64))
        self._nll_file -= float(file[rows, targets].sum(dtype=np.float64))
        self.tokens += len(targets)

    @property
    def kl(self) -> float:
        """Mean KL(reference ‖ file). float32 log-probabilities can push the sum a hair below zero."""
        return max(0.0, self._kl / self.tokens)

    @property
    def top1(self) -> float:
        return self._agree / self.tokens

    @property
    def nll_reference(self) -> float:
        return self._nll_reference / self.tokens

    @property
    def nll_file(self) -> float:
        return self._nll_file / self.tokens


def scored_rows(encoded: Encoded) -> list[int]:
    """Rows whose next token is learned: row i predicts token i + 1, so the first token is never scored."""
    return [index - 1 for index, learned in enumerate(encoded.learned) if learned and index > 0]


def file_rows(session: Scorer, tokens: list[int], rows: Sequence[int]) -> NDArray[np.float32]:
    """The file's log-probabilities at `rows` (ascending): shape (len(rows), vocabulary)."""
    import numpy as np

    first, last = rows[0], rows[-1]
    block = session.score(tokens[: last + 1], first)
    chosen: NDArray[np.float32] = block[np.asarray(rows) - first]
    return chosen


def chunks(rows: Sequence[int], size: int = ROWS) -> Iterator[Sequence[int]]:
    """Runs of at most `size` rows that also span at most `size` tokens, since a runtime scores whole spans."""
    start = 0
    for index in range(1, len(rows) + 1):
        if index == len(rows) or rows[index] - rows[start] >= size:
            yield rows[start:index]
            start = index


def compare(reference: Reference, session: Scorer, examples: Iterable[Encoded]) -> Iterator[Divergence]:
    """Compare example by example, yielding the same running sums after each one."""
    total = Divergence()
    for example in examples:
        for rows in chunks(scored_rows(example)):
            add_rows(total, reference, session, example.tokens, rows)
        total.examples += 1
        yield total


def add_rows(total: Divergence, reference: Reference, session: Scorer, tokens: list[int], rows: Sequence[int]) -> None:
    """One span of one example. A padded vocabulary (rows past the tokenizer) must have the same width on both sides.

    Raises:
        CheckFailed: when the two vocabularies differ.
    """
    import numpy as np

    expected, got = reference.log_probs(tokens, rows), file_rows(session, tokens, rows)
    if expected.shape != got.shape:
        raise CheckFailed(f"the file has {got.shape[1]} tokens, the model {expected.shape[1]}")
    total.add(expected, got, np.asarray([tokens[row + 1] for row in rows]))


def file_nll(session: Scorer, examples: Iterable[Encoded]) -> tuple[float, int]:
    """Mean NLL of the learned tokens by the file alone, in nats, and how many tokens were scored."""
    import numpy as np

    total, count = 0.0, 0
    for example in examples:
        for rows in chunks(scored_rows(example)):
            values = file_rows(session, example.tokens, rows)
            targets = np.asarray([example.tokens[row + 1] for row in rows])
            total -= float(values[np.arange(len(rows)), targets].sum(dtype=np.float64))
            count += len(rows)
    return (total / count if count else float("nan")), count
