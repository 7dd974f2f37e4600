"""A checkpoint read through its family's page: sizes, what is refused, and where every tensor goes.

GGUF names and the row order of rotary projections are those of llama.cpp's converter, so that files agree byte for
byte. The pages are in `families/`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeft.errors import ModelError, UnsupportedModel

from .adapter import HEAD
from .families import family_of
from .families.family import Family, Table, Weight
from .rope import head_size, rope_parameters, rotated
from .safetensors_rows import StoredTensor

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = [
    "Place",
    "Sizes",
    "check_config",
    "family_of",
    "places",
    "rotary_order",
    "settings",
    "sizes_of",
    "text_names",
]

_IGNORED = (".rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias")
"""Constants that old checkpoints carry."""

_COUNTED = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Sizes:
    """Dimensions from config.json, by the words of the tables."""

    layers: int
    words: Mapping[str, int]

    def of(self, words: tuple[str, ...]) -> tuple[int, ...]:
        return tuple(self.words[word] for word in words)


@dataclass(frozen=True)
class Place:
    """What becomes one GGUF tensor, or a part of it when several have the same name."""

    gguf: str
    tensor: str
    """Hugging Face name."""
    weight: Weight
    part: int = 0
    """Which of the equal parts of its rows."""
    stacked: bool = False
    """Whether it becomes one of several slices of the GGUF tensor, or has several itself."""

    def cut(self, stored: StoredTensor) -> list[StoredTensor]:
        """The stored rows that belong here: one tensor, or one per expert."""
        if len(stored.shape) < 3:
            return [stored]
        count, rows, columns = stored.shape
        each, mine = stored.bytes // count, rows // len(self.weight.gguf)
        size = each // rows * mine
        return [
            replace(
                stored,
                name=f"{stored.name}[{at}]",
                shape=(mine, columns),
                offset=stored.offset + at * each + self.part * size,
                bytes=size,
            )
            for at in range(count)
        ]


def settings(config: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """config.json with the settings of the text model on top level and transformers' defaults filled in."""
    return {**family.defaults, **(config.get("text_config") or {}), **config}


