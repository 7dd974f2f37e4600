"""What an ExecuTorch export will make: every weight, its bits and its bytes, from headers alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from edgeft.errors import UnsupportedModel, UsageError
from edgeft.plugins import ConvertOptions, Plan, Source, TensorPlan

from .adapter import EMBEDDING, HEAD
from .onnx_weights import Weights, merged_weights

KINDS = ("llama", "qwen2", "qwen3", "mistral")
"""Model types that ExecuTorch's transformer computes with these weights."""


@dataclass(frozen=True)
class Recipe:
    """Symmetric integers; activations are rounded to 8 bits where they are multiplied (8da4w, 8da8w)."""

    description: str
    bits: int
    """Of the layers' linear weights; 32: not quantized."""
    bits_per_weight: float
    """Nominal, for lists."""
    group: int = 32
    """Weights that share a scale, of those with 4 bits. Rows that are not whole groups keep 8 bits."""
    eight: tuple[str, ...] = ()
    """Layers' linear weights that keep 8 bits, by ExecuTorch's name."""
    context: int = 2048
    """Tokens of prompt and answer. Keys and values of so many are allocated when the program is loaded."""


RECIPES: Mapping[str, Recipe] = {
    "executorch": Recipe("The same as executorch-q4.", 4, 5.3),
    "executorch-q4": Recipe("ExecuTorch folder, 4 bits in groups of 32, embedding and head 8, for XNNPACK.", 4, 5.3),
    "executorch-int8": Recipe("ExecuTorch folder, 8 bits per row, for XNNPACK.", 8, 8.1),
    "executorch-fp32": Recipe("ExecuTorch folder, not quantized, float32.", 32, 32.0),
}


@dataclass(frozen=True)
class Details:
    weights: Weights
    recipe: Recipe


def make_plan(source: Source, target: str, options: ConvertOptions) -> Plan:
    """Raises: UsageError, ModelError, UnsupportedModel."""
    recipe = read_settings(RECIPES[target], options.extra.get("settings") or {})
    weights = merged_weights(source)
    check_model(weights.config)
    longest = int(weights.config.get("max_position_embeddings") or recipe.context)
    recipe = replace(recipe, context=min(recipe.context, longest))
    tensors = [_tensor(name, tensor.shape, recipe) for name, tensor in weights.tensors.items()]
    if weights.tied:  # the program has the table twice: to look rows up, and to multiply with
        head = next(tensor for tensor in tensors if tensor.name == EMBEDDING)
        tensors.append(replace(head, name=HEAD, note="the embedding again: a program does not share it"))
    size = sum(tensor.bytes for tensor in tensors)
    layers = int(weights.config.get("num_hidden_layers") or 0)
    return Plan(
        target="executorch-q4" if target == "executorch" else target,
        source=source,
        options=options,
        tensors=tuple(tensors),
        bytes=size,
        parameters=weights.parameters,
        bits_per_weight=8 * size / weights.parameters,
        warnings=weights.warnings,
        seconds=20 + 20 * layers,
        details=Details(weights, recipe),
    )


def check_model(config: Mapping[str, object]) -> None:
    """Raises: UnsupportedModel for what ExecuTorch's transformer would compute otherwise."""
    kind = config.get("model_type")
    if kind not in KINDS:
        raise UnsupportedModel(
            f"ExecuTorch export knows {', '.join(KINDS)} models, not {kind}", "Export with --to litert or --to gguf-q4."
        )
    window = config.get("sliding_window") if config.get("use_sliding_window", kind == "mistral") else None
    for name, found in (("a sliding window", window), ("a bias in its layers", config.get("mlp_bias"))):
        if found:
            raise UnsupportedModel(f"the model has {name}, which ExecuTorch export leaves out", "--to gguf-q4")
    if kind == "llama" and config.get("attention_bias"):
        raise UnsupportedModel("the model has a bias in its attention, which ExecuTorch export leaves out")
    if config.get("hidden_act", "silu") != "silu":
        raise UnsupportedModel(f"the model's activation is {config['hidden_act']}; ExecuTorch export knows silu")


def read_settings(default: Recipe, given: Mapping[str, str]) -> Recipe:
    """A recipe changed by what the user wrote as NAME=VALUE. Raises: UsageError."""
    recipe = default
    for name, value in given.items():
        if name == "context":
            if not value.isdecimal() or not 16 <= int(value) <= 131072:
                raise UsageError(f"context={value}: not a number of tokens from 16 to 131072")
            recipe = replace(recipe, context=int(value))
        elif name == "group" and value in ("32", "64", "128", "256") and default.bits == 4:
            recipe = replace(recipe, group=int(value))
        else:
            raise UsageError(
                f"{name}={value} is no setting of this target",
                "There are: context=TOKENS, and for executorch-q4 group=32|64|128|256.",
            )
    return recipe


def _tensor(name: str, shape: Sequence[int], recipe: Recipe) -> TensorPlan:
    bits, note = _bits(name, shape, recipe)
    count = 1
    for length in shape:
        count *= length
    scales = {4: 2 * count // recipe.group, 8: 4 * shape[0], 32: 0}[bits]
    return TensorPlan(name, tuple(shape), {4: "int4", 8: "int8", 32: "fp32"}[bits], count * bits // 8 + scales, note)


def _bits(name: str, shape: Sequence[int], recipe: Recipe) -> tuple[int, str]:
    if recipe.bits == 32 or len(shape) != 2 or not name.endswith(".weight"):
        return 32, ""
    if name in (EMBEDDING, HEAD) or recipe.bits == 8:
        return 8, ""
    if shape[1] % recipe.group:
        return 8, f"rows of {shape[1]} are not whole groups of {recipe.group}"
    return recipe.bits, ""
