"""StableLM 3B and StableLM 2: norms with mean and bias, part of each head rotated."""

from __future__ import annotations

from ..gguf_writer import boolean, float32, uint32
from ..rope import rotated
from .family import MLP, NORMS, TOP, Family, Key, attention, attention_bias, to

FAMILY = Family(
    name="stablelm",
    classes=("StableLmForCausalLM",),
    model_types=("stablelm",),
    layer={
        "input_layernorm.weight": NORMS["input_layernorm.weight"],
        "input_layernorm.bias": to("attn_norm.bias", "hidden"),
        **attention(),
        **MLP,
    },
    optional={
        # Missing where attention and feed-forward are parallel (12B).
        "post_attention_layernorm.weight": NORMS["post_attention_layernorm.weight"],
        "post_attention_layernorm.bias": to("ffn_norm.bias", "hidden"),
        **attention_bias(),
        "self_attn.q_layernorm.norms.{heads}.weight": to("attn_q_norm.weight", "head"),
        "self_attn.k_layernorm.norms.{kv_heads}.weight": to("attn_k_norm.weight", "head"),
    },
    top={**TOP, "model.norm.bias": to("output_norm.bias", "hidden")},
    head="required",
    defaults={
        "layer_norm_eps": 1e-5,
        "hidden_act": "silu",
        "num_key_value_heads": 32,
        "max_position_embeddings": 4096,
        "partial_rotary_factor": 0.25,
        "use_parallel_residual": False,
    },
    rope=("default",),
    keys=(
        Key("attention.layer_norm_epsilon", float32, "layer_norm_eps"),
        Key("rope.dimension_count", uint32, rotated),
        Key("use_parallel_residual", boolean, "use_parallel_residual"),
    ),
)
