"""How a LiteRT graph is quantized: which weights in how many bits, as its quantizer takes it and as a plan shows it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from edgeft.errors import UsageError
from edgeft.plugins import ConvertOptions, Plan, Source, TensorPlan

from .adapter import EMBEDDING, HEAD
from .onnx_weights import Weights, merged_weights

HEAD_OUTPUT = "decode_logits_output"
"""The quantizer finds an operation by the name of what it writes; the head's is this, whatever the model calls it."""


@dataclass(frozen=True)
class Recipe:
    """Symmetric integers; activations are rounded to 8 bits where they are multiplied."""

    description: str
    bits: int
    """Of the layers' linear weights; 32: not quantized."""
    bits_per_weight: float
    """Nominal, for lists."""
    block: int = 0
    """Weights that share a scale; 0: a whole row."""
    algorithm: str = "min_max_uniform_quantize"
    eight: tuple[str, ...] = ()
    """Layers' linear weights that keep 8 bits, by the end of their name."""
    rotation: int = 0
    """Largest Hadamard matrix that turns a layer's inputs and rows before they are rounded; 0: none. Outliers then
    share their range with all inputs of a block (QuaRot, arXiv 2404.00456); the product stays what it was."""
    exact_head: bool = False
    """Whether the head's activations stay float32. The engine then unpacks its weights when it loads them."""
    context: int = 1024
    """Tokens of prompt and answer. Every token attends to all of them, seen or not: it costs time, not only memory."""


_Q8 = Recipe(
    "LiteRT-LM file, 8 bits per row, inputs rotated: nearer to the model.", 8, 8.3, rotation=512, exact_head=True
)

RECIPES: Mapping[str, Recipe] = {
    "litert": replace(_Q8, description="The same as litert-q8."),
    "litert-int8": Recipe("LiteRT-LM file, 8 bits per row.", 8, 8.3),
    "litert-q8": _Q8,
    "litert-q4": Recipe("LiteRT-LM file, 4 bits in blocks of 32, embedding and head 8.", 4, 5.3, 32, "OCTAV"),
    "litert-fp32": Recipe("LiteRT-LM file, not quantized, float32.", 32, 32.0),
}

_SIGNATURES = 2
"""One for whole batches of a prompt, one for one token. Weights are shared, what is said about them is not."""

_ROW_BYTES = 4 + 8
"""Scale and zero point of a row, in float32 and int64."""

_LAYER_BYTES = 85_000
"""Of operations, names and shapes, in both signatures together; measured with 30 layers of Llama's kind."""

_ROTATED = "DECOMPOSED_HADAMARD_ROTATION"
"""Says it in ordinary operations, which every engine of LiteRT knows; the scales are OCTAV's."""

_ALGORITHMS = {"minmax": "min_max_uniform_quantize", "octav": "OCTAV"}


@dataclass(frozen=True)
class Details:
    weights: Weights
    recipe: Recipe


def make_plan(source: Source, target: str, options: ConvertOptions) -> Plan:
    """Raises: UsageError, ModelError, UnsupportedModel."""
    recipe = read_settings(RECIPES[target], options.extra.get("settings") or {})
    weights = merged_weights(source)
    longest = int(weights.config.get("max_position_embeddings") or recipe.context)
    recipe = replace(recipe, context=min(recipe.context, longest))
    tensors = tuple(_tensor(name, tensor.shape, weights, recipe) for name, tensor in weights.tensors.items())
    layers = int(weights.config.get("num_hidden_layers") or 0)
    size = sum(tensor.bytes for tensor in tensors)
    beside = layers * _LAYER_BYTES + sum(4 * width**2 for width in _rotations(tensors, recipe))
    return Plan(
        target="litert-q8" if target == "litert" else target,
        source=source,
        options=options,
        tensors=tensors,
        bytes=size + beside,
        parameters=weights.parameters,
        bits_per_weight=8 * size / weights.parameters,
        warnings=weights.warnings,
        seconds=25 + 2.5 * layers,  # measured with 2 and 30 layers on one core
        details=Details(weights, recipe),
    )


