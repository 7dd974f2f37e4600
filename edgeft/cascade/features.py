"""What the log-probabilities of a local answer say about it, at no extra forward pass."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from edgeft.chat import Delta

LEVELS = (0.0, 0.05, 0.1, 0.25, 0.5, 0.75)
"""Quantiles of the token log-probabilities (Gupta et al. 2024, arXiv 2404.10136)."""
TOP = 5
"""Alternatives asked for per token: enough for a margin and for most of the entropy."""


@dataclass(frozen=True)
class Token:
    """Natural-log probabilities of one token of an answer and of the most probable ones in its place."""

    logprob: float
    top: tuple[float, ...] = ()

    @property
    def margin(self) -> float:
        """Probability of the best less that of the second best."""
        best = sorted((math.exp(value) for value in self.top), reverse=True)
        return best[0] - best[1] if len(best) > 1 else 1.0

    @property
    def entropy(self) -> float:
        """Nats, over the alternatives and one class for all the rest."""
        masses = [math.exp(value) for value in self.top]
        rest = max(1.0 - sum(masses), 0.0)
        return -sum(mass * math.log(mass) for mass in [*masses, rest] if mass > 0)


def token_of(delta: Delta) -> Token | None:
    if delta.logprob is None:
        return None
    return Token(delta.logprob, tuple(logprob for _, logprob in delta.top_logprobs))


def quantile(values: Sequence[float], level: float) -> float:
    """Linear between the two nearest; 0 for no values."""
    if not values:
        return 0.0
    ordered = sorted(values)
    place = level * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def features(tokens: Sequence[Token], prompt: str, ended: bool, cut: bool) -> dict[str, float]:
    """Named features of the judged tokens.

    Args:
        ended: the answer ended within them; `cut`: it ended because it was too long.
    """
    logprobs = [token.logprob for token in tokens]
    margins = [token.margin for token in tokens]
    entropies = [token.entropy for token in tokens]
    mean = sum(logprobs) / len(logprobs) if logprobs else 0.0
    return {
        **{f"logprob_q{round(100 * level):02d}": quantile(logprobs, level) for level in LEVELS},
        "logprob_mean": mean,
        "logprob_sum": sum(logprobs),
        "logprob_first": logprobs[0] if logprobs else 0.0,
        "margin_min": min(margins, default=1.0),
        "margin_q25": quantile(margins, 0.25),
        "margin_first": margins[0] if margins else 1.0,
        "entropy_max": max(entropies, default=0.0),
        "entropy_mean": sum(entropies) / len(entropies) if entropies else 0.0,
        "log_tokens": math.log1p(len(tokens)),
        "ended": float(ended),
        "cut": float(cut),
        **prompt_features(prompt),
    }


def prompt_features(prompt: str) -> Mapping[str, float]:
    words = prompt.split()
    return {
        "prompt_log_words": math.log1p(len(words)),
        "prompt_digits": sum(letter.isdigit() for letter in prompt) / max(len(prompt), 1),
        "prompt_question": float("?" in prompt),
        "prompt_lines": math.log1p(prompt.count("\n")),
    }
