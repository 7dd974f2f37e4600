"""Tokens per second: decoding is bound by reading weights, a prompt by arithmetic."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from edgeft.device import BASES, DeviceProfile, Figure
from edgeft.forecast.facts import ModelFacts
from edgeft.forecast.memory import KV_TYPES, kv_bytes, repackable

_ATTENTION = 0.85
"""Attention over a token that is kept costs this many times its bytes and the query heads that share a key head:
i7-12700H, Qwen2.5-0.5B 74 and 39 %, 1.5B 80 and 45 % of the speed at 2048 and 8192 tokens (llama-roofline)."""
ROWS = (384, 1024)
"""Bytes of one token's keys in a layer, of the probe's models for `attention` and for `attention_wide`."""


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

    def __str__(self) -> str:
        """The band: "18-25"."""
        return "-".join(f"{value:.0f}" if value >= 10 else f"{value:.2g}" for value in (self.low, self.high))


def decode(facts: ModelFacts, device: DeviceProfile, past: int = 0, kv_type: str = "f16") -> Range:
    """Tokens per second after `past` tokens."""
    seconds = token_seconds(facts, device, past, kv_type)
    return Range.around(1 / sum(seconds.values()), device.bandwidth)


def token_seconds(facts: ModelFacts, device: DeviceProfile, past: int = 0, kv_type: str = "f16") -> Mapping[str, float]:
    """What one decoded token takes: reading weights, going through what is kept, and what every layer costs."""
    weights = 0.0
    for part in facts.parts:
        kernel = device.kernel(part.type)
        rate = kernel.decode if kernel else device.bandwidth
        weights += facts.read(part) / rate.value / 1e9
    overhead = device.overhead.value * 1e-6 * facts.layers if device.overhead else 0.0
    return {"weights": weights, "attention": _attention(facts, device, past, kv_type), "overhead": overhead}


def _attention(facts: ModelFacts, device: DeviceProfile, past: int, kv_type: str) -> float:
    shared, kept = facts.heads / max(1, facts.kv_heads), kv_bytes(facts, past, kv_type)
    if device.attention:
        return shared * kept / _attention_rate(facts, device, kv_type) / 1e9
    return max(1.0, _ATTENTION * shared) * kept / device.bandwidth.value / 1e9


def _attention_rate(facts: ModelFacts, device: DeviceProfile, kv_type: str) -> float:
    """GB/s, between the two that were measured by the logarithm of the row; beyond them as the nearer one."""
    assert device.attention
    near = device.attention.value
    if not device.attention_wide:
        return near
    row = min(max(max(facts.kv_values) / 2 * KV_TYPES[kv_type], ROWS[0]), ROWS[1])
    share = math.log(row / ROWS[0]) / math.log(ROWS[1] / ROWS[0])
    return float(near ** (1 - share) * device.attention_wide.value**share)


def prefill(facts: ModelFacts, device: DeviceProfile, *, repack: bool = True) -> Range:
    """Tokens of a prompt per second: 2 operations per weight, at the rate of the kernels its type has."""
    if device.kernels:
        return Range.around(1 / _prompt_seconds(facts, device), device.prefill)
    fast = device.prefill_repacked if repack else None
    share = repackable(facts, device) / facts.bytes if fast is not None and facts.bytes else 0.0
    seconds = share / fast.value if fast is not None else 0.0
    seconds += (1 - share) / device.prefill.value
    figure = fast if fast is not None and share > 0.5 else device.prefill
    return Range.around(1e9 / (2 * facts.active() * seconds), figure)


def _prompt_seconds(facts: ModelFacts, device: DeviceProfile) -> float:
    """Of one token, by what was measured type by type. Embedding and head are not counted: the one is a look-up, and
    of the other only the last token has need."""
    seconds = 0.0
    for part in facts.parts:
        if part.role in ("layer", "expert"):
            kernel = device.kernel(part.type)
            rate = kernel.prefill if kernel else device.prefill
            seconds += 2 * facts.used(part) / rate.value / 1e9
    return seconds
