"""What a comparison of two artifacts found."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Changed:
    """Something both have, with another value, or that one of them lacks (None)."""

    name: str
    a: Any
    b: Any


@dataclass(frozen=True)
class TensorDifference:
    """One tensor; `relative_rms` is ‖a - b‖ / ‖a‖."""

    name: str
    type_a: str | None
    """None where the artifact lacks it."""
    type_b: str | None
    shape_a: tuple[int, ...] | None
    shape_b: tuple[int, ...] | None
    bytes_a: int
    bytes_b: int
    equal: bool
    """Same type, same shape, same bytes."""
    relative_rms: float | None = None
    """None where the values cannot be set against each other."""
    largest: float | None = None
    """Largest absolute difference of two values."""


@dataclass(frozen=True)
class Logits:
    """What both say about the same tokens."""

    texts: int
    tokens: int
    kl: float
    """Mean KL(A ‖ B), nats per token."""
    kl_worst: float
    same_top: float
    nll_a: float
    nll_b: float


@dataclass(frozen=True)
class Difference:
    """Two artifacts set against each other."""

    a: str
    b: str
    formats: tuple[str, str]
    bytes: tuple[int, int]
    bits_per_weight: tuple[float | None, float | None]
    metadata: tuple[Changed, ...]
    template: str
    """same, different, or who has none."""
    types: tuple[Changed, ...]
    """Type -> number of weights, where the two have another number."""
    tensors: tuple[TensorDifference, ...]
    tokenizer: str
    """same, different, or why it was not compared."""
    logits: Logits | None = None
    notes: tuple[str, ...] = ()
    """What was not compared, and why."""

    @property
    def same(self) -> bool:
        """Whether nothing that was compared differs."""
        answers = self.logits is None or (self.logits.kl == 0 and self.logits.same_top == 1)
        return (
            not self.metadata
            and not self.types
            and self.template != "different"
            and self.tokenizer != "different"
            and all(tensor.equal for tensor in self.tensors)
            and answers
        )

    @property
    def summary(self) -> str:
        if self.same:
            return "No difference was found."
        differing = sum(not tensor.equal for tensor in self.tensors)
        keys = len(self.metadata)
        parts = [f"{keys} metadata key{'s' if keys > 1 else ''}"] if keys else []
        parts += [name for name in ("template", "tokenizer") if getattr(self, name) == "different"]
        parts += [f"{differing} of {len(self.tensors)} tensors"] if differing else []
        parts += ["answers"] if self.logits and self.logits.kl > 0 else []
        return f"They differ in: {', '.join(parts)}."

    def as_dict(self) -> dict[str, Any]:
        return {"same": self.same, **dataclasses.asdict(self)}
