"""Granite 3 and 4, dense: Llama with factors on embedding, attention, residuals and logits."""

from __future__ import annotations

from collections.abc import Iterator

from ..gguf_writer import float32
from ..rope import llama3
from .family import LLAMA_KEYS, MLP, NORMS, OTHER_BIAS, RMS_NORM, Config, Family, Key, attention, attention_bias

FACTORS = {
    "attention_multiplier": "attention.scale",
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "logits_scaling": "logit_scale",
}


def check(config: Config) -> Iterator[str]:
    for setting in FACTORS:
        if not config[setting]:
            yield f"{setting} is 0, which llama.cpp takes for 'not set'"


FAMILY = Family(
    name="granite",
    classes=("GraniteForCausalLM",),
    model_types=("granite",),
    layer={**NORMS, **attention(rotary=True), **MLP},
    optional={**attention_bias(rotary=True), **OTHER_BIAS},
    defaults={
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        **dict.fromkeys(FACTORS, 1.0),
    },
    only={"hidden_act": "silu", "head_dim": None},
    check=check,
    rope=("default", "linear", "yarn", "llama3"),
    extra=llama3,
    keys=(RMS_NORM, *LLAMA_KEYS, *(Key(name, float32, setting) for setting, name in FACTORS.items())),
)
