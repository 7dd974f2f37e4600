"""Which weights QLoRA rounds to NF4: one answer for training, export and verification."""

from __future__ import annotations

from typing import Any

from edgeft.errors import require

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
