"""SmolLM3: Llama in which every fourth layer has no rotary positions."""

from __future__ import annotations

from collections.abc import Iterator

from .family import LLAMA_KEYS, MLP, NORMS, RMS_NORM, SAID_HEAD_SIZE, Config, Family, attention

STEP = 4
"""llama.cpp's `n_no_rope_layer_step` of this family."""


def check(config: Config) -> Iterator[str]:
    layers = range(config["num_hidden_layers"])
    step = config["no_rope_layer_interval"]
    rotary = config.get("no_rope_layers") or [int((layer + 1) % step != 0) for layer in layers]
    if list(rotary) != [int((layer + 1) % STEP != 0) for layer in layers]:
        yield "layers without rotary positions are not every fourth (no_rope_layers), as llama.cpp takes them to be"
    if config["use_sliding_window"] and config.get("sliding_window"):
        yield "it uses a sliding window, which llama.cpp does not do in this family"


FAMILY = Family(
    name="smollm3",
    classes=("SmolLM3ForCausalLM",),
    model_types=("smollm3",),
    layer={**NORMS, **attention(rotary=True), **MLP},
    defaults={
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "rope_theta": 2_000_000.0,
        "no_rope_layer_interval": STEP,
        "use_sliding_window": False,
        "tie_word_embeddings": True,
    },
    check=check,
    keys=(RMS_NORM, *SAID_HEAD_SIZE, *LLAMA_KEYS),
)
