"""Whether a ternary file or another one is the better choice: loss, bytes and speed of both, and a plain sentence.

Below two billion parameters, published ternary retrofits lose to Q4_K_M (docs/ternary.md has the figures), so a ternary
file is not taken for good because it is small: it is set beside a file with 4 bits, or one of the same size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgeft.data.example import Example
from edgeft.errors import DataError
from edgeft.progress import Progress

SPEED_EXAMPLES = 20
"""Answers that decoding is timed on."""

_SAME_BYTES = 1.02
"""Files count as of equal size up to this factor."""
_SAME_LOSS = 0.005
"""Losses closer than this, in nats per token, count as equal."""


@dataclass(frozen=True)
class Figures:
    """What a file costs and what it is worth, on this machine."""

    name: str
    bytes: int
    nll: float
    """Nats per token of the reference answers."""
    tokens_per_s: float | None = None
    """Decoding, median over answers."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure(file: Path, examples: Sequence[Example], runtime: str, progress: Progress) -> Figures:
    """Raises: DataError when the file has no chat template; ModelError, MissingDependency."""
    from edgeft.evaluate import predict, reference_nll, speed
    from edgeft.sessions import open_session

    opened = open_session(str(file), runtime, progress=progress, needs="scores")
    with opened.session as session:
        nll = reference_nll(session, opened.artifact.path, examples)
        if nll is None:
            raise DataError(f"{file} has no chat template to score answers with")
        chats = [example for example in examples if example.messages][:SPEED_EXAMPLES]
        usages = [answer.usage for answer in predict(session, chats, progress)] if chats else []
    return Figures(file.name, file.stat().st_size, nll, speed(usages)["decode_tokens_per_s"])


def verdict(ternary: Figures, other: Figures) -> str:
    """One sentence that says which file to ship, and what speaks for the other."""
    size = _than(other.bytes / ternary.bytes, "the size")
    loss = f"loss {ternary.nll:.4f} ternary, {other.nll:.4f} {other.name}"
    gain = ternary.nll - other.nll
    speed = _speed(ternary, other)
    if abs(gain) < _SAME_LOSS:
        smaller = ternary if ternary.bytes * _SAME_BYTES < other.bytes else other
        choice = "the ternary file: as good and smaller" if smaller is ternary else f"{other.name}: as good, no larger"
    elif gain < 0:
        choice = "the ternary file: it answers better"
    elif other.bytes <= _SAME_BYTES * ternary.bytes:
        choice = f"{other.name}: it is better at equal bytes or less"
    else:
        choice = f"{other.name}, unless its size does not fit: it is better"
    return f"Take {choice} ({loss}; {other.name} has {size}{speed})."


def _speed(ternary: Figures, other: Figures) -> str:
    if not ternary.tokens_per_s or not other.tokens_per_s:
        return ""
    return f" and decodes at {_than(other.tokens_per_s / ternary.tokens_per_s, 'the speed')}"


def _than(factor: float, what: str) -> str:
    return f"{factor:.2f} times {what}"
