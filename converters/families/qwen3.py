"""Qwen 3, dense."""

from __future__ import annotations

from .family import MLP, NORMS, QK_NORM, Family, attention, attention_bias

FAMILY = Family(
    name="qwen3",
    classes=("Qwen3ForCausalLM",),
    model_types=("qwen3",),
    layer={**NORMS, **attention(), **QK_NORM, **MLP},
    optional=attention_bias(),
    defaults={"rms_norm_eps": 1e-6, "hidden_act": "silu", "num_key_value_heads": 32, "head_dim": 128},
)
