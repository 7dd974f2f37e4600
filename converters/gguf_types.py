"""Which tensor is stored in which type: llama-quantize's mixtures, and edgeft's own for widths they do not suit.

The named mixtures are the rules of llama.cpp's `llama_tensor_get_type_impl` and `tensor_type_fallback`
(`src/llama-quant.cpp`) for dense models without an importance matrix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .ggml import TYPES, GgmlType

FILE_TYPES: Mapping[str, int] = {"F16": 1, "Q4_0": 2, "Q8_0": 7, "Q4_K_M": 15, "Q4_K_M narrow": 15, "BF16": 32}
"""`general.file_type` of each mixture, from `llama.h`."""

_K_MIXTURES = ("Q4_K_M", "Q4_K_M narrow")

_FALLBACK: Mapping[str, str] = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
_VALUES = ("attn_v.weight", "attn_qkv.weight")
_NARROW: Mapping[str, str] = {**_FALLBACK, "Q6_K": "Q5_1"}
"""The type of blocks of 32 that is nearest in bits: Q6_K has 6.6, Q5_1 6.0, Q8_0 8.5."""


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
    mixture: str, tensors: Sequence[Shape], layers: int, *, wide_values: bool = False, experts: int = 0
) -> list[Choice]:
    """The type of every tensor, in the order given, which must be the file's.

    Args:
        layers: number of layers of the model.
        wide_values: attention values are few and get more bits (llama.cpp does so in its "70B" models).
        experts: number of experts; with eight, llama.cpp gives the small attention matrices more bits.
    """
    tied = all(tensor.name != "output.weight" for tensor in tensors)
    values = sum(tensor.name.endswith(_VALUES) for tensor in tensors)
    eight = experts == 8 and mixture not in ("F16", "BF16")
    seen_values = seen_downs = 0
    choices = []
    for tensor in tensors:
        if not quantizable(tensor):
            choices.append(Choice(TYPES["F32"]))
            continue
        kind = "Q4_K" if mixture in _K_MIXTURES else mixture
        if tensor.name == "output.weight" or (tied and tensor.name == "token_embd.weight"):
            kind = kind if kind in ("F16", "BF16", "Q8_0") else "Q6_K"
        elif tensor.name.endswith(_VALUES):
            if kind == "Q4_K":
                kind = "Q6_K" if more_bits(seen_values, values) else "Q5_K" if wide_values else kind
            kind = "Q8_0" if eight else kind
            seen_values += 1
        elif eight and tensor.name.endswith("attn_k.weight"):
            kind = "Q8_0"
        elif eight and tensor.name.endswith("attn_output.weight"):
            kind = "Q5_K" if kind == "Q4_K" else kind
        elif "ffn_down" in tensor.name:
            if kind == "Q4_K":
                kind = "Q6_K" if more_bits(seen_downs, layers) else kind
            seen_downs += 1
        choices.append(_fitted(kind, tensor.columns, _NARROW if mixture == "Q4_K_M narrow" else _FALLBACK))
    return choices


def quantizable(tensor: Shape) -> bool:
    kept = ("_norm.weight", "ffn_gate_inp.weight")
    return len(tensor.shape) > 1 and tensor.name.endswith("weight") and not tensor.name.endswith(kept)


def more_bits(layer: int, layers: int) -> bool:
    """The first and last eighth of the layers and every third between them."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


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
    return "Q4_K_M" if fits else "Q4_K_M narrow"


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
