"""What an ONNX export will write: every weight, its bits and its bytes, from headers alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from edgeft.errors import UsageError
from edgeft.models.packed import read_packed
from edgeft.plugins import ConvertOptions, Plan, Source, TensorPlan

from .adapter import EMBEDDING, HEAD
from .onnx_quantize import Settings
from .onnx_weights import Weights, merged_weights

TARGETS: Mapping[str, Settings] = {
    "onnx-q4": Settings(bits=4, head_bits=8, embedding_bits=8),
    "onnx-int8": Settings(bits=8, head_bits=8, embedding_bits=8),
    "onnx-fp32": Settings(bits=32, head_bits=32, embedding_bits=32),
}

_BLOCKS = (16, 32, 64, 128, 256)
"""Block sizes MatMulNBits takes."""


@dataclass(frozen=True)
class Details:
    weights: Weights
    settings: Settings


def make_plan(source: Source, target: str, options: ConvertOptions) -> Plan:
    """Raises: UsageError, ModelError, UnsupportedModel."""
    settings = read_settings(TARGETS[target], options.extra.get("settings") or {})
    check_packed(source, target, settings, TARGETS[target])
    weights = merged_weights(source)
    tensors = tuple(_tensor(name, tensor.shape, weights, settings) for name, tensor in weights.tensors.items())
    size = sum(tensor.bytes for tensor in tensors)
    return Plan(
        target=target,
        source=source,
        options=options,
        tensors=tensors,
        bytes=size + _rotary_bytes(weights.config),
        parameters=weights.parameters,
        bits_per_weight=8 * size / weights.parameters,
        warnings=weights.warnings,
        details=Details(weights, settings),
    )


def read_settings(default: Settings, given: Mapping[str, str]) -> Settings:
    """Settings changed by what the user wrote as NAME=VALUE.

    Raises:
        UsageError: no such name or value, or values that do not go together.
    """
    changes: dict[str, Any] = {}
    for name, value in given.items():
        allowed = _CHOICES.get(name)
        if allowed is None:
            raise UsageError(f"ONNX export has no setting {name!r}", f"There are: {', '.join(_CHOICES)}.")
        if value not in allowed:
            raise UsageError(f"{name} cannot be {value!r}", f"Choose one of: {', '.join(allowed)}.")
        changes[name.replace("-", "_")] = allowed[value]
    settings = replace(default, **changes)
    if settings.symmetric and settings.method != "rtn":
        raise UsageError(f"{settings.method} has zero points: it cannot be symmetric", "Add --set method=rtn.")
    if settings.method == "hqq" and settings.bits != 4:
        raise UsageError("hqq rounds to 4 bits only", "Use --to onnx-q4, or another method.")
    if default.bits == 32 and changes:
        raise UsageError(f"onnx-fp32 is not quantized: {', '.join(given)} would change nothing", "Use --to onnx-q4.")
    return settings


_BITS: Mapping[str, Any] = {"4": 4, "8": 8, "32": 32}
_CHOICES: Mapping[str, Mapping[str, Any]] = {
    "method": {name: name for name in ("rtn", "k_quant", "hqq")},
    "block": {str(size): size for size in _BLOCKS},
    "head-bits": _BITS,
    "embedding-bits": _BITS,
    "symmetric": {"yes": True, "no": False},
    "accuracy-level": {str(level): level for level in range(5)},
}


def check_packed(source: Source, target: str, settings: Settings, default: Settings) -> None:
    """Raises: UsageError, ModelError."""
    if source.packed is None:
        return
    if read_packed(source.packed).target != target or settings != default:
        raise UsageError(
            f"the weights of {source.packed.parent} were trained as {target} stores them by default",
            "Leave out --set: the run's file is fixed by its training.",
        )


def _tensor(name: str, shape: tuple[int, ...], weights: Weights, settings: Settings) -> TensorPlan:
    bits, note = _bits(name, shape, weights, settings)
    return TensorPlan(name, shape, TYPE_NAMES[bits], tensor_bytes(shape, bits, settings), note)


TYPE_NAMES: Mapping[int, str] = {4: "int4", 8: "int8", 32: "fp32"}


def _bits(name: str, shape: tuple[int, ...], weights: Weights, settings: Settings) -> tuple[int, str]:
    if len(shape) != 2 or not name.endswith(".weight"):
        return 32, ""
    if name == EMBEDDING and not weights.tied:
        if settings.embedding_bits < 32 and shape[1] % settings.block:
            return 32, f"rows of {shape[1]} are not whole blocks of {settings.block}"
        return settings.embedding_bits, ""
    return (settings.head_bits if name in (EMBEDDING, HEAD) else settings.bits), ""


def tensor_bytes(shape: tuple[int, ...], bits: int, settings: Settings) -> int:
    """Codes in whole blocks, a float32 scale per block, and zero points unless symmetric (HQQ's are float32)."""
    if bits == 32:
        size = 4
        for length in shape:
            size *= length
        return size
    rows, columns = shape
    blocks = -(-columns // settings.block)
    zeros = 0 if settings.symmetric else -(-blocks * bits // 8)
    if settings.method == "hqq" and bits == 4:
        zeros = 4 * blocks
    return rows * (blocks * (settings.block * bits // 8 + 4) + zeros)


def _rotary_bytes(config: Mapping[str, Any]) -> int:
    """Two float32 tables (positions, half a head)."""
    heads = int(config.get("num_attention_heads") or 1)
    head = int(config.get("head_dim") or int(config.get("hidden_size") or 0) // heads)
    return 2 * 4 * int(config.get("max_position_embeddings") or 0) * (head // 2)
