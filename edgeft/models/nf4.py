"""Which weights QLoRA rounds to NF4: one answer for training, export and verification."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgeft.errors import require

if TYPE_CHECKING:
    from pathlib import Path

BLOCK = 64
"""Weights that share a scale; blocks run through rows."""


def kept(model: Any) -> list[str]:
    """Names of the linear layers that are not rounded: the head, and those with a block in two rows.

    bitsandbytes 0.50 gives such blocks the wrong scale on CPUs with AVX-512: it counts blocks by whole rows.
    """
    linear = require("torch.nn", "train").Linear
    head = model.get_output_embeddings()
    layers = ((name, layer) for name, layer in model.named_modules() if isinstance(layer, linear))
    return [name for name, layer in layers if layer is head or layer.in_features % BLOCK]


def config(folder: Path, compute: Any) -> Any:
    """The `BitsAndBytesConfig` that QLoRA loads the model in `folder` with.

    Scales are quantized too; what `kept` names stays as it is. `compute` is the dtype of products. Raises
    `MissingDependency` without bitsandbytes.
    """
    transformers, torch = require("transformers", "train"), require("torch", "train")
    require("bitsandbytes", "train")
    with torch.device("meta"):
        shape = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(folder))
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
        llm_int8_skip_modules=kept(shape),
    )
