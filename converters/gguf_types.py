"""Which tensor is stored in which type: a mixture's rules, what the user sets, and what shapes force."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from edgeft.errors import UsageError

from .ggml import TYPES, GgmlType
from .gguf_mixtures import BEST, FALLBACK, MIXTURES, NARROW, NEEDS_IMPORTANCE, Mixture, Model

_ROLES = ("attn_qkv", "attn_kv_b", "attn_v", "attn_k", "attn_q", "attn_output", "ffn_up", "ffn_gate", "ffn_down")
_AS_VALUES = {"attn_qkv": "attn_v", "attn_kv_b": "attn_v"}
"""Tensors that hold values among others follow their rule."""

_KEPT = re.compile(
    r"_norm\.weight|ffn_gate_inp\.weight|per_layer_model_proj|altup|laurel|ssm_conv1d|shortconv\.conv\.weight"
)
"""Never quantized: small, or not used in a matrix product."""


@dataclass(frozen=True)
class Shape:
    """A tensor as the type rules see it."""

    name: str
    """GGUF name."""
    shape: tuple[int, ...]

    @property
    def columns(self) -> int:
        return self.shape[-1]

    @property
    def weights(self) -> int:
        total = 1
        for length in self.shape:
            total *= length
        return total


@dataclass(frozen=True)
class Choice:
    type: GgmlType
    note: str = ""
    """Why it is not the type the mixture would give."""


def order(name: str) -> tuple[int, str]:
    """Sort key of llama.cpp's files: tensors outside layers first, then layer by layer, each by name."""
    parts = name.split(".")
    return (int(parts[1]), name) if parts[0] == "blk" else (-1, name)


def assign(
    name: str, tensors: Sequence[Shape], model: Model, overrides: Sequence[tuple[str, str]] = ()
) -> list[Choice]:
    """The type of every tensor, in the order given, which must be the file's.

    Args:
        name: a key of `MIXTURES`.
        overrides: (regular expression, type); the first that is found in a tensor's name wins over the mixture, but
            not over its shape.

    Raises:
        UsageError: an override's expression or type is none, it fits no tensor, or a type needs an importance matrix.
    """
    mixture = MIXTURES[name]
    wanted = check_overrides(overrides, tensors)
    tied = all(tensor.name != "output.weight" for tensor in tensors)
    seen: Counter[str] = Counter()
    choices = []
    for tensor in tensors:
        if not quantizable(tensor):
            choices.append(Choice(TYPES["F32"]))
            continue
        role = role_of(tensor, tied)
        kind = next((kind for pattern, kind in wanted if pattern.search(tensor.name)), None)
        if kind is not None:  # like llama-quantize, not counted: the layers after it keep their turn
            choices.append(_fitted(kind, tensor.columns, FALLBACK))
            continue
        kind = _by_rule(mixture, role, seen[role], tensor, model, narrow=name == BEST)
        seen[role] += 1
        choices.append(_fitted(kind, tensor.columns, NARROW if name == BEST else FALLBACK))
    if not model.importance:
        _check_importance(name, tensors, choices)
    return choices


def _by_rule(mixture: Mixture, role: str, at: int, tensor: Shape, model: Model, *, narrow: bool) -> str:
    """llama-quantize's order of rules: head and embedding, experts in MXFP4, eight experts, the role's own."""
    if role == "head":
        fits = tensor.columns % TYPES[mixture.type].block == 0 or narrow
        return mixture.head if fits or not quantized(mixture.type) else "Q8_0"
    if role == "embedding":
        return mixture.embedding or mixture.type
    if len(tensor.shape) == 3 and "experts" in mixture.rules:
        return mixture.rules["experts"](at, model) or mixture.type
    if model.experts == 8 and role in mixture.of_eight_experts:
        return mixture.of_eight_experts[role]
    rule = mixture.rules.get(role)
    kind = (rule(at, model) if rule else None) or mixture.type
    if role == "attn_v" and model.wide_values and kind in ("Q3_K", "Q4_K"):
        return "Q5_K"
    return kind


def role_of(tensor: Shape, tied: bool) -> str:
    if tensor.name == "output.weight" or (tied and tensor.name == "token_embd.weight"):
        return "head"
    if tensor.name == "token_embd.weight":
        return "embedding"
    role = next((role for role in _ROLES if role in tensor.name), "")
    return _AS_VALUES.get(role, role)


