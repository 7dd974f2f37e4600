"""What the log-probabilities of a local answer say about it, at no extra forward pass."""

from __future__ import annotations

import itertools
import math
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from edgeft.chat import Delta

LEVELS = (0.0, 0.02, 0.05, 0.1, 0.15, 0.25, 0.35, 0.5, 0.75)
"""Quantiles of the token log-probabilities (Gupta et al. 2024, arXiv 2404.10136)."""
TOP = 5
"""Alternatives asked for per token: enough for a margin and for most of the entropy."""
NGRAM = "ngram_"
"""First letters of the features that say which words a prompt has; they are never written to a record."""
EMBEDDING = "embedding_"
"""Of those that say what it is about (`edgeft.cascade.projection`); neither are these."""
BUCKETS = 128
_WORD = re.compile(r"[^\W\d_]+|\d+|[^\w\s]")
_ENDS = 48
"""Words of a long prompt that are looked at, at either end: that is where a request says what it wants."""
_SURE = 1e-4
"""Nats that are added before a logarithm is taken: below that, doubts are not told apart."""


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
    """Named features of the judged tokens and of the prompt; always the same names.

    Args:
        ended: the answer ended within them; `cut`: it ended because it was too long.
    """
    words = len(prompt.split())
    return {
        **_logprob_features([token.logprob for token in tokens]),
        **_spread_features([token.margin for token in tokens], [token.entropy for token in tokens]),
        "log_tokens": math.log1p(len(tokens)),
        "log_tokens_per_word": math.log((1 + len(tokens)) / (1 + words)),
        "ended": float(ended),
        "cut": float(cut),
        **prompt_features(prompt),
        **ngrams(prompt),
    }


def _logprob_features(logprobs: Sequence[float]) -> dict[str, float]:
    least, total, count = min(logprobs, default=0.0), sum(logprobs), max(len(logprobs), 1)
    third = math.ceil(len(logprobs) / 3)
    doubts = {"max": -least, "mean": -total / count, "sum": -total}
    return {
        **{f"logprob_q{round(100 * level):02d}": quantile(logprobs, level) for level in LEVELS},
        "logprob_mean": total / count,
        "logprob_sum": total,
        "logprob_first": logprobs[0] if logprobs else 0.0,
        "logprob_begin": sum(logprobs[:third]) / max(third, 1),
        "logprob_end": sum(logprobs[-third:]) / max(third, 1),
        # Small models tuned to a task are all but sure of most tokens: logarithms tell 0.99 from 0.9999.
        **{f"doubt_{name}": math.log(_SURE + max(value, 0.0)) for name, value in doubts.items()},
        "probability_min": math.exp(least),
        "probability_answer": math.exp(total),
        "doubtful": math.log1p(sum(value < math.log(0.9) for value in logprobs)),
        "doubtful_half": math.log1p(sum(value < math.log(0.5) for value in logprobs)),
        "doubtful_place": logprobs.index(least) / count if logprobs else 0.0,
    }


def _spread_features(margins: Sequence[float], entropies: Sequence[float]) -> dict[str, float]:
    return {
        "margin_min": min(margins, default=1.0),
        "margin_q10": quantile(margins, 0.1) if margins else 1.0,
        "margin_q25": quantile(margins, 0.25) if margins else 1.0,
        "margin_mean": sum(margins) / len(margins) if margins else 1.0,
        "margin_first": margins[0] if margins else 1.0,
        "entropy_max": max(entropies, default=0.0),
        "entropy_q90": quantile(entropies, 0.9),
        "entropy_mean": sum(entropies) / len(entropies) if entropies else 0.0,
        "entropy_first": entropies[0] if entropies else 0.0,
    }


def prompt_features(prompt: str) -> Mapping[str, float]:
    words, numbers = prompt.split(), re.findall(r"\d+", prompt)
    return {
        "prompt_log_words": math.log1p(len(words)),
        "prompt_digits": sum(letter.isdigit() for letter in prompt) / max(len(prompt), 1),
        "prompt_question": float("?" in prompt),
        "prompt_lines": math.log1p(prompt.count("\n")),
        "prompt_log_numbers": math.log1p(len(numbers)),
        "prompt_log_longest_number": math.log1p(max(map(len, numbers), default=0)),
        "prompt_capitals": sum(word[0].isupper() for word in words) / max(len(words), 1),
        "prompt_punctuation": sum(not (letter.isalnum() or letter.isspace()) for letter in prompt)
        / max(len(prompt), 1),
        "prompt_word_length": sum(map(len, words)) / max(len(words), 1),
    }


def ngrams(prompt: str) -> dict[str, float]:
    """Whether a bucket has one of the prompt's words or pairs of words, by a hash; numbers count by their length."""
    words = [f"#{len(word)}" if word.isdigit() else word for word in _WORD.findall(prompt.casefold())]
    if len(words) > 2 * _ENDS:
        words = [*words[:_ENDS], *words[-_ENDS:]]
    pairs = [f"{one} {other}" for one, other in itertools.pairwise(words)]
    filled = {zlib.crc32(gram.encode()) % BUCKETS for gram in (*words, *pairs)}
    return {f"{NGRAM}{place:03d}": float(place in filled) for place in range(BUCKETS)}


def loggable(found: Mapping[str, float]) -> dict[str, float]:
    """Without what would tell which words a prompt had."""
    return {name: value for name, value in found.items() if not name.startswith((NGRAM, EMBEDDING))}


NAMES = frozenset(features((), "", False, False))
"""Of all features that this version makes: a calibration that needs another one is stale."""
