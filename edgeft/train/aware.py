"""What a trainer tells those that make training compute with the values of the file to come."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol


class Aware(Protocol):
    """Made before the trainer, as it may add trained parameters to the model; installed after the fused layers.

    What it keeps between steps beyond the model's trained parameters must follow from the step and those: checkpoints
    hold no more.
    """

    @property
    def ships(self) -> bool:
        """Whether the model now computes what the file will hold; validations before that do not choose the best."""

    def exact(self) -> AbstractContextManager[None]:
        """Within it the model computes with unrounded weights; for targets that have a teacher (`grids.Trainable`)."""

    def install(self, model: Any) -> None:
        """Replace the forward of layers."""

    def at_step(self, step: int) -> None:
        """So many optimizer steps are done; called before every forward pass of training, validation and scoring."""

    def moved(self) -> None:
        """Trained parameters were loaded from a checkpoint."""

    def save(self, folder: Path) -> None:
        """Write the weights as the file will store them; see edgeft.models.packed."""