def value_tensors(tensors: Sequence[Shape]) -> int:
    return sum(role_of(tensor, False) == "attn_v" for tensor in tensors if quantizable(tensor))


def check_overrides(
    overrides: Sequence[tuple[str, str]], tensors: Sequence[Shape]
) -> list[tuple[re.Pattern[str], str]]:
    """Raises: UsageError."""
    found = []
    for expression, kind in overrides:
        if kind.upper() not in TYPES:
            raise UsageError(f"no tensor type {kind!r}", f"There are: {', '.join(TYPES)}.")
        try:
            pattern = re.compile(expression)
        except re.error as error:
            raise UsageError(f"{expression!r} is not a regular expression: {error}") from error
        if not any(pattern.search(tensor.name) for tensor in tensors if quantizable(tensor)):
            raise UsageError(f"no tensor's name fits {expression!r}", "--dry-run lists the names.")
        found.append((pattern, kind.upper()))
    return found


def _check_importance(name: str, tensors: Sequence[Shape], choices: Sequence[Choice]) -> None:
    for tensor, choice in zip(tensors, choices, strict=True):
        if tensor.name in ("output.weight", "token_embd.weight"):
            continue
        if choice.type.name in NEEDS_IMPORTANCE or (name == "Q2_K_S" and choice.type.name == "Q2_K"):
            raise UsageError(
                f"{choice.type.name} ({tensor.name}) is only worth writing with an importance matrix",
                "Give one with --imatrix FILE, or the text to compute it from with --calibrate DATA.",
            )


def quantized(kind: str) -> bool:
    return kind not in ("F32", "F16", "BF16")


def quantizable(tensor: Shape) -> bool:
    return len(tensor.shape) > 1 and tensor.name.endswith("weight") and not _KEPT.search(tensor.name)


def _fitted(kind: str, columns: int, fallback: Mapping[str, str]) -> Choice:
    """The type itself when rows fill whole blocks, else another one."""
    wanted = TYPES[kind]
    if columns % wanted.block == 0:
        return Choice(wanted)
    found = TYPES[fallback.get(kind, kind)]
    if columns % found.block:
        found = TYPES["F16"]
    return Choice(found, f"{columns} columns do not fill blocks of {wanted.block}: {found.name} instead of {kind}")


def best_mixture(tensors: Sequence[Shape]) -> str:
    """Q4_K_M where its blocks of 256 fit every row; where they do not, its rules with the nearest types.

    There llama-quantize gives the tied embedding Q8_0, twice the bits for a fifth of SmolLM2-135M's weights; in the
    layers the same bits are worth three times as much (docs/export.md).

    Never chosen by the error on weights: those that came out of a Q4_1 file lie on its grid, where Q4_1 seems best by
    far and rounds a merged adapter away (SmolLM2-135M: KL 1.7 from the merged model, at a 0.5 % error of the weights).
    """
    fits = all(tensor.columns % 256 == 0 for tensor in tensors if quantizable(tensor))
    return "Q4_K_M" if fits else BEST


def honest_label(label: str, mixture: str, bits: float, label_bits: float, fallbacks: int, total: int) -> list[str]:
    """What the reader should know when a file is not what its label promises.

    Args:
        label: the mixture asked for, or "Q4_K_M" when edgeft was to choose.
        label_bits: bits per weight that llama-quantize's mixture of that name would have.
    """
    if mixture != label:
        return [
            f"rows do not fill the blocks of {label}, which would really take {label_bits:.2f} bits per weight; "
            f"the nearest types in blocks of 32 are written instead, {bits:.2f} in all"
        ]
    if fallbacks == 0:
        return []
    return [f"{label} is a label here: {fallbacks} of {total} tensors fall back, {bits:.2f} bits per weight in all"]


_SPEED = {"Q4_K": 15.0, "Q5_K": 17.0, "Q6_K": 25.0}
"""Million weights per second and core that ggml quantizes, measured on a 2.x GHz x86-64 server core."""
_OTHER_SPEED = 250.0


def estimated_seconds(tensors: Sequence[tuple[GgmlType, int]], threads: int) -> float:
    """Rough time for (type, weights) pairs, with a second for starting and the tokenizer."""
    return 1 + sum(weights / 1e6 / _SPEED.get(kind.name, _OTHER_SPEED) for kind, weights in tensors) / threads
