"""Qwen 3 with experts: their matrices are stacked into tensors of three dimensions.

Checkpoints have one matrix per expert; transformers 5 holds, and can save, all experts of a layer as one parameter,
with gate and up in it one after the other. Neither experts nor router are linear layers there, so QLoRA leaves them
in 16 bits.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..gguf_writer import uint32
from .family import NORMS, QK_NORM, RMS_NORM, SAID_HEAD_SIZE, Config, Family, Key, attention, attention_bias, to

EACH = {
    "mlp.experts.{experts}.gate_proj.weight": to("ffn_gate_exps.weight", "expert_ffn", "hidden", linear=False),
    "mlp.experts.{experts}.up_proj.weight": to("ffn_up_exps.weight", "expert_ffn", "hidden", linear=False),
    "mlp.experts.{experts}.down_proj.weight": to("ffn_down_exps.weight", "hidden", "expert_ffn", linear=False),
}
TOGETHER = {
    "mlp.experts.gate_up_proj": to(
        ("ffn_gate_exps.weight", "ffn_up_exps.weight"), "experts", "expert_gate_up", "hidden", linear=False
    ),
    "mlp.experts.down_proj": to("ffn_down_exps.weight", "experts", "hidden", "expert_ffn", linear=False),
}


def check(config: Config) -> Iterator[str]:
    if config["mlp_only_layers"] or config["decoder_sparse_step"] != 1:
        yield "some layers have no experts (mlp_only_layers, decoder_sparse_step); llama.cpp expects them in all"


FAMILY = Family(
    name="qwen3moe",
    classes=("Qwen3MoeForCausalLM",),
    model_types=("qwen3_moe",),
    layer={
        **NORMS,
        **attention(),
        **QK_NORM,
        "mlp.gate.weight": to("ffn_gate_inp.weight", "experts", "hidden", linear=False),
    },
    optional=attention_bias(),
    layouts=(EACH, TOGETHER),
    defaults={
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "num_key_value_heads": 4,
        "moe_intermediate_size": 768,
        "num_experts_per_tok": 8,
        "norm_topk_prob": False,
        "mlp_only_layers": [],
        "decoder_sparse_step": 1,
    },
    only={"hidden_act": "silu", "norm_topk_prob": True},
    check=check,
    keys=(
        RMS_NORM,
        *SAID_HEAD_SIZE,
        Key("expert_count", uint32, lambda config: config.get("num_experts") or config["num_local_experts"]),
        Key("expert_used_count", uint32, "num_experts_per_tok"),
        Key("expert_feed_forward_length", uint32, "moe_intermediate_size"),
    ),
)
