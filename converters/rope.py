"""Rotary positions: what config.json says about them, and the factors that long contexts need as tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Tensors = Mapping[str, NDArray[np.float32]]
    """GGUF name -> values."""


def head_size(config: Mapping[str, Any]) -> int:
    """Length of an attention head."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def rope_parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """Rope settings in one form, whichever generation of transformers wrote the config; of layers without a window.

    `rope_type` is always there ("default" when nothing is scaled), and so are `rope_theta` and
    `original_max_position_embeddings`.
    """
    said = config.get("rope_parameters") or {}
    rope = {**(config.get("rope_scaling") or {}), **(said.get("full_attention") or said)}
    rope.setdefault("rope_type", rope.get("type", "default"))
    rope.setdefault("rope_theta", config.get("rope_theta") or 10000.0)
    if not rope.get("original_max_position_embeddings"):
        fallback = 8192 if rope["rope_type"] == "llama3" else config.get("max_position_embeddings")
        rope["original_max_position_embeddings"] = config.get("original_max_position_embeddings") or fallback
    return rope


def rotated(config: Mapping[str, Any]) -> int:
    """How many values of a head are rotated."""
    factor = rope_parameters(config).get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    return int(head_size(config) * factor)


def llama3(config: Mapping[str, Any]) -> Tensors:
    """Divisors of the rotary frequencies for Llama 3.1's long context; nothing when the model has no such scaling.

    Same formula as `_compute_llama3_parameters` in transformers' `modeling_rope_utils.py`.
    """
    rope, head = rope_parameters(config), head_size(config)
    if rope["rope_type"] != "llama3":
        return {}
    base, context = float(rope["rope_theta"]), rope["original_max_position_embeddings"]
    factor, low, high = (rope.get(key, default) for key, default in _LLAMA3)
    exponents = np.arange(0, head, 2, dtype=np.float32) / np.float32(head)
    # torch's power is correctly rounded here, numpy's in float32 is not.
    frequencies = np.float32(1.0) / np.power(base, exponents.astype(np.float64)).astype(np.float32)
    factors = []
    for frequency in frequencies:
        wavelength = np.float32(2 * math.pi) / frequency
        smooth = (np.float32(context) / wavelength - np.float32(low)) / np.float32(high - low)
        blend = np.float32(1.0) / ((np.float32(1.0) - smooth) / np.float32(factor) + smooth)
        factors.append(1.0 if wavelength < context / high else factor if wavelength > context / low else blend)
    return {"rope_freqs.weight": np.array(factors, np.float32)}


_LLAMA3 = (("factor", 8.0), ("low_freq_factor", 1.0), ("high_freq_factor", 4.0))


def longrope(config: Mapping[str, Any]) -> Tensors:
    """Divisors of the rotary frequencies below and above the original context (arXiv 2402.13753), if there are any.

    llama.cpp takes the long ones when the context it is started with exceeds the original; transformers, when a text
    does.
    """
    rope = rope_parameters(config)
    if rope["rope_type"] not in ("su", "longrope"):
        return {}
    return {f"rope_factors_{name}.weight": np.array(rope[f"{name}_factor"], np.float32) for name in ("long", "short")}
