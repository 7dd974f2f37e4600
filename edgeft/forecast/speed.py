"""Tokens per second: decoding is bound by reading weights, a prompt by arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

from edgeft.device import BASES, DeviceProfile, Figure
from edgeft.forecast.facts import ModelFacts
from edgeft.forecast.memory import kv_bytes, repackable

_ATTENTION = 0.85
"""Attention over a token that is kept costs this many times its bytes and the query heads that share a key head:
i7-12700H, Qwen2.5-0.5B 74 and 39 %, 1.5B 80 and 45 % of the speed at 2048 and 8192 tokens (llama-roofline)."""


@dataclass(frozen=True)
class Range:
    """A forecast and its error band."""

    value: float
    low: float
    high: float

    @classmethod
    def around(cls, value: float, figure: Figure) -> Range:
        band = BASES[figure.basis]
        return cls(value, value * (1 - band), value * (1 + band))


def decode(facts: ModelFacts, device: DeviceProfile, past: int = 0, kv_type: str = "f16") -> Range:
    """Tokens per second after `past` tokens."""
    return Range.around(decode_rate(facts, device.bandwidth.value, past, kv_type), device.bandwidth)


def decode_rate(facts: ModelFacts, bandwidth: float, past: int = 0, kv_type: str = "f16") -> float:
    """Tokens per second; `bandwidth` in GB/s."""
    shared = facts.heads / max(1, facts.kv_heads)
    attention = max(1.0, _ATTENTION * shared) * kv_bytes(facts, past, kv_type)
    return bandwidth * 1e9 / (facts.streamed() + attention)


def prefill(facts: ModelFacts, device: DeviceProfile, *, repack: bool = True) -> Range:
    """Tokens of a prompt per second: 2 operations per weight, at the rate of the kernels its type has."""
    fast = device.prefill_repacked if repack else None
    share = repackable(facts, device) / facts.bytes if fast is not None and facts.bytes else 0.0
    seconds = share / fast.value if fast is not None else 0.0
    seconds += (1 - share) / device.prefill.value
    figure = fast if fast is not None and share > 0.5 else device.prefill
    return Range.around(1e9 / (2 * facts.active() * seconds), figure)
