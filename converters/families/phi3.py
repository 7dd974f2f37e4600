"""Phi-3, Phi-3.5, Phi-4 and Phi-4-mini: query, key and value in one matrix, and gate and up in one.

llama.cpp does not use the sliding window of this family; see docs/gguf-metadata.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from ..gguf_writer import float32, uint32
from ..rope import head_size, longrope, rope_parameters, rotated
from .family import NORMS, RMS_NORM, Config, Family, Key, to


def attention_factor(config: Config) -> float | None:
    """What long rope multiplies query and key with; `_compute_longrope_parameters` of transformers."""
    rope = rope_parameters(config)
    if rope["rope_type"] not in ("su", "longrope"):
        return None
    if rope.get("attention_factor"):
        return float(rope["attention_factor"])
    original = rope["original_max_position_embeddings"]
    stretch = rope.get("factor") or config["max_position_embeddings"] / original
    return math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 else 1.0


def original_context(config: Config) -> int:
    return int(rope_parameters(config)["original_max_position_embeddings"])


def check(config: Config) -> Iterator[str]:
    if config["hidden_size"] != config["num_attention_heads"] * head_size(config):
        yield "head_dim is not hidden_size / num_attention_heads, as llama.cpp takes it to be"
    rope = rope_parameters(config)
    half = rotated(config) // 2
    for name in ("long_factor", "short_factor"):
        if rope["rope_type"] in ("su", "longrope") and len(rope.get(name) or ()) != half:
            yield f"{name} must have {half} values"


FAMILY = Family(
    name="phi3",
    classes=("Phi3ForCausalLM",),
    model_types=("phi3",),
    layer={
        **NORMS,
        "self_attn.qkv_proj.weight": to("attn_qkv.weight", "qkv", "hidden"),
        "self_attn.o_proj.weight": to("attn_output.weight", "hidden", "q"),
        "mlp.gate_up_proj.weight": to("ffn_up.weight", "gate_up", "hidden"),
        "mlp.down_proj.weight": to("ffn_down.weight", "hidden", "ffn"),
    },
    defaults={
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
    },
    check=check,
    rope=("default", "longrope", "su"),
    keys=(
        RMS_NORM,
        Key("rope.dimension_count", uint32, rotated),
        Key("rope.scaling.original_context_length", uint32, original_context),
        Key("rope.scaling.attn_factor", float32, attention_factor),
        # 0 tells llama.cpp that it is a model without windows.
        Key("attention.sliding_window", uint32, lambda config: config.get("sliding_window") or 0),
    ),
    extra=longrope,
)
