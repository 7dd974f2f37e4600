"""Of all files that a model could be made into, the best for a device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from edgeft.device import DeviceProfile
from edgeft.forecast.facts import TARGETS, ModelFacts, as_exported
from edgeft.forecast.fit import Forecast, forecast

FLUENT = 5.0
"""Tokens per second that a reader does not have to wait for: about 200 words a minute, with 1.4 tokens per word."""

GOOD = 4.5
"""Bits per weight; with fewer, small models lose more than speed makes up for."""


@dataclass(frozen=True)
class Choice:
    """An artifact with its settings, and how it was chosen."""

    target: str
    """The export target, or "as it is" for a file that is there."""
    bits_per_weight: float
    forecast: Forecast
    fluent: bool
    """Whether the lower end of its band decodes as fast as was asked for."""

    def as_dict(self) -> dict[str, Any]:
        return {
            "target": self.target,
            "bits_per_weight": round(self.bits_per_weight, 2),
            "fluent": self.fluent,
            **self.forecast.as_dict(),
        }


def candidates(facts: ModelFacts) -> dict[str, ModelFacts]:
    """Target -> what it makes of a checkpoint; f16 is left out, q8_0 says the same in half the bytes."""
    if facts.format == "gguf":
        return {"as it is": facts}
    return {target: as_exported(facts, target) for target in TARGETS if target != "gguf-f16"}


def choices(
    facts: ModelFacts, device: DeviceProfile, context: int | None, kv_type: str, speed: float = FLUENT
) -> list[Choice]:
    """All candidates, the one with most bits per weight first."""
    found = [
        Choice(target, 8 * made.bytes / made.parameters, each, each.decode.low >= speed)
        for target, made in candidates(facts).items()
        for each in [forecast(made, device, context, kv_type)]
    ]
    return sorted(found, key=lambda choice: -choice.bits_per_weight)


def best(found: Sequence[Choice]) -> Choice:
    """Most bits per weight among those that fit and are fast enough; where none is, the fastest; fewer than `GOOD` bits
    for want of room only."""
    fitting = [choice for choice in found if choice.forecast.fits]
    good = [choice for choice in fitting if choice.bits_per_weight >= GOOD]
    fluent = [choice for choice in good if choice.fluent]
    if fluent:
        return fluent[0]
    if good:
        return max(good, key=lambda choice: choice.forecast.decode.value)
    return fitting[0] if fitting else found[-1]
