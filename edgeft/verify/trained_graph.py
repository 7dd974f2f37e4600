"""The graph that was trained: base as training held it, adapter beside it, in training's precision."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeft.errors import require
from edgeft.models.quiet import quiet_libraries
from edgeft.plugins import Source
from edgeft.run import Run
from edgeft.verify.torch_reference import with_adapter

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class TrainedGraph:
    """Base and adapter as `edgeft train` evaluates them: packed weights, fused layers, the compute dtype."""

    def __init__(self, model: Any, autocast: bool) -> None:
        self._model, self._autocast = model, autocast

    @property
    def bytes(self) -> int:
        """Of all weights as they lie in memory."""
        stored = {value.data_ptr(): value.nbytes for value in self._model.parameters()}
        return sum(stored.values())

    def log_probs(self, tokens: Sequence[int], rows: Sequence[int]) -> NDArray[np.float32]:
        """As `TorchReference.log_probs`."""
        import torch

        device = next(self._model.parameters()).device
        ids, kept = torch.tensor([list(tokens)], device=device), torch.tensor(list(rows), device=device)
        mixed = torch.autocast(device.type, dtype=torch.bfloat16) if self._autocast else contextlib.nullcontext()
        with torch.inference_mode(), mixed:
            logits = self._model(input_ids=ids, use_cache=False, logits_to_keep=kept).logits[0]
            result: NDArray[np.float32] = torch.log_softmax(logits.float(), dim=-1).cpu().numpy()
            return result


def load_trained(run: Run, source: Source) -> TrainedGraph:
    """The model of a finished run, on the device it would train on here.

    Raises:
        MissingDependency: a package that training needs is missing.
        ConfigError, ModelError, UnsupportedModel: a part of the run cannot be read.
    """
    from edgeft.train import fused
    from edgeft.train.config import read_config
    from edgeft.train.hardware import detect
    from edgeft.train.loading import load_base

    require("psutil", "train")
    config = read_config(run.path)
    hardware = detect(config.device, config.dtype)
    with quiet_libraries():
        model = load_base(source.base, config, hardware, source.gguf)
        if source.adapter is not None:
            model = with_adapter(model, source.base, Path(source.adapter))
        if source.adapter is not None or config.target:
            fused.install(model)
    mixed = config.method == "full" and not config.target and hardware.dtype == "bfloat16"
    return TrainedGraph(model.eval(), mixed)
