"""Model families that can be exported: Hugging Face names, GGUF names and shapes, as tables.

GGUF names and the row order of Llama's rotary projections are those of llama.cpp's converter, so that files agree
byte for byte.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeft.errors import ModelError, UnsupportedModel

from .adapter import HEAD
from .safetensors_rows import StoredTensor

if TYPE_CHECKING:
    from numpy.typing import NDArray

Table = Mapping[str, tuple[str, tuple[str, ...]]]
"""Hugging Face name -> (GGUF name, shape in the words of `Sizes`)."""

TOP: Table = {
    "model.embed_tokens.weight": ("token_embd.weight", ("vocab", "hidden")),
    "model.norm.weight": ("output_norm.weight", ("hidden",)),
    "lm_head.weight": ("output.weight", ("vocab", "hidden")),
}
_WEIGHTS: Table = {
    "input_layernorm.weight": ("attn_norm.weight", ("hidden",)),
    "self_attn.q_proj.weight": ("attn_q.weight", ("q", "hidden")),
    "self_attn.k_proj.weight": ("attn_k.weight", ("kv", "hidden")),
    "self_attn.v_proj.weight": ("attn_v.weight", ("kv", "hidden")),
    "self_attn.o_proj.weight": ("attn_output.weight", ("hidden", "q")),
    "post_attention_layernorm.weight": ("ffn_norm.weight", ("hidden",)),
    "mlp.gate_proj.weight": ("ffn_gate.weight", ("ffn", "hidden")),
    "mlp.up_proj.weight": ("ffn_up.weight", ("ffn", "hidden")),
    "mlp.down_proj.weight": ("ffn_down.weight", ("hidden", "ffn")),
}
_QKV_BIAS: Table = {
    "self_attn.q_proj.bias": ("attn_q.bias", ("q",)),
    "self_attn.k_proj.bias": ("attn_k.bias", ("kv",)),
    "self_attn.v_proj.bias": ("attn_v.bias", ("kv",)),
}
_OTHER_BIAS: Table = {
    "self_attn.o_proj.bias": ("attn_output.bias", ("hidden",)),
    "mlp.gate_proj.bias": ("ffn_gate.bias", ("ffn",)),
    "mlp.up_proj.bias": ("ffn_up.bias", ("ffn",)),
    "mlp.down_proj.bias": ("ffn_down.bias", ("hidden",)),
}
_QK_NORM: Table = {
    "self_attn.q_norm.weight": ("attn_q_norm.weight", ("head",)),
    "self_attn.k_norm.weight": ("attn_k_norm.weight", ("head",)),
}
_IGNORED = (".rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias")
"""Constants that old checkpoints carry."""


@dataclass(frozen=True)
class Family:
    name: str
    """`general.architecture` in the file."""
    classes: tuple[str, ...]
    """`architectures` in config.json."""
    layer: Table
    optional: Table
    rotary_pairs_interleaved: bool = False
    """Llama: GGUF stores the two halves of every head's rows in turn."""
    head: int | None = None
    """`head_dim` when config.json has none; None: hidden size / heads."""


FAMILIES = (
    Family(
        "llama",
        ("LlamaForCausalLM", "MistralForCausalLM"),
        _WEIGHTS,
        {**_QKV_BIAS, **_OTHER_BIAS},
        rotary_pairs_interleaved=True,
    ),
    Family("qwen2", ("Qwen2ForCausalLM",), {**_WEIGHTS, **_QKV_BIAS}, {}),
    Family("qwen3", ("Qwen3ForCausalLM",), {**_WEIGHTS, **_QK_NORM}, _QKV_BIAS),
)


@dataclass(frozen=True)
class Sizes:
    """Dimensions from config.json."""

    layers: int
    heads: int
    kv_heads: int
    head: int
    hidden: int
    ffn: int
    vocab: int

    def of(self, words: tuple[str, ...]) -> tuple[int, ...]:
        known = {"q": self.heads * self.head, "kv": self.kv_heads * self.head}
        return tuple(known.get(word) or int(getattr(self, word)) for word in words)


def family_of(config: Mapping[str, Any]) -> Family:
    """Raises: UnsupportedModel for any architecture that is not in the table."""
    classes = config.get("architectures") or ["(none named)"]
    for family in FAMILIES:
        if classes[0] in family.classes:
            return family
    known = ", ".join(name for family in FAMILIES for name in family.classes)
    raise UnsupportedModel(f"the architecture {classes[0]} cannot be exported to GGUF yet", f"These can: {known}.")


