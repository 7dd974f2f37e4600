"""OLMo 2: norms behind attention and feed-forward, not before; norms over all heads of query and key at once."""

from __future__ import annotations

from .family import MLP, RMS_NORM, SAID_HEAD_SIZE, Family, attention, to

FAMILY = Family(
    name="olmo2",
    classes=("Olmo2ForCausalLM",),
    model_types=("olmo2",),
    layer={
        **attention(),
        "self_attn.q_norm.weight": to("attn_q_norm.weight", "q"),
        "self_attn.k_norm.weight": to("attn_k_norm.weight", "kv"),
        "post_attention_layernorm.weight": to("post_attention_norm.weight", "hidden"),
        **MLP,
        "post_feedforward_layernorm.weight": to("post_ffw_norm.weight", "hidden"),
    },
    head="required",
    defaults={"rms_norm_eps": 1e-5, "hidden_act": "silu", "max_position_embeddings": 2048, "attention_bias": False},
    only={"hidden_act": "silu", "attention_bias": False},
    keys=(RMS_NORM, *SAID_HEAD_SIZE),
)
