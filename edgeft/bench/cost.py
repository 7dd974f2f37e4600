"""What a thousand tokens take: joules of the processor, or of the device's stated power, times the price of energy."""

from __future__ import annotations

from dataclasses import dataclass

from edgeft.bench.suite import Measured

JOULES_PER_KWH = 3.6e6


@dataclass(frozen=True)
class Cost:
    """Of 1,000 tokens."""

    joules: float
    money: float | None
    """In the currency of the price."""
    source: str


def of_decoding(found: Measured, watts: float | None, price: float | None) -> Cost | None:
    """Of decoded tokens; None when neither the kernel counts energy nor `watts` are given.

    Args:
        watts: power of the device at work; goes before what the kernel counts, which is the processor's alone.
        price: of a kilowatt-hour.
    """
    speed = found.decode_full_tps.median
    return _cost(watts / speed if watts else found.decode_joules, watts, price)


def of_prompts(found: Measured, watts: float | None, price: float | None) -> Cost | None:
    speed = found.prefill_tps.median
    return _cost(watts / speed if watts else found.prompt_joules, watts, price)


def _cost(per_token: float | None, watts: float | None, price: float | None) -> Cost | None:
    if per_token is None:
        return None
    joules = 1000 * per_token
    money = joules / JOULES_PER_KWH * price if price is not None else None
    return Cost(joules, money, f"{watts:g} W as given" if watts else "counted by the kernel, processor only")