def sizes_of(config: Mapping[str, Any]) -> Sizes:
    """Raises: ModelError when config.json lacks a size, or has something else in its place."""
    heads = _size(config, "num_attention_heads")
    hidden, kv_heads = _size(config, "hidden_size"), _size(config, "num_key_value_heads", heads)
    head = _size(config, "head_dim", hidden // heads)
    ffn, expert_ffn = _size(config, "intermediate_size"), _size(config, "moe_intermediate_size", 0)
    words = {
        "vocab": _size(config, "vocab_size"),
        "hidden": hidden,
        "heads": heads,
        "kv_heads": kv_heads,
        "head": head,
        "q": heads * head,
        "kv": kv_heads * head,
        "qkv": (heads + 2 * kv_heads) * head,
        "ffn": ffn,
        "gate_up": 2 * ffn,
        "experts": _size(config, "num_experts", _size(config, "num_local_experts", 0)),
        "expert_ffn": expert_ffn,
        "expert_gate_up": 2 * expert_ffn,
    }
    return Sizes(_size(config, "num_hidden_layers"), words)


_LARGEST = 1 << 31
"""Of any size; what depends on it is computed before tensors are compared with it."""


def _size(config: Mapping[str, Any], name: str, default: int | None = None) -> int:
    value = config.get(name)
    if value is None:
        if default is None:
            raise ModelError(f"config.json lacks {name}")
        return default
    if value == 0 and default is not None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < _LARGEST:
        raise ModelError(f"config.json: {name} is {value!r:.40}", "Copy or download the model again.")
    return value


def check_config(config: Mapping[str, Any], family: Family) -> None:
    """Raises: UnsupportedModel for settings that would make the file compute something else."""
    if config.get("quantization_config"):
        raise UnsupportedModel(
            "the base is quantized (quantization_config in config.json)", "Export from the 16-bit model."
        )
    for setting, wanted in family.only.items():
        if (config.get(setting) or None) != (wanted or None):
            raise UnsupportedModel(
                f"{setting} {config.get(setting)!r} cannot be exported; llama.cpp computes with {wanted!r} "
                f"in the {family.name} family"
            )
    kind = rope_parameters(config)["rope_type"]
    if kind not in family.rope:
        raise UnsupportedModel(
            f"rope scaling of type {kind!r} cannot be expressed in a GGUF of the {family.name} family"
        )
    if rotated(config) != head_size(config) and all(key.value is not rotated for key in family.keys):
        raise UnsupportedModel(
            f"only part of each head is rotated, which llama.cpp cannot do in the {family.name} family"
        )
    for reason in family.check(config):
        raise UnsupportedModel(f"the model cannot be exported: {reason}")


def text_names(family: Family, tensors: Mapping[str, Any]) -> dict[str, str]:
    """Name in the tables -> name in the file, without what does not belong to the text model."""
    found = {}
    for name in tensors:
        if name.startswith(family.leaves_out):
            continue
        start, plain = next((pair for pair in family.prefixes if name.startswith(pair[0])), ("", ""))
        found[plain + name.removeprefix(start)] = name
    return found


def places(family: Family, sizes: Sizes, base: Mapping[str, StoredTensor], *, tied: bool) -> list[Place]:
    """Where every tensor of the checkpoint goes, shapes checked; parts of one GGUF tensor follow each other.

    Raises:
        ModelError: a tensor is missing or has another shape than config.json says.
        UnsupportedModel: a tensor the family does not have, or a head that llama.cpp has no place for.
    """
    _check_head(family, base, tied=tied)
    if max(sizes.layers, sizes.words["experts"]) > 1024 + len(base):
        # Names are made before they are looked for.
        raise ModelError(
            f"config.json says {sizes.layers} layers and {sizes.words['experts']} experts; "
            f"there are {len(base)} tensors",
            "Copy or download the model again.",
        )
    expected = dict(_expected(family, sizes, base, tied=tied))
    for name in base:
        if name not in expected and not name.endswith(_IGNORED):
            raise UnsupportedModel(f"{base[name].file}: the {family.name} family has no tensor {name}")
    for name, (_, weight, _) in expected.items():
        if name not in base:
            raise ModelError(f"the model lacks tensor {name}", "Copy or download the model again.")
        if base[name].shape != sizes.of(weight.shape):
            raise ModelError(
                f"{base[name].file}: tensor {name} has shape {base[name].shape}, "
                f"config.json says {sizes.of(weight.shape)}"
            )
    return [
        Place(prefix + gguf, name, weight, part, stacked=counted or len(weight.shape) > 2)
        for name, (prefix, weight, counted) in expected.items()
        for part, gguf in enumerate(weight.gguf)
    ]


def _check_head(family: Family, base: Mapping[str, StoredTensor], *, tied: bool) -> None:
    if tied and family.head == "required":
        raise UnsupportedModel(f"embedding and head are tied, but llama.cpp wants both in the {family.name} family")
    if not tied and family.head == "never":
        raise UnsupportedModel(
            f"embedding and head are not tied, but llama.cpp has one for both in the {family.name} family"
        )


def _expected(
    family: Family, sizes: Sizes, base: Mapping[str, StoredTensor], *, tied: bool
) -> Iterator[tuple[str, tuple[str, Weight, bool]]]:
    """Hugging Face name -> (what stands before the GGUF name, where it goes, whether it is one of several)."""
    for name, weight in family.top.items():
        if not (tied and name == HEAD):
            yield name, ("", weight, False)
    for layer in range(sizes.layers):
        prefix, gguf = f"model.layers.{layer}.", f"blk.{layer}."
        for name, weight, counted in _counted({**family.layer, **_layout(family, prefix, base)}, sizes):
            yield prefix + name, (gguf, weight, counted)
        for name, weight, counted in _counted(family.optional, sizes):
            if prefix + name in base:
                yield prefix + name, (gguf, weight, counted)


def _layout(family: Family, prefix: str, base: Mapping[str, StoredTensor]) -> Table:
    """The layout that the checkpoint has; the first when it has none, so that its tensors are the missing ones."""
    for layout in family.layouts:
        if any(prefix + _COUNTED.sub("0", name) in base for name in layout):
            return layout
    return family.layouts[0] if family.layouts else {}


def _counted(table: Table, sizes: Sizes) -> Iterator[tuple[str, Weight, bool]]:
    """The table with every name in braces written out, and whether it had braces."""
    for name, weight in table.items():
        if (counter := _COUNTED.search(name)) is None:
            yield name, weight, False
            continue
        for at in range(sizes.words[counter[1]]):
            yield _COUNTED.sub(str(at), name), weight, True


def rotary_order(rows: int, head: int) -> NDArray[np.intp]:
    """Source row of each output row: of every head, row 0, row head/2, row 1, row head/2 + 1 and so on."""
    return np.arange(rows).reshape(-1, 2, head // 2).swapaxes(1, 2).reshape(-1)
