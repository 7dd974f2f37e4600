"""Adapters on experts, which PEFT trains on one parameter that holds all experts of a layer.

Layout from PEFT's `ParamWrapper` (`tuners/lora/layer.py`): for parameters of shape (experts, out, in), A has shape
(experts · rank, in), expert by expert; B has shape (out, rank · experts) with the experts of each rank side by side.
Wrappers of several parameters of one module are nested, so that a name does not say which parameter it is for; the
shapes do.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping

from edgeft.errors import ModelError

from .adapter import Adapter, Change, rank_of, scale_of
from .families.family import Family, Weight
from .gguf_architectures import Sizes
from .safetensors_rows import StoredTensor

Slices = dict[tuple[str, int], Change]
"""(GGUF name, expert) -> what happens to that slice."""

_NESTED = re.compile(r"(model\.layers\.(\d+)\.)(.+?)((?:\.base_layer)*)\.weight")


def take_expert_changes(changes: dict[str, Change], adapter: Adapter, family: Family, sizes: Sizes) -> Slices:
    """Move the changes of stacked parameters out of `changes`, one for each expert.

    Raises:
        ModelError: a pair of matrices fits none of the layer's parameters.
    """
    stacked = {name: weight for layout in family.layouts for name, weight in layout.items() if len(weight.shape) > 2}
    modules = {name.rpartition(".")[0] for name in stacked}
    found: Slices = {}
    for name in list(changes):
        match = _NESTED.fullmatch(name)
        if match is None or match[3] not in modules:
            continue
        change = changes.pop(name)
        parameter, weight = _parameter(change, stacked, sizes, name, adapter)
        full = f"{match[1]}{parameter}"
        for gguf, expert, part in _slices(change, weight, sizes, full, adapter):
            found[f"blk.{match[2]}.{gguf}", expert] = part
    return found


def _parameter(
    change: Change, stacked: Mapping[str, Weight], sizes: Sizes, name: str, adapter: Adapter
) -> tuple[str, Weight]:
    if change.down is None or change.up is None:
        raise ModelError(f"{adapter.path}: only one of the two LoRA matrices of {name} is there")
    product = (change.up.shape[0], change.down.shape[1])
    for parameter, weight in stacked.items():
        if sizes.of(weight.shape)[1:] == product:
            return parameter, weight
    raise ModelError(
        f"the adapter {adapter.path} does not fit: B @ A of {name} has shape {product}, no parameter there has",
        "Give the base model the adapter was trained on.",
    )


def _slices(
    change: Change, weight: Weight, sizes: Sizes, parameter: str, adapter: Adapter
) -> Iterator[tuple[str, int, Change]]:
    """(GGUF name, expert, change) for every slice of a parameter."""
    assert change.down is not None and change.up is not None
    experts, out, _ = sizes.of(weight.shape)
    rank = rank_of(adapter.config, parameter)
    if (change.down.shape[0], change.up.shape[1]) != (rank * experts, rank * experts):
        raise ModelError(
            f"{adapter.path}: the LoRA matrices of {parameter} have shapes {change.down.shape} and {change.up.shape}, "
            f"for {experts} experts and rank {rank}"
        )
    rows = out // len(weight.gguf)
    for part, gguf in enumerate(weight.gguf):
        up = _rows(change.up, part * rows, rows)
        for expert in range(experts):
            down = _rows(change.down, expert * rank, rank)
            scale = scale_of(adapter.config, parameter)
            yield gguf, expert, Change(down=down, up=up, up_columns=slice(expert, None, experts), scale=scale)


def _rows(stored: StoredTensor, start: int, count: int) -> StoredTensor:
    size = stored.bytes // stored.rows
    shape = (count, *stored.shape[1:])
    return dataclasses.replace(stored, shape=shape, offset=stored.offset + start * size, bytes=count * size)
