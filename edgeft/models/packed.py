"""Weights as the file they were trained for stores them: what a run leaves, export writes and verify compares.

packed/
  packed.json            target, and the type of every tensor by its Hugging Face name
  weights.safetensors    their rows, (rows, bytes per row), in Hugging Face's order
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeft.errors import ModelError
from edgeft.paths import write_json

if TYPE_CHECKING:
    from torch import Tensor

INDEX, WEIGHTS = "packed.json", "weights.safetensors"
SCHEMA = 1


@dataclass(frozen=True)
class Packed:
    folder: Path
    target: str
    """The export target that these are weights of."""
    types: Mapping[str, str]
    """Hugging Face name -> type, such as Q4_0 or INT4."""

    @property
    def weights(self) -> Path:
        return self.folder / WEIGHTS


def read_packed(folder: Path) -> Packed:
    """Raises: ModelError."""
    file = folder / INDEX
    try:
        raw: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if raw["schema"] != SCHEMA:
            raise ModelError(f"{file} has schema {raw['schema']}; this edgeft reads schema {SCHEMA}")
        return Packed(folder, str(raw["target"]), dict(raw["types"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{file} cannot be read: {error}", "Train again.") from error


def write_packed(folder: Path, target: str, tensors: Mapping[str, tuple[str, Tensor]]) -> None:
    """Write name -> (type, rows) into a new folder. Raises: OSError."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    save_file({name: rows for name, (_, rows) in tensors.items()}, folder / WEIGHTS)
    types = {name: kind for name, (kind, _) in tensors.items()}
    write_json(folder / INDEX, {"schema": SCHEMA, "target": target, "types": types})


def fill(model: Any, packed: Packed) -> None:
    """Put the stored values into a causal model, in its own dtype.

    Raises:
        ModelError: a tensor of another model, or a damaged file.
    """
    import torch
    from safetensors import safe_open

    parameters = dict(model.named_parameters())
    try:
        with safe_open(packed.weights, "pt") as stored, torch.no_grad():
            for name, kind in packed.types.items():
                weight = parameters[name]
                weight.copy_(grid_of(kind).unpack(stored.get_tensor(name), weight.shape[1]))
    except (OSError, KeyError, RuntimeError) as error:
        raise ModelError(f"{packed.weights} does not go into the model: {error}") from error


def grid_of(kind: str) -> Any:
    """What rounds to the type and reads it (`edgeft.train.grids.Grid`). Raises: MissingDependency, UnsupportedModel."""
    from edgeft.models.nbits import KINDS

    if kind in KINDS:
        from edgeft.models.nbits_grid import NBitsGrid

        return NBitsGrid(kind)
    from edgeft.models.ggml_grid import GgmlGrid

    return GgmlGrid(kind)
