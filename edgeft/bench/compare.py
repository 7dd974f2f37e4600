"""A bench beside its forecast, and a device's profile corrected by it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from typing import Any

from edgeft.bench.suite import Measured
from edgeft.device import DeviceProfile, Figure
from edgeft.forecast.facts import ModelFacts
from edgeft.forecast.memory import Settings, memory
from edgeft.forecast.speed import decode, prefill


@dataclass(frozen=True)
class Compared:
    what: str
    measured: float
    forecast: float

    @property
    def error(self) -> float:
        """Relative to what was measured: 0.1 is forecast 10 % too high."""
        return self.forecast / self.measured - 1


def compared(facts: ModelFacts, device: DeviceProfile, found: Measured, tokens: int) -> list[Compared]:
    """Speeds in tokens per second, memory in bytes.

    Args:
        tokens: decoded after the prompt; the middle of them is where the speed is forecast.
    """
    past = found.prompt_tokens + tokens // 2
    pairs = [
        Compared("decode", found.decode_tps.median, decode(facts, device, tokens // 2).value),
        Compared("decode_full", found.decode_full_tps.median, decode(facts, device, past).value),
        Compared("prefill", found.prefill_tps.median, prefill(facts, device).value),
    ]
    filled = found.prompt_tokens + tokens >= 0.9 * found.context
    if found.peak_bytes is not None and filled:  # a forecast is of the most that a context can take
        total = memory(facts, device, Settings(found.context)).total
        pairs.append(Compared("peak_bytes", found.peak_bytes, total))
    return pairs


def as_dict(pairs: Sequence[Compared]) -> dict[str, Any]:
    return {
        pair.what: {"measured": pair.measured, "forecast": pair.forecast, "error": round(pair.error, 4)}
        for pair in pairs
    }


def fits_profile(device: DeviceProfile, found: Measured) -> str | None:
    """Why a comparison would say nothing; None where it does."""
    if device.runtime and device.runtime != found.runtime:
        return f"{device.name} was measured with {device.runtime}, this is {found.runtime}"
    threads = int(device.decode_threads.value)
    if found.threads not in (None, threads):
        return f"{device.name} is for {threads} threads, this is with {found.threads}"
    return None


def recalibrated(device: DeviceProfile, facts: ModelFacts, name: str, pairs: Sequence[Compared]) -> DeviceProfile:
    """The profile with speeds that give what was measured: those of the model's types, and the rates for all others
    where no type of the model was measured by itself.

    Layers' fixed costs and attention stay as they are.
    """
    source = f"edgeft bench {name}, {date.today().isoformat()}"
    by_name = {pair.what: pair for pair in pairs}
    rates = {
        "decode": _rate(facts, device, by_name["decode"].measured),
        "prefill": by_name["prefill"].measured / by_name["prefill"].forecast,
    }

    def scaled(figure: Figure, what: str) -> Figure:
        return Figure(round(figure.value * rates[what], 4), "measured", source)

    types = {part.type for part in facts.parts}
    if not types & {kernel.type for kernel in device.kernels}:
        fast = device.prefill_repacked
        return replace(
            device,
            bandwidth=scaled(device.bandwidth, "decode"),
            prefill=scaled(device.prefill, "prefill"),
            prefill_repacked=scaled(fast, "prefill") if fast else None,
        )
    kernels = tuple(
        replace(kernel, decode=scaled(kernel.decode, "decode"), prefill=scaled(kernel.prefill, "prefill"))
        if kernel.type in types
        else kernel
        for kernel in device.kernels
    )
    return replace(device, kernels=kernels)


def _rate(facts: ModelFacts, device: DeviceProfile, measured: float) -> float:
    """By how much reading weights must be faster for `measured` tokens per second at the start."""
    seconds = seconds_of(facts, device)
    fixed = seconds["overhead"]
    return seconds["weights"] / max(1 / measured - fixed, 0.1 / measured)


def seconds_of(facts: ModelFacts, device: DeviceProfile) -> Mapping[str, float]:
    from edgeft.forecast.speed import token_seconds

    return token_seconds(facts, device, 0)
