"""Gemma 3, text only: of a model with images, the language part."""

from __future__ import annotations

from collections.abc import Iterator

from ..gguf_writer import float32, uint32
from .family import HEAD_SIZE, QK_NORM, RMS_NORM, Config, Family, Key
from .gemma2 import GEMMA_DEFAULTS, GEMMA_ONLY, GEMMA_TOP, LAYER, attention_scale, flags, window_pattern


def local_theta(config: Config) -> float:
    """Rope base of the layers with a window."""
    rope = config.get("rope_parameters") or {}
    said = (rope.get("sliding_attention") or {}).get("rope_theta")
    return float(said or config.get("rope_local_base_freq") or 10000.0)


def check(config: Config) -> Iterator[str]:
    yield from attention_scale(config, 62)


FAMILY = Family(
    name="gemma3",
    classes=("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"),
    model_types=("gemma3_text", "gemma3"),
    layer={**LAYER, **{name: weight._replace(plus_one=True) for name, weight in QK_NORM.items()}},
    top=GEMMA_TOP,
    defaults={
        **GEMMA_DEFAULTS,
        "vocab_size": 262208,
        "max_position_embeddings": 131072,
        "rope_theta": 1_000_000.0,
        "attn_logit_softcapping": None,
    },
    only={**GEMMA_ONLY, "attn_logit_softcapping": None},
    check=check,
    rope=("default", "linear"),
    keys=(
        RMS_NORM,
        *HEAD_SIZE,
        Key("rope.freq_base_swa", float32, local_theta),
        Key("final_logit_softcapping", float32, lambda config: config.get("final_logit_softcapping") or None),
        Key("attention.sliding_window", uint32, "sliding_window"),
        Key("attention.sliding_window_pattern", flags, lambda config: window_pattern(config, 6)),
    ),
    prefixes=(
        ("model.language_model.", "model."),
        ("language_model.model.", "model."),
        ("language_model.lm_head.", "lm_head."),
    ),
    leaves_out=("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector."),
)