def sizes_of(config: Mapping[str, Any]) -> Sizes:
    """Raises: ModelError when config.json lacks a size."""
    try:
        heads = int(config["num_attention_heads"])
        return Sizes(
            layers=int(config["num_hidden_layers"]),
            heads=heads,
            kv_heads=int(config.get("num_key_value_heads") or heads),
            head=int(config.get("head_dim") or config["hidden_size"] // heads),
            hidden=int(config["hidden_size"]),
            ffn=int(config["intermediate_size"]),
            vocab=int(config["vocab_size"]),
        )
    except KeyError as error:
        raise ModelError(f"config.json lacks {error.args[0]}") from error


def check_config(config: Mapping[str, Any]) -> None:
    """Raises: UnsupportedModel for settings that would make the file compute something else."""
    if config.get("quantization_config"):
        raise UnsupportedModel(
            "the base is quantized (quantization_config in config.json)", "Export from the 16-bit model."
        )
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        raise UnsupportedModel(f"hidden_act {activation!r} cannot be exported; llama.cpp computes silu here")


def gguf_names(family: Family, sizes: Sizes, base: Mapping[str, StoredTensor], *, tied: bool) -> dict[str, str]:
    """Hugging Face name -> GGUF name for every tensor of the checkpoint, shapes checked.

    Raises:
        ModelError: a tensor is missing or has another shape than config.json says.
        UnsupportedModel: a tensor the family does not have.
    """
    expected = {name: entry for name, entry in TOP.items() if not (tied and name == HEAD)}
    for layer in range(sizes.layers):
        prefix = f"model.layers.{layer}."
        for name, (gguf, shape) in {**family.layer, **family.optional}.items():
            if name in family.layer or prefix + name in base:
                expected[prefix + name] = (f"blk.{layer}.{gguf}", shape)
    for name in base:
        if name not in expected and not name.endswith(_IGNORED):
            raise UnsupportedModel(f"{base[name].file}: the {family.name} family has no tensor {name}")
    for name, (_, words) in expected.items():
        if name not in base:
            raise ModelError(f"the model lacks tensor {name}", "Copy or download the model again.")
        if base[name].shape != sizes.of(words):
            raise ModelError(
                f"{base[name].file}: tensor {name} has shape {base[name].shape}, config.json says {sizes.of(words)}"
            )
    return {name: gguf for name, (gguf, _) in expected.items()}


def permutes_rows(family: Family, name: str) -> bool:
    """Whether the rows of a Hugging Face tensor change places within each head."""
    return family.rotary_pairs_interleaved and name.endswith(
        ("q_proj.weight", "k_proj.weight", "q_proj.bias", "k_proj.bias")
    )


def rotary_order(rows: int, head: int) -> NDArray[np.intp]:
    """Source row of each output row: of every head, row 0, row head/2, row 1, row head/2 + 1 and so on."""
    return np.arange(rows).reshape(-1, 2, head // 2).swapaxes(1, 2).reshape(-1)


def rope_factors(rope: Mapping[str, Any], head: int) -> NDArray[np.float32] | None:
    """Divisors of the rotary frequencies for Llama 3.1's long context, or None when the model has no such scaling.

    Same formula as `_compute_llama3_parameters` in transformers' `modeling_rope_utils.py`.
    """
    if rope["rope_type"] != "llama3":
        return None
    base, context = float(rope["rope_theta"]), rope.get("original_max_position_embeddings", 8192)
    factor, low, high = (rope.get(key, default) for key, default in _LLAMA3_ROPE)
    exponents = np.arange(0, head, 2, dtype=np.float32) / np.float32(head)
    frequencies = np.float32(1.0) / np.power(np.float32(base), exponents)
    factors = []
    for frequency in frequencies:
        wavelength = np.float32(2 * math.pi) / frequency
        smooth = (np.float32(context) / wavelength - np.float32(low)) / np.float32(high - low)
        blend = np.float32(1.0) / ((np.float32(1.0) - smooth) / np.float32(factor) + smooth)
        factors.append(1.0 if wavelength < context / high else factor if wavelength > context / low else blend)
    return np.array(factors, np.float32)


_LLAMA3_ROPE = (("factor", 8.0), ("low_freq_factor", 1.0), ("high_freq_factor", 4.0))
