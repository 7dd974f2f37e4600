"""Training ternary models: all weights are trained, and what is computed with is what the file will hold.

Every trained tensor is kept twice. The model's parameters hold the file's values, in the dtype that is computed in:
s · T in the linear layers, the rounding of the exporter's own plan elsewhere (embedding, head, layers whose rows do not
fill blocks of 256). Beside them lie the latent weights, in float32, that those are rounded from. A gradient with
respect to the values counts as one with respect to the latent weights (straight-through estimator, Bengio et al. 2013,
arXiv 1308.3432), so the optimizer finds the latent weights in the parameters' place while it steps, and nothing else in
a step knows of them.

Rounding may come gradually: parameter = latent + λ · (value - latent), λ from 0 to 1 over the first part of the steps.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edgeft.errors import ModelError, UnsupportedModel
from edgeft.models.ggml_grid import GgmlGrid
from edgeft.models.packed import write_packed
from edgeft.train import ternary_activations
from edgeft.train.aware_gguf import tensor_types
from edgeft.train.config import TrainConfig
from edgeft.train.ternary_grid import KINDS, Group, TernaryGrid
from edgeft.train.ternary_settings import effective_ramp


def make(config: TrainConfig, model: Any, base: Path, steps: int) -> TernaryWeights:
    """Raises: UnsupportedModel when no tensor's rows fill blocks of 256; ModelError."""
    assert config.target is not None
    kinds = tensor_types(base, config.target)
    ramp = Ramp.over(steps, config.quantize_after, effective_ramp(config))
    return TernaryWeights(config.target, kinds, ramp, config.ternary_scale, activations=config.activations)


@dataclass(frozen=True)
class Ramp:
    """λ by step: 0 before `begin`, 1 from `whole` on."""

    begin: int
    whole: int

    @classmethod
    def over(cls, steps: int, after: float, share: float) -> Ramp:
        """
        Args:
            after: share of the steps before rounding begins.
            share: share of the steps in which λ grows. At least the last step has λ = 1.
        """
        whole = min(int((after + share) * steps), steps - 1)
        return cls(min(int(after * steps), whole), whole)

    def at(self, step: int) -> float:
        if step >= self.whole:
            return 1.0
        return max(0, step - self.begin) / (self.whole - self.begin) if self.whole > self.begin else 0.0


class Latent:
    """One parameter, its latent weights, and the grid that they are rounded to; None: the file has them in float32."""

    def __init__(self, parameter: Any, grid: GgmlGrid | TernaryGrid | None) -> None:
        self.parameter, self.grid = parameter, grid
        self.values = parameter.data.contiguous()
        self.weights = self.values.float().clone()

    def show_values(self) -> None:
        self.parameter.grad, self.parameter.data = None, self.values

    def show_weights(self) -> None:
        """With the gradient of the values for theirs."""
        grad, self.parameter.grad = self.parameter.grad, None
        self.parameter.data = self.weights
        self.parameter.grad = None if grad is None else grad.float()

    def round(self, share: float) -> None:
        """Make the values anew, `share` (λ) of the way from the latent weights to the grid."""
        if self.grid is None or share == 0:
            self.values.copy_(self.weights)
            return
        self.grid.values(self.weights, self.values)
        if share < 1:
            self.values.copy_(self.weights.lerp(self.values.float(), share))

    def pack(self) -> Tensor:
        """As the file stores the values. Raises: ModelError when it would hold others than were computed with."""
        assert self.grid is not None
        packed = self.grid.pack(self.weights)
        stored = self.grid.unpack(packed, self.weights.shape[1])
        if not torch.equal(stored.to(self.values.dtype), self.values.cpu()):
            raise ModelError(f"{self.grid.name} does not hold the values of training", "Please report this.")
        return packed


class TernaryWeights:
    """See `edgeft.train.aware.Aware`. Between `begin_update` and `end_update` parameters are the latent weights."""

    def __init__(
        self, target: str, kinds: Mapping[str, str], ramp: Ramp, group: Group = "row", activations: int = 16
    ) -> None:
        """
        Args:
            kinds: Hugging Face name -> type in the file.
            activations: bits of the inputs of ternary layers: 8 as llama.cpp computes, or 16.
        """
        self.target, self._kinds, self._ramp, self._bits = target, kinds, ramp, activations
        if not any(kind in KINDS for kind in kinds.values()):
            raise UnsupportedModel(
                f"no tensor has rows that fill blocks of 256: a {target} file of it would have no ternary weights",
                "Choose a base whose hidden size is a multiple of 256, or --for gguf-q4_0.",
            )
        self._grids = {kind: TernaryGrid(kind, group) if kind in KINDS else GgmlGrid(kind) for kind in kinds.values()}
        self._tensors: dict[str, Latent] = {}
        self._step = -1
        self._current = False
        self.ships = False

    def install(self, model: Any) -> None:
        """See `edgeft.train.aware.Aware`."""
        parameters = dict(model.named_parameters())
        if missing := set(self._kinds) - set(parameters):
            raise UnsupportedModel(f"the model has no parameter {sorted(missing)[0]}, which {self.target} quantizes")
        for name, parameter in parameters.items():
            kind = self._kinds.get(name)
            self._tensors[name] = Latent(parameter, self._grids[kind] if kind else None)
        if self._bits == 8:
            ternary_activations.install(model, [name for name, kind in self._kinds.items() if kind in KINDS])

    def at_step(self, step: int) -> None:
        """See `edgeft.train.aware.Aware`."""
        if step == self._step and self._current:
            return
        share = self._ramp.at(step)
        with torch.no_grad():
            for tensor in self._tensors.values():
                tensor.round(share)
        self._step, self._current, self.ships = step, True, share == 1

    def begin_update(self) -> None:
        """The optimizer is about to step: its parameters are the latent weights."""
        for tensor in self._tensors.values():
            tensor.show_weights()

    def end_update(self) -> None:
        """It has stepped; the parameters are values again, those of before until `at_step`."""
        for tensor in self._tensors.values():
            tensor.show_values()
        self._current = False

    @contextlib.contextmanager
    def exact(self) -> Iterator[None]:
        """See `edgeft.train.aware.Aware`."""
        with torch.no_grad():
            for tensor in self._tensors.values():
                tensor.round(0)
        try:
            yield
        finally:
            self._current = False
            self.at_step(self._step)

    def moved(self) -> None:
        """See `edgeft.train.aware.Aware`."""
        self._current = False

    @property
    def latents(self) -> dict[str, Tensor]:
        """What is trained, by the parameters' names."""
        return {name: tensor.weights for name, tensor in self._tensors.items()}

    def save(self, folder: Path) -> None:
        """See `edgeft.train.aware.Aware`."""
        packed = {name: (kind, self._tensors[name].pack()) for name, kind in self._kinds.items()}
        write_packed(folder, self.target, packed)
