"""A Hugging Face model as an engine: logits of transformers, and its own cache of keys and values."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeft.chat import TokenIds
from edgeft.errors import ModelError, UnsupportedModel, require
from edgeft.models import nf4
from edgeft.models.weights import refuse_missing, refuse_pickles
from edgeft.plugins import AdapterScale, LoadOptions

from .onnx_session import first_line

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

STEP = 64
"""Tokens evaluated at once: a switch is heard between two steps."""


class TorchEngine:
    """One model on the CPU, or on the first GPU there is."""

    def __init__(self, folder: Path, options: LoadOptions, *, weights: str) -> None:
        """
        Args:
            weights: "nf4", or the name of a torch type that weights are rounded to and computed in.

        Raises:
            ModelError: transformers cannot load the directory.
        """
        self._torch = require("torch", "train")
        self._transformers = require("transformers", "train")
        self._folder, self._length = folder, 0
        self._model = load_model(folder, weights)
        if getattr(self._model, "_is_stateful", False):
            raise UnsupportedModel(f"{folder}: this architecture's state cannot be rewound")
        self._adapted = self._model
        self._cache: Any = self._transformers.DynamicCache()

    @property
    def vocabulary(self) -> int:
        """Rows of the head, which may be more than the tokenizer has tokens."""
        return int(self._model.get_output_embeddings().weight.shape[0])

    def evaluate(self, tokens: TokenIds, stopped: threading.Event) -> NDArray[np.float32] | None:
        import numpy as np

        before, rows = self._length, []
        for at in range(0, len(tokens), STEP):
            if stopped.is_set():
                self.rewind(before)
                return None
            rows.append(self._forward(tokens[at : at + STEP]))
        return np.concatenate(rows)

    def _forward(self, tokens: TokenIds) -> NDArray[np.float32]:
        torch = self._torch
        ids = torch.tensor([tokens], device=self._model.device)
        with torch.inference_mode():
            out = self._adapted(input_ids=ids, past_key_values=self._cache, use_cache=True)
        self._length += len(tokens)
        logits: NDArray[np.float32] = out.logits[0].float().cpu().numpy()
        return logits

    def rewind(self, length: int) -> None:
        if length == 0:
            self._cache = self._transformers.DynamicCache()
        elif length < self._length:
            self._cache.crop(length - self._length)  # negative: how many to drop, in all of transformers 5
        self._length = length

    def interrupt(self) -> None:
        """`evaluate` looks at its event between steps."""

    def close(self) -> None:
        self._model = self._adapted = self._cache = None

    # --- Adapters -----------------------------------------------------------

    def set_adapters(self, adapters: Sequence[AdapterScale]) -> None:
        """Raises: ModelError when one does not belong to this base; the others stay as they were."""
        peft = require("peft", "train")
        for adapter in adapters:
            if not (adapter.path / "adapter_config.json").is_file():
                raise ModelError(f"{adapter.path} is not an adapter directory", "transformers takes PEFT adapters.")
        if self._adapted is not self._model:
            self._model, before = self._adapted.unload(), self._adapted
            del before
            self._adapted = self._model
        if not adapters:
            return
        names = [f"adapter{at}" for at in range(len(adapters))]
        try:
            found = peft.PeftModel.from_pretrained(self._model, adapters[0].path, names[0])
            for name, adapter in zip(names[1:], adapters[1:], strict=True):
                found.load_adapter(adapter.path, name)
        except Exception as error:  # peft and torch raise anything on adapters of other models
            raise ModelError(
                f"{adapters[0].path} does not belong to {self._folder}: {first_line(error)}",
                "An adapter works on the base it was trained on.",
            ) from error
        found.base_model.set_adapter(names)
        for layer in found.modules():
            if isinstance(scaling := getattr(layer, "scaling", None), dict):
                for name, adapter in zip(names, adapters, strict=True):
                    if name in scaling:
                        scaling[name] *= adapter.scale
        self._adapted = found.eval()


def load_model(folder: Path, weights: str) -> Any:
    """Raises: ModelError, UnsupportedModel."""
    transformers, torch = require("transformers", "train"), require("torch", "train")
    refuse_pickles(folder)
    dtype = torch.bfloat16 if weights == "nf4" else getattr(torch, weights)
    options: dict[str, Any] = {"dtype": dtype, "use_safetensors": True, "trust_remote_code": False}
    if torch.cuda.is_available():
        options["device_map"] = {"": 0}
    try:
        if weights == "nf4":
            options["quantization_config"] = nf4.config(folder, dtype)
        model, found = transformers.AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, output_loading_info=True, **options
        )
    except Exception as error:  # transformers and safetensors raise anything on files made wrong
        raise ModelError(f"{folder} cannot be loaded: {first_line(error)}") from error
    refuse_missing(folder, found)
    return model.eval()
