"""Peak memory of a model in llama.cpp, part by part."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

from edgeft.device import DeviceProfile
from edgeft.forecast.facts import ModelFacts

KV_TYPES = {"f16": 2.0, "q8_0": 34 / 32, "q4_0": 18 / 32}
"""Type of the cache of keys and values -> bytes per value (ggml's blocks)."""

UBATCH = 512
"""Tokens of a prompt that are computed at once: llama.cpp's and edgeft's default."""

_RUNTIME = 45_000_000
"""Python, edgeft and llama.cpp's library: SmolLM2-135M with 512 tokens in xllamacpp, less what the other terms give."""
BASE_PER_TOKEN = 400
"""Bytes per token of the vocabulary: text, both directions, merges. A model with 32,768 tokens took 13.2 MB more in
xllamacpp and 10.4 MB more in llama-cpp-python than one with 257."""

_REPACKED = {
    "avx2": ("Q4_0", "Q4_K", "IQ4_NL"),
    "avx512f": ("Q2_K",),
    "asimddp": ("Q4_0", "Q4_K", "IQ4_NL", "Q5_K", "Q6_K", "Q8_0"),
}
"""Instruction set -> types that ggml copies into another order for its kernels (ggml-cpu/repack.cpp)."""


@dataclass(frozen=True)
class Settings:
    """How a model is loaded."""

    context: int
    kv_type: str = "f16"
    mmap: bool = True
    repack: bool = True


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak. Mapped weights count: a page that is thrown out is read again for the next token."""

    weights: int
    repacked: int
    """Copies in another order; with mmap the file's own pages are there as well (llama.cpp issue 19578)."""
    kv: int
    compute: int
    runtime: int

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


def memory(facts: ModelFacts, device: DeviceProfile, settings: Settings) -> Memory:
    copied = repackable(facts, device) if settings.repack else 0
    return Memory(
        weights=facts.bytes - (0 if settings.mmap else copied),
        repacked=copied,
        kv=kv_bytes(facts, settings.context, settings.kv_type),
        compute=compute_bytes(facts, settings.context, flash_attention=device.flash_attention),
        runtime=int(device.base.value if device.base else _RUNTIME) + BASE_PER_TOKEN * facts.vocabulary,
    )


def repackable(facts: ModelFacts, device: DeviceProfile) -> int:
    """Bytes of the weights that this processor's kernels want in another order; look-up tables stay as they are."""
    types = {kind for name, kinds in _REPACKED.items() if name in device.isa for kind in kinds}
    measured = {kernel.type: kernel.repacked for kernel in device.kernels}
    types = {kind for kind in types if measured.get(kind, True)} | {kind for kind, yes in measured.items() if yes}
    return sum(part.bytes for part in facts.parts if part.type in types and part.role in ("layer", "expert", "head"))


def kv_bytes(facts: ModelFacts, tokens: int, kv_type: str = "f16") -> int:
    """Layers with a window keep it and one batch more (llama.cpp's cache for sliding windows)."""
    short = min(tokens, facts.window + UBATCH)
    pairs = zip(facts.kv_values, facts.windowed, strict=True)
    return int(KV_TYPES[kv_type] * sum(values * (short if windowed else tokens) for values, windowed in pairs))


def compute_bytes(facts: ModelFacts, context: int, *, flash_attention: bool = True) -> int:
    """Activations of one batch in float32, its mask over the context, and one row of logits.

    Without flash attention there are scores of every head besides, and a copy of them in 16 bits for the product with
    the values (ggml-cpu converts the right side of a product to the left one's type in its work buffer).
    """
    batch = min(UBATCH, context)
    scores = 0 if flash_attention else facts.heads * batch * context
    return 4 * (batch * (2 * facts.inner + 4 * facts.width) + batch * context + facts.vocabulary) + (4 + 2) * scores


def largest_context(facts: ModelFacts, needed: Callable[[int], int], room: int) -> int:
    """The most tokens, in steps of 256 and at most what the model was trained for, that fit; 0: not even 256.

    Args:
        needed: context -> bytes.
        room: bytes there are.
    """
    low, high = 0, max(1, facts.context // 256)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if needed(middle * 256) <= room else (low, middle - 1)
    return min(low * 256, facts.context)
