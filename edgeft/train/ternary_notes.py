"""What the plan of a ternary training says about types: which tensors become ternary, which do not, and why."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from edgeft import plugins
from edgeft.plugins import ConvertOptions, Source, TensorPlan
from edgeft.train.config import TrainConfig
from edgeft.train.ternary_settings import effective_ramp

RETROFIT = (
    "retrofit of trained weights: below 2 billion parameters, published ones lose to 4 bits at equal bytes; "
    "edgeft verify RUN FILE --against FILE4 says what holds here"
)

_TOP = {"token_embd.weight": "embedding", "output.weight": "head"}


def ternary_notes(config: TrainConfig, base: Path) -> list[str]:
    """Raises: ModelError, UnsupportedModel."""
    assert config.target is not None
    plan = plugins.load("converters", "gguf").plan(
        Source(base), config.target, ConvertOptions(Path("never-written.gguf"))
    )
    kind = config.target.removeprefix("gguf-").upper()
    layers = [tensor for tensor in plan.tensors if tensor.name.startswith("blk.") and len(tensor.shape) > 1]
    return [
        *([] if config.from_scratch else [RETROFIT]),
        _share(layers, kind),
        *_fallbacks(layers, kind),
        *_top(plan.tensors),
        f"scale: mean magnitude per {config.ternary_scale}, a float16 number; rounding grows over "
        f"{effective_ramp(config):.0%} of the steps; activations in {config.activations} bits",
    ]


def _share(layers: list[TensorPlan], kind: str) -> str:
    ternary = [tensor for tensor in layers if tensor.type == kind]
    share = sum(map(_weights, ternary)) / max(1, sum(map(_weights, layers)))
    return f"{len(ternary)} of {len(layers)} layer tensors become ternary ({kind}): {share:.0%} of the layers' weights"


def _fallbacks(layers: list[TensorPlan], kind: str) -> list[str]:
    """One line per type and reason, with the names as patterns."""
    found: dict[tuple[str, str], set[str]] = defaultdict(set)
    for tensor in layers:
        if tensor.type != kind and tensor.note:
            found[tensor.type, tensor.note].add(tensor.name.split(".", 2)[2].removesuffix(".weight"))
    return [
        f"not ternary: {', '.join(sorted(names))}: {note}; they are trained through {type_}"
        for (type_, note), names in found.items()
    ]


def _top(tensors: Sequence[TensorPlan]) -> list[str]:
    both = " and head, which are one" if all(tensor.name != "output.weight" for tensor in tensors) else ""
    whole = sum(tensor.bytes for tensor in tensors)
    return [
        f"{_TOP[tensor.name]}{both}: {tensor.type}, trained through that rounding; "
        f"{tensor.bytes / whole:.0%} of the file"
        for tensor in tensors
        if tensor.name in _TOP
    ]


def _weights(tensor: TensorPlan) -> int:
    total = 1
    for length in tensor.shape:
        total *= length
    return total
