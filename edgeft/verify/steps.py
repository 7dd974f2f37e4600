"""The steps from the adapter in training to the file in its runtime, each as something that scores tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from edgeft.verify.divergence import Scorer, file_rows

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

StepName = Literal["trained", "merged", "unmerged", "tensors", "file"]

TITLES: dict[StepName, str] = {
    "trained": "as trained",
    "merged": "merged, not quantized",
    "unmerged": "base file + adapter, float32",
    "tensors": "the file's tensors in torch",
    "file": "the file in its runtime",
}

LogProbs = Callable[[Sequence[int], Sequence[int]], "NDArray[np.float32]"]
"""(tokens, rows) -> next-token log-probabilities after the tokens at `rows`: (rows, vocabulary), natural log."""


@dataclass(frozen=True)
class Step:
    name: StepName
    log_probs: LogProbs
    bytes: int | None = None
    """What the weights take in this form, where that is known."""
    title: str = ""

    @property
    def shown(self) -> str:
        return self.title or TITLES[self.name]


@dataclass(frozen=True)
class Skipped:
    """A step that could not be measured."""

    name: StepName
    why: str


def in_runtime(session: Scorer) -> LogProbs:
    """A loaded file as a step."""
    return lambda tokens, rows: file_rows(session, list(tokens), rows)
