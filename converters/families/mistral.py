"""Mistral 7B and Nemo: Llama to llama.cpp. Its sliding window (7B v0.1) is not expressed; see docs/gguf-metadata.md."""

from __future__ import annotations

from ..rope import llama3
from .family import HEAD_SIZE, LLAMA_KEYS, MLP, NORMS, RMS_NORM, Family, attention

FAMILY = Family(
    name="llama",
    classes=("MistralForCausalLM",),
    model_types=("mistral",),
    layer={**NORMS, **attention(rotary=True), **MLP},
    defaults={"rms_norm_eps": 1e-6, "hidden_act": "silu", "num_key_value_heads": 8},
    rope=("default", "linear", "yarn", "llama3"),
    extra=llama3,
    keys=(RMS_NORM, *HEAD_SIZE, *LLAMA_KEYS),
)
