"""What to try when a step loses too much."""

from __future__ import annotations

from dataclasses import dataclass

from edgeft.plugins import Source
from edgeft.verify.ledger import Ledger, Row

FELT = 1e-4
"""KL from the step before, nats per token, below which a step is not worth a change: 16-bit files have about this."""


@dataclass(frozen=True)
class Shipped:
    """What decides which way out there is."""

    source: Source
    directory: bool
    """An ONNX directory, not a GGUF."""
    beside: bool
    """The adapter lies beside its base."""
    bits_per_weight: float
    bytes: int


def advice(ledger: Ledger, shipped: Shipped) -> str:
    """One sentence: the step that loses most, and the fix to try."""
    worst = ledger.loses_most
    if worst is None or worst.lost is None:
        return "There is but one step: nothing to compare it with."
    if worst.lost.value < FELT:
        return f"No step loses anything to speak of (at most {worst.lost.value:.2g} nats per token: {worst.title})."
    loss = f"Most is lost at “{worst.title}”: {worst.lost.value:.3g} nats per token from the step before."
    return f"{loss} {_fix(worst, ledger, shipped)}"


def _fix(worst: Row, ledger: Ledger, shipped: Shipped) -> str:
    if worst.name in ("merged", "unmerged"):
        return _merge(shipped)
    quantized = worst.name == "tensors" or ledger.row("tensors") is None
    if quantized and shipped.beside and shipped.source.gguf is None:
        return "The adapter was trained over other weights than this base's: edgeft train --model BASE.gguf."
    if quantized and not shipped.beside:
        return _onnx_types(shipped) if shipped.directory else _gguf_types(shipped)
    return _runtime(shipped)


def _merge(shipped: Shipped) -> str:
    if shipped.source.gguf is None and shipped.source.adapter is not None:
        return (
            "Training computed in 16 bits, the merge has 32: train with --dtype float32, or ship the adapter "
            "unmerged (--to gguf-lora)."
        )
    return "Training computed in 16 bits: train with --dtype float32."


_LARGER = ((4.75, "gguf-q5_k_m"), (6.25, "gguf-q6_k"), (8.0, "gguf-q8_0"), (12.0, "gguf-bf16"))
"""Bits per weight below which the type is a larger one."""


def _gguf_types(shipped: Shipped) -> str:
    size = f"{shipped.bytes / 1e6:.0f}MB"
    larger = next((name for bits, name in _LARGER if shipped.bits_per_weight < bits), None)
    if larger is None:
        return "Rounding to 16 bits is all there is: --to gguf-f16 rounds values near 1 less than gguf-bf16."
    if larger == "gguf-bf16":
        return "More bits: --to gguf-bf16."
    return (
        f"At the same size, choose types by what they cost: --fit {size} (with an importance matrix of your own text); "
        f"with more bits: --to {larger}."
    )


def _onnx_types(shipped: Shipped) -> str:
    if shipped.bits_per_weight < 7:
        return "Smaller blocks (--set block=16), more bits (--to onnx-int8), or --to gguf with --fit."
    return "Without rounding: --to onnx-fp32."


def _runtime(shipped: Shipped) -> str:
    if shipped.directory:
        return "The kernels round activations to 8 bits: --set accuracy-level=1 keeps them in float32, and is slower."
    return (
        "llama.cpp rounds activations to 8 bits in products with quantized weights; that is its speed. Another build "
        "(--runtime xllamacpp or llama-cpp-python) tells rounding from a fault; --to gguf-bf16 has no such products."
    )
