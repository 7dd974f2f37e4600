"""Qwen 2 and 2.5. A sliding window (`use_sliding_window`) is not expressed; see docs/gguf-metadata.md."""

from __future__ import annotations

from .family import MLP, NORMS, RMS_NORM, SAID_HEAD_SIZE, Family, attention, attention_bias

FAMILY = Family(
    name="qwen2",
    classes=("Qwen2ForCausalLM",),
    model_types=("qwen2",),
    layer={**NORMS, **attention(), **attention_bias(), **MLP},
    defaults={"rms_norm_eps": 1e-6, "hidden_act": "silu", "num_key_value_heads": 32},
    keys=(RMS_NORM, *SAID_HEAD_SIZE),
)