def read_settings(default: Recipe, given: Mapping[str, str]) -> Recipe:
    """A recipe changed by what the user wrote as NAME=VALUE. Raises: UsageError."""
    recipe = default
    for name, value in given.items():
        if name == "context":
            recipe = replace(recipe, context=_context(value))
        elif name == "block" and default.bits == 4 and value in ("row", "32", "64", "128", "256"):
            recipe = replace(recipe, block=0 if value == "row" else int(value))
        elif name == "algorithm" and not default.rotation and value in _ALGORITHMS:
            recipe = replace(recipe, algorithm=_ALGORITHMS[value])
        else:
            raise UsageError(
                f"{name}={value} is no setting of this target",
                "There are: context=TOKENS, algorithm=minmax|octav, and for litert-q4 block=row|32|64|128|256.",
            )
    return recipe


def _context(value: str) -> int:
    """The graph's prompt calls write 128 tokens at a time: less than two of them is no context."""
    if not value.isdecimal() or not 256 <= int(value) <= 32768:
        raise UsageError(f"context={value}: not a number of tokens from 256 to 32768")
    return int(value)


def recipe_rules(recipe: Recipe) -> list[dict[str, Any]] | None:
    """As ai-edge-quantizer reads them: of the rules that fit an operation, the last one wins."""
    if recipe.bits == 32:
        return None
    granularity = f"BLOCKWISE_{recipe.block}" if recipe.block else "CHANNELWISE"
    layers = [_rule(".*", "FULLY_CONNECTED", recipe.bits, granularity, recipe.algorithm)]
    if recipe.rotation:
        layers[0]["algorithm_key"] = _ROTATED
        layers[0]["op_config"]["weight_tensor_config"]["algorithm_params"] = {"max_hadamard_size": recipe.rotation}
    layers += [_rule(f".*{name}[^/]*$", "FULLY_CONNECTED", 8, "CHANNELWISE") for name in recipe.eight]
    # Embedding and head alike, so that a model that ties them has one table in the file, not three.
    return [
        *layers,
        _rule(".*", "EMBEDDING_LOOKUP", 8, "CHANNELWISE"),
        _rule(f".*{HEAD_OUTPUT}.*", "FULLY_CONNECTED", 8, "CHANNELWISE", exact=recipe.exact_head),
    ]


def _rotations(tensors: Sequence[TensorPlan], recipe: Recipe) -> set[int]:
    """Widths of the Hadamard matrices in the file: the largest power of two that divides a row, as far as allowed."""
    if not recipe.rotation:
        return set()
    rows = (one.shape[-1] for one in tensors if len(one.shape) == 2 and one.name not in (EMBEDDING, HEAD))
    return {min(row & -row, recipe.rotation) for row in rows}


def _rule(
    regex: str,
    operation: str,
    bits: int,
    granularity: str,
    algorithm: str = "min_max_uniform_quantize",
    exact: bool = False,
) -> dict[str, Any]:
    weights = {"num_bits": bits, "symmetric": True, "granularity": granularity, "dtype": "INT"}
    computed = "FLOAT" if exact else "INTEGER"
    config = {"weight_tensor_config": weights, "compute_precision": computed, "explicit_dequantize": exact}
    return {"regex": regex, "operation": operation, "algorithm_key": algorithm, "op_config": config}


def _tensor(name: str, shape: tuple[int, ...], weights: Weights, recipe: Recipe) -> TensorPlan:
    bits, block = _bits(name, shape, recipe)
    count = 1
    for length in shape:
        count *= length
    rows = count // shape[-1] * _ROW_BYTES * (1 if name == HEAD else _SIGNATURES)
    scales = 0 if bits == 32 else count // block * 2 if block else rows
    return TensorPlan(name, shape, {4: "int4", 8: "int8", 32: "fp32"}[bits], count * bits // 8 + scales)


def _bits(name: str, shape: Sequence[int], recipe: Recipe) -> tuple[int, int]:
    """Bits, and weights per scale (0: a row)."""
    if recipe.bits == 32 or len(shape) != 2 or not name.endswith(".weight"):
        return 32, 0
    if name in (EMBEDDING, HEAD) or any(part in name for part in recipe.eight):
        return 8, 0
    return recipe.bits, recipe.block
