"""What ternary training adds to a trainer: latent weights while the optimizer steps, and the base as a teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from edgeft.train.config import TrainConfig
from edgeft.train.hardware import Hardware
from edgeft.train.loading import load_base
from edgeft.train.ternary import TernaryWeights


class _LatentUpdate(TrainerCallback):  # type: ignore[misc]
    """Gradients were made with the file's values; the optimizer applies them to the latent weights."""

    def __init__(self, weights: TernaryWeights) -> None:
        self._weights = weights

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        self._weights.begin_update()

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        self._weights.end_update()


def prepare_ternary(trainer: Any, config: TrainConfig, base: Path, hardware: Hardware) -> None:
    """Raises: ModelError when the base cannot be loaded a second time."""
    trainer.add_callback(_LatentUpdate(trainer.aware))
    if config.teacher:
        import dataclasses

        # Without a target and a method that trains it, it is loaded in the compute dtype.
        plain = dataclasses.replace(config, method="lora", target=None, teacher=0.0, **_NO_TERNARY)
        trainer.teacher = load_base(base, plain, hardware).eval().requires_grad_(False)


_NO_TERNARY: dict[str, Any] = {"quantize_after": 0.0, "ramp": None, "ternary_scale": "row", "activations": 16}
