"""Settings of ternary training, checked before anything is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgeft.errors import UsageError

if TYPE_CHECKING:
    from edgeft.train.config import TrainConfig

TARGETS = ("gguf-tq2_0", "gguf-tq1_0")

SCALES = ("row", "tensor", "block")
"""`edgeft.train.ternary_grid.Group`, without importing torch."""

RAMP = 0.2
"""Share of the steps in which rounding grows from none to whole, unless said otherwise."""


def is_ternary(config: TrainConfig) -> bool:
    return config.target in TARGETS


def effective_ramp(config: TrainConfig) -> float:
    return RAMP if config.ramp is None else config.ramp


def check_ternary(config: TrainConfig) -> None:
    """Raises: UsageError."""
    if config.ternary_scale not in SCALES:
        raise UsageError(f"no scale per {config.ternary_scale!r}", f"There are: {', '.join(SCALES)}.")
    if config.activations not in (8, 16):
        raise UsageError(f"activations have 8 or 16 bits in training, not {config.activations}")
    if config.from_scratch and config.method != "full":
        raise UsageError("from scratch, all weights are trained", "Use --method full.")
    if config.from_scratch and config.teacher:
        raise UsageError("--from-scratch has no original model that could teach", "Leave out --teacher.")
    if is_ternary(config):
        if config.ramp is not None and not 0 <= config.ramp + config.quantize_after <= 1:
            raise UsageError(f"the ramp must be from 0 to 1 with what comes before it, not {config.ramp}")
        return
    for option, given in (
        ("--ramp", config.ramp is not None),
        ("--ternary-scale", config.ternary_scale != SCALES[0]),
        ("--activations", config.activations != 16),
    ):
        if given:
            raise UsageError(f"{option} is for ternary training", f"Add --for {TARGETS[0]}, or leave it out.")
