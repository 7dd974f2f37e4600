"""Whether a model fits a device, with which settings, how fast it will be; and if not, what is nearest that does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from edgeft.device import DeviceProfile
from edgeft.errors import CheckFailed
from edgeft.forecast.facts import ModelFacts, as_exported
from edgeft.forecast.memory import Memory, Settings, largest_context, memory, repackable
from edgeft.forecast.speed import Range, decode, prefill

DEFAULT_TARGET = "gguf-q4"
DEFAULT_CONTEXT = 4096
"""The runtimes' own default, where the model allows it."""
LEAST_BITS = 2.2
"""Below this no file is proposed."""


@dataclass(frozen=True)
class Forecast:
    model: str
    device: DeviceProfile
    settings: Settings
    memory: Memory
    fits: bool
    largest_context: int
    """0: not even 256 tokens fit."""
    decode: Range
    """Tokens per second at the beginning."""
    decode_full: Range
    """The same when the context is nearly full."""
    prefill: Range
    load_seconds: float | None
    """Reading the file the first time."""
    runtime: str
    """What to run it with."""
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        threads = {"threads": int(self.device.decode_threads.value), "threads_batch": int(self.device.cores.value)}
        return {
            "model": self.model,
            "device": self.device.name,
            "runtime": self.runtime,
            "fits": self.fits,
            "context": self.settings.context,
            "largest_context": self.largest_context,
            "settings": {**asdict(self.settings), **threads},
            "memory": {**asdict(self.memory), "total": self.memory.total, "usable": self.device.usable},
            "decode_tps": asdict(self.decode),
            "decode_full_tps": asdict(self.decode_full),
            "prefill_tps": asdict(self.prefill),
            "load_seconds": self.load_seconds,
            "notes": list(self.notes),
        }


def forecast(facts: ModelFacts, device: DeviceProfile, context: int | None = None, kv_type: str = "f16") -> Forecast:
    """With the first settings that fit: mapped and repacked, then repacked alone, then mapped alone."""
    tokens = context or min(DEFAULT_CONTEXT, facts.context)
    ways = [Settings(tokens, kv_type)]
    if repackable(facts, device):
        ways += [Settings(tokens, kv_type, mmap=False), Settings(tokens, kv_type, repack=False)]
    needed = [memory(facts, device, way).total for way in ways]
    fitting = [way for way, size in zip(ways, needed, strict=True) if size <= device.usable]
    chosen = fitting[0] if fitting else ways[-1]
    used = memory(facts, device, chosen)
    return Forecast(
        model=facts.name,
        device=device,
        settings=chosen,
        memory=used,
        fits=bool(fitting),
        largest_context=_largest(facts, device, kv_type),
        decode=decode(facts, device),
        decode_full=decode(facts, device, tokens, kv_type),
        prefill=prefill(facts, device, repack=chosen.repack),
        load_seconds=facts.bytes / device.storage.value / 1e6 if device.storage else None,
        runtime=runtime_for(device),
        notes=tuple(_notes(facts, device, chosen)),
    )


def runtime_for(device: DeviceProfile) -> str:
    """The one that was measured on it; else xllamacpp, whose wheel needs no compiler, but for processors whose fast
    kernels that wheel lacks; and where there is no Python, llama.cpp itself."""
    if device.runtime:
        return device.runtime
    if not device.python:
        return "llama.cpp"
    return "llama-cpp-python" if _needs_dot_products(device) else "xllamacpp"


def _needs_dot_products(device: DeviceProfile) -> bool:
    return device.architecture == "aarch64" and "asimddp" in device.isa and bool(device.glibc)


def _largest(facts: ModelFacts, device: DeviceProfile, kv_type: str) -> int:
    """Mapped or repacked, whichever takes less: mapped alone has no copy."""
    return largest_context(
        facts, lambda tokens: memory(facts, device, Settings(tokens, kv_type, repack=False)).total, device.usable
    )


def _notes(facts: ModelFacts, device: DeviceProfile, settings: Settings) -> list[str]:
    notes = []
    if settings.context > facts.context:
        notes.append(f"the model was trained for {facts.context} tokens, not {settings.context}")
    if not settings.mmap:
        notes.append("--mmap off: the file's pages and the repacked copy do not fit together")
    if not settings.repack:
        notes.append("--repack off: a copy in the faster order does not fit, and prompts take longer")
    if not device.runtime and _needs_dot_products(device):
        notes.append("needs a llama.cpp with dot-product kernels: PyPI's aarch64 wheel of xllamacpp has none")
    return notes


def file_budget(facts: ModelFacts, device: DeviceProfile, context: int | None = None, kv_type: str = "f16") -> int:
    """Bytes of weights that leave room for everything else; may be negative. One copy is counted, since a file that
    only fits once is loaded in one of the ways that keep one."""
    tokens = context or min(DEFAULT_CONTEXT, facts.context)
    rest = memory(facts, device, Settings(tokens, kv_type, repack=False))
    return device.usable - (rest.total - rest.weights)


def refuse(found: Forecast, facts: ModelFacts, devices: Sequence[DeviceProfile]) -> CheckFailed:
    """The error for a model that does not fit, with the nearest thing that will.

    Args:
        devices: others that may have room.
    """
    need, room = found.memory.total / 1e6, found.device.usable / 1e6
    return CheckFailed(
        f"{found.model} does not fit {found.device.title}: it needs {need:,.0f} MB with {found.settings.context} "
        f"tokens of context, {room:,.0f} MB are usable",
        nearest(found, facts, devices) or "Take a smaller model.",
    )


def nearest(found: Forecast, facts: ModelFacts, devices: Sequence[DeviceProfile]) -> str | None:
    """A shorter context, a smaller file, or a larger device, in this order."""
    if found.largest_context >= 512:
        return f"With --ctx {found.largest_context} it fits."
    tokens = found.settings.context
    budget = file_budget(facts, found.device, min(tokens, 2048), found.settings.kv_type)
    bits = 8 * budget / facts.parameters
    if bits >= LEAST_BITS:
        return (
            f"A file of at most {budget / 1e6:,.0f} MB ({bits:.1f} bits per weight) fits with {min(tokens, 2048)} "
            f"tokens: edgeft export MODEL --device {found.device.name}"
        )
    larger = [
        device
        for device in sorted(devices, key=lambda device: device.usable)
        if device.usable > found.device.usable and forecast(facts, device, tokens, found.settings.kv_type).fits
    ]
    return f"The smallest device it fits is {larger[0].name}." if larger else None


def exported(facts: ModelFacts, target: str | None) -> ModelFacts:
    """A GGUF as it is; a checkpoint as the file that export will make of it. Raises: UnsupportedModel."""
    if facts.format == "gguf" and target is None:
        return facts
    return as_exported(facts, target or DEFAULT_TARGET)
