"""Choosing the next token in numpy, for runtimes that give logits only; the order is llama.cpp's."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

from edgeft.chat import Sampling

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

PENALTY_WINDOW = 64
"""Tokens that a repeat penalty looks back on."""


class Sampler:
    """One answer's choices; the same seed gives the same answer."""

    def __init__(self, sampling: Sampling, prompt: Sequence[int]) -> None:
        import numpy as np

        self._sampling = sampling
        self._recent = deque(prompt[-PENALTY_WINDOW:], maxlen=PENALTY_WINDOW)
        self._random = np.random.default_rng(sampling.seed & 0xFFFFFFFF)

    def choose(self, logits: NDArray[np.float32]) -> int:
        """The next token, from logits (vocabulary,)."""
        logits = self._penalized(logits)
        token = int(logits.argmax()) if self._sampling.temperature <= 0 else self._draw(logits)
        self._recent.append(token)
        return token

    def _penalized(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """Divide what speaks for a token that was used lately, multiply what speaks against it (arXiv 1909.05858)."""
        penalty = self._sampling.repeat_penalty
        if penalty == 1.0 or not self._recent:
            return logits
        changed, used = logits.copy(), sorted(set(self._recent))
        seen = changed[used]
        seen[seen > 0] /= penalty
        seen[seen < 0] *= penalty
        changed[used] = seen
        return changed

    def _draw(self, logits: NDArray[np.float32]) -> int:
        import numpy as np

        tokens = self._candidates(logits)
        chances = _softmax(logits[tokens].astype(np.float64) / self._sampling.temperature)
        return int(tokens[self._random.choice(len(tokens), p=chances)])

    def _candidates(self, logits: NDArray[np.float32]) -> NDArray[np.intp]:
        """What top-k, then top-p, then min-p leave, most probable first; at least one."""
        import numpy as np

        how = self._sampling
        count = min(how.top_k, len(logits)) if how.top_k > 0 else len(logits)
        tokens = np.argpartition(logits, -count)[-count:] if count < len(logits) else np.arange(count)
        tokens = tokens[np.argsort(-logits[tokens], kind="stable")]
        chances = _softmax(logits[tokens].astype(np.float64))
        if how.top_p < 1:
            # The token with which the sum reaches top-p is the last one in.
            tokens = tokens[: int(np.searchsorted(np.cumsum(chances), how.top_p)) + 1]
        chances = chances[: len(tokens)]
        kept: NDArray[np.intp] = tokens[chances >= how.min_p * chances[0]]
        return kept


def _softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    import numpy as np

    raised = np.exp(logits - logits.max())
    chances: NDArray[np.float64] = raised / raised.sum()
    return chances


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Natural-log probabilities, row by row: shape (rows, vocabulary)."""
    import numpy as np

    shifted = logits - logits.max(axis=1, keepdims=True)
    result: NDArray[np.float32] = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result


def token_logprobs(
    logits: NDArray[np.float32], token: int, top: int
) -> tuple[float | None, tuple[tuple[int, float], ...]]:
    """The chosen token's log-probability and the `top` best, of logits (1, vocabulary); nothing when top is 0."""
    if not top:
        return None, ()
    import numpy as np

    row = log_softmax(logits)[0]
    top = min(top, len(row))
    best = np.argpartition(row, -top)[-top:]
    best = best[np.argsort(row[best])[::-1]]
    return float(row[token]), tuple((int(index), float(row[index])) for index in best)
