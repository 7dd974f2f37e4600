"""A profile from the times of synthetic models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date

from edgeft import plugins
from edgeft.device import DeviceProfile, Figure, Kernel
from edgeft.forecast.facts import ModelFacts
from edgeft.forecast.memory import BASE_PER_TOKEN, Settings, kv_bytes, memory
from edgeft.probe.machine import Machine
from edgeft.probe.synthetic import Shape

LOCAL = "local"
TOKENS = 32
"""Decoded after each prompt."""
_LEAST_OVERHEAD = 1e-7
"""Seconds per layer; where timing says less, it is lost in the noise."""


@dataclass(frozen=True)
class Timing:
    """One synthetic model."""

    shape: Shape
    runtime: str
    begun: int
    """Tokens of the first prompt."""
    seconds: float
    """Per token decoded after it."""
    past: int
    """Tokens of the last one."""
    past_seconds: float
    prompt_tps: float
    own_bytes: int | None
    """Resident and of no file, after loading."""
    context: int
    peak_bytes: int | None


@dataclass(frozen=True)
class Seen:
    """All that was measured."""

    machine: Machine
    threads: int
    """That decode fastest."""
    sweep: Mapping[int, Timing]
    """By threads, all of one type."""
    small: Timing
    """Of a model with short rows and much attention."""
    timings: Sequence[Timing]
    storage: float | None
    """MB/s."""
    broad: Timing | None = None
    """Of a model with many heads side by side; None: there was no time for it."""


def profile(seen: Seen, facts: Mapping[Shape, ModelFacts]) -> DeviceProfile:
    attention = _attention(seen.small, facts[seen.small.shape])
    broad, runtime = seen.broad, seen.small.runtime
    fixed = Fixed(_overhead(seen, facts, attention), attention.value if attention else None)
    small_facts = facts[seen.small.shape]
    kernels = tuple(_kernel(timing, facts[timing.shape], small_facts, seen, fixed) for timing in seen.timings)
    rates = sorted(kernel.decode.value for kernel in kernels)
    plain = [kernel.prefill for kernel in kernels if not kernel.repacked] or [kernels[0].prefill]
    fast = [kernel.prefill for kernel in kernels if kernel.repacked]
    found = seen.machine
    unfinished = DeviceProfile(
        name=LOCAL,
        title=f"This machine: {found.cpu}, {found.memory / 1e9:.1f} GB",
        architecture=found.architecture,
        python=found.python,
        glibc=found.glibc,
        cpu=f"{found.cores} cores, {found.cpu}",
        isa=found.isa,
        system=found.system,
        cores=_said(found.cores, "the system's own count"),
        decode_threads=_said(seen.threads, "fastest of " + _by_threads(seen)),
        memory=_said(found.memory, "the system's own count"),
        reserve=_said(found.in_use, "in use when it was measured"),
        bandwidth=_timed(rates[len(rates) // 2], f"median of {len(kernels)} types", runtime),
        prefill=_timed(_median(plain), f"median of {len(plain)} types that are not repacked", runtime),
        prefill_repacked=_timed(_median(fast), f"median of {len(fast)} types that are", runtime) if fast else None,
        storage=_said(round(seen.storage), "a file read that was not in memory") if seen.storage else None,
        attention=attention,
        attention_wide=_attention(broad, facts[broad.shape]) if broad and attention else None,
        overhead=_timed(fixed.overhead * 1e6, "a model with short rows", runtime),
        runtime=runtime,
        flash_attention=bool(getattr(plugins.load("runtimes", runtime), "flash_attention", True)),
        kernels=kernels,
    )
    return replace(unfinished, base=_base(unfinished, seen.small, facts[seen.small.shape]))


def _said(value: float, source: str) -> Figure:
    return Figure(value, "measured", source)


def _timed(value: float, what: str, runtime: str) -> Figure:
    day = date.today().isoformat()
    return Figure(float(f"{value:.4g}"), "measured", f"{what}: edgeft devices probe with {runtime}, {day}")


def _median(figures: Sequence[Figure]) -> float:
    values = sorted(figure.value for figure in figures)
    return values[len(values) // 2]


def _by_threads(seen: Seen) -> str:
    """What each number of threads made of the first type."""
    rates = {count: timing.shape.bytes / timing.seconds / 1e9 for count, timing in seen.sweep.items()}
    type_ = next(iter(seen.sweep.values())).shape.type
    return f"{type_}, GB/s by threads: " + ", ".join(f"{count}: {rate:.1f}" for count, rate in rates.items())


def _overhead(seen: Seen, facts: Mapping[Shape, ModelFacts], attention: Figure | None) -> float:
    """Seconds per layer besides its weights, from two models of one type:

        t - attention = bytes / rate + layers x overhead

    for the small one and for the large one of its type (for want of it, of the first type).
    """
    small, large = seen.small, seen.timings[0]
    large = next((timing for timing in seen.timings if timing.shape.type == small.shape.type), large)
    share = facts[small.shape].streamed() / facts[large.shape].streamed()
    alone = Fixed(0.0, attention.value if attention else None)
    short, long = (
        timing.seconds - alone.seconds(facts[timing.shape], timing.begun + TOKENS // 2) for timing in (small, large)
    )
    layers = small.shape.layers - large.shape.layers * share
    return max((short - long * share) / layers, _LEAST_OVERHEAD)


@dataclass(frozen=True)
class Fixed:
    """What a token costs besides its weights."""

    overhead: float
    """Seconds per layer."""
    attention: float | None
    """GB/s."""

    def seconds(self, facts: ModelFacts, past: int) -> float:
        kept = kv_bytes(facts, past) * facts.heads / facts.kv_heads
        return facts.layers * self.overhead + (kept / self.attention / 1e9 if self.attention else 0.0)


def _kernel(timing: Timing, facts: ModelFacts, small_facts: ModelFacts, seen: Seen, fixed: Fixed) -> Kernel:
    past = timing.begun + TOKENS // 2
    seconds = max(timing.seconds - fixed.seconds(facts, past), 0.1 * timing.seconds)
    what = f"{facts.bytes / 1e6:.0f} MB"
    return Kernel(
        timing.shape.type,
        _timed(facts.streamed() / seconds / 1e9, what, seen.small.runtime),
        _timed(2 * timing.shape.weights * timing.prompt_tps / 1e9, what, seen.small.runtime),
        _repacked(timing, facts, seen.small, small_facts),
    )


def _repacked(timing: Timing, facts: ModelFacts, small: Timing, small_facts: ModelFacts) -> bool:
    """Weights that stay as they are belong to the mapped file, copies to the process."""
    if timing.own_bytes is None or small.own_bytes is None:
        return False
    own = timing.own_bytes - kv_bytes(facts, timing.context)
    other = small.own_bytes - kv_bytes(small_facts, small.context)
    return own - other > 0.5 * timing.shape.bytes


def _attention(timing: Timing, facts: ModelFacts) -> Figure | None:
    """GB/s, once per query head, as `edgeft.forecast.speed` counts it; None when more tokens cost no more."""
    seconds = timing.past_seconds - timing.seconds
    kept = kv_bytes(facts, timing.past - timing.begun) * facts.heads / facts.kv_heads
    return _timed(kept / seconds / 1e9, f"{timing.past} tokens kept", timing.runtime) if seconds > 0 else None


def _base(unfinished: DeviceProfile, small: Timing, facts: ModelFacts) -> Figure | None:
    """What the peak has besides the parts that are forecast."""
    if small.peak_bytes is None:
        return None
    other = memory(facts, unfinished, Settings(small.context))
    rest = small.peak_bytes - (other.total - other.runtime) - BASE_PER_TOKEN * facts.vocabulary
    return _said(max(rest, 1), f"a small model in {small.runtime}")
