"""Training for a target: which there are, and who computes with the values its file will hold.

A grid is the set of values that one tensor of a file can hold, with the rule that rounds to them. `Aware`
(edgeft.train.aware) puts the grids into a model's layers; a target names who builds it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from edgeft.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from edgeft.train.aware import Aware
    from edgeft.train.config import TrainConfig


class Grid(Protocol):
    """How one tensor is stored."""

    name: str
    """Of the type in the file: "Q4_0"."""

    def values(self, weights: Tensor, out: Tensor) -> None:
        """Write what a runtime reads back into `out`.

        Args:
            weights: (rows, columns), float32, contiguous.
            out: the same shape, float32 or bfloat16, contiguous.
        """

    def values_of(self, parts: Sequence[tuple[Tensor, Tensor, Tensor | None]]) -> None:
        """`values` of several (weights, out, factors) at once.

        Factors, (rows, blocks per row), float32, multiply the scales that the rule finds, before these are stored.
        """

    def pack(self, weights: Tensor, factors: Tensor | None = None) -> Tensor:
        """The rows as the file stores them, (rows, bytes per row), uint8: of the very values that `values` gives."""


@dataclass(frozen=True)
class Trainable:
    """A target that can be trained for."""

    make: str
    """"module:function" of `(config, model, base folder, steps) -> Aware`; imported when it is needed."""
    methods: tuple[str, ...] = ("lora",)
    """Training methods it goes with, the default first."""
    scales: bool = True
    """Whether `--tune scales` and `--tune both` are there."""
    teacher: bool = True
    """Whether `--teacher` is: an adapter that is rounded can also be computed with unrounded."""


_GGML = Trainable("edgeft.train.aware_gguf:make")
_TERNARY = Trainable("edgeft.train.ternary:make", methods=("full",), scales=False)

TARGETS: Mapping[str, Trainable] = {
    "gguf-q4_0": _GGML,
    "gguf-q4_1": Trainable("edgeft.train.aware_gguf:make", scales=False),
    "gguf-q8_0": _GGML,
    "onnx-q4": Trainable("edgeft.train.aware_onnx:make", scales=False),
    "gguf-tq2_0": _TERNARY,
    "gguf-tq1_0": _TERNARY,
}


def trainable(target: str) -> Trainable:
    """Raises: UsageError when nothing can be trained for the target."""
    if target not in TARGETS:
        raise UsageError(f"training for {target!r} is not possible", f"It is for: {', '.join(TARGETS)}.")
    return TARGETS[target]


def default_method(target: str) -> str:
    """Raises: UsageError."""
    return trainable(target).methods[0]


def check_target(config: TrainConfig) -> None:
    """Raises: UsageError when settings do not go with training for `config.target`."""
    assert config.target is not None
    known = trainable(config.target)
    if config.method not in known.methods:
        raise UsageError(
            f"training for {config.target} and the method {config.method} do not go together",
            f"Use --method {' or '.join(known.methods)}: the weights are rounded for the file while they are trained.",
        )
    if not 0 <= config.quantize_after < 1:
        raise UsageError(f"quantize-after must be from 0 to below 1, not {config.quantize_after}")
    if config.tune != "adapter" and not known.scales:
        raise UsageError(f"{config.target} has no scales to tune")
    if not 0 <= config.teacher < 1:
        raise UsageError(f"teacher must be from 0 to below 1, not {config.teacher}")
    if config.teacher and (config.tune == "scales" or not known.teacher):
        raise UsageError("there is no unrounded model that could teach", "Leave out --teacher.")
    if config.tune == "scales" and config.quantize_after:
        raise UsageError("scales are those of rounded weights from the first step", "Leave out --quantize-after.")
    for name, given in (("--dora", config.dora), ("--dropout", config.dropout)):
        if given:
            raise UsageError(f"{name} and --for do not go together: what is rounded is W + s·B·A", f"Leave out {name}.")


def make_aware(config: TrainConfig, model: Any, base: Path, steps: int) -> Aware:
    """What computes with the target's values in `model`, not yet installed. Raises: UnsupportedModel, ModelError."""
    assert config.target is not None
    module, name = trainable(config.target).make.split(":")
    make: Callable[[TrainConfig, Any, Path, int], Aware] = getattr(importlib.import_module(module), name)
    return make(config, model, base, steps)
