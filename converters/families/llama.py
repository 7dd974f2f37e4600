"""Llama 2, 3, 3.1, 3.2, and the many models of the same class (SmolLM2, TinyLlama)."""

from __future__ import annotations

from ..rope import llama3
from .family import HEAD_SIZE, LLAMA_KEYS, MLP, NORMS, OTHER_BIAS, RMS_NORM, Family, attention, attention_bias

FAMILY = Family(
    name="llama",
    classes=("LlamaForCausalLM",),
    model_types=("llama",),
    layer={**NORMS, **attention(rotary=True), **MLP},
    optional={**attention_bias(rotary=True), **OTHER_BIAS},
    defaults={"rms_norm_eps": 1e-6, "hidden_act": "silu"},
    rope=("default", "linear", "yarn", "llama3"),
    extra=llama3,
    keys=(RMS_NORM, *HEAD_SIZE, *LLAMA_KEYS),
)
