"""Gemma 2: norms before and after each half of a layer, soft-capped logits, every other layer sees a window."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..gguf_writer import KeyValue, ValueType, array, float32, uint32
from .family import HEAD_SIZE, MLP, RMS_NORM, TOP, Config, Family, Key, Table, attention, to

LAYER: Table = {
    "input_layernorm.weight": to("attn_norm.weight", "hidden", plus_one=True),
    "post_attention_layernorm.weight": to("post_attention_norm.weight", "hidden", plus_one=True),
    "pre_feedforward_layernorm.weight": to("ffn_norm.weight", "hidden", plus_one=True),
    "post_feedforward_layernorm.weight": to("post_ffw_norm.weight", "hidden", plus_one=True),
    **attention(),
    **MLP,
}
GEMMA_TOP: Table = {**TOP, "model.norm.weight": to("output_norm.weight", "hidden", plus_one=True)}

GEMMA_ONLY: Config = {
    "hidden_activation": "gelu_pytorch_tanh",
    "attention_bias": False,
    "use_bidirectional_attention": None,
}
GEMMA_DEFAULTS: Config = {
    "rms_norm_eps": 1e-6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "attention_bias": False,
    "use_bidirectional_attention": None,
    "tie_word_embeddings": True,
}


def attention_scale(config: Config, big: int) -> Iterator[str]:
    """llama.cpp scales by the head's length, except in the model of `big` layers (27B): by hidden size / heads."""
    expected = config["head_dim"]
    if config["num_hidden_layers"] == big:
        expected = config["hidden_size"] // config["num_attention_heads"]
    if config["query_pre_attn_scalar"] != expected:
        yield f"query_pre_attn_scalar is {config['query_pre_attn_scalar']}, llama.cpp computes with {expected}"


def window_pattern(config: Config, every: int) -> Sequence[bool] | None:
    """Which layers see a window only, when it is not all but every `every`-th, as llama.cpp takes it to be."""
    layers = range(config["num_hidden_layers"])
    expected = [(layer + 1) % every != 0 for layer in layers]
    kinds = config.get("layer_types")
    step = config.get("sliding_window_pattern", config.get("_sliding_window_pattern")) or every
    found = [kind == "sliding_attention" for kind in kinds] if kinds else [(at + 1) % step != 0 for at in layers]
    return None if found == expected else found


def flags(key: str, value: Sequence[bool]) -> KeyValue:
    return array(key, ValueType.BOOL, value)


def check(config: Config) -> Iterator[str]:
    yield from attention_scale(config, 46)
    for setting in ("attn_logit_softcapping", "final_logit_softcapping", "sliding_window"):
        if not config[setting]:
            yield f"{setting} is switched off, which llama.cpp cannot do in this family"


FAMILY = Family(
    name="gemma2",
    classes=("Gemma2ForCausalLM",),
    model_types=("gemma2",),
    layer=LAYER,
    top=GEMMA_TOP,
    head="never",
    defaults={
        **GEMMA_DEFAULTS,
        "max_position_embeddings": 8192,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    only=GEMMA_ONLY,
    check=check,
    rope=("default",),
    keys=(
        RMS_NORM,
        *HEAD_SIZE,
        Key("attn_logit_softcapping", float32, "attn_logit_softcapping"),
        Key("final_logit_softcapping", float32, "final_logit_softcapping"),
        Key("attention.sliding_window", uint32, "sliding_window"),
        Key("attention.sliding_window_pattern", flags, lambda config: window_pattern(config, 2)),
    ),
)
