"""The reference of every comparison: base weights in float32 with the adapter by PEFT, in torch."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeft.errors import MissingDependency, ModelError, require
from edgeft.models import nf4
from edgeft.models.packed import fill, read_packed
from edgeft.models.quiet import quiet_libraries
from edgeft.models.weights import refuse_missing, refuse_pickles
from edgeft.openmp import TRAINING, short_spins

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class TorchReference:
    """Base and merged model in one set of weights: the adapter is merged in place and can be taken out again.

    The base has the weights export merges into: its own, or for a run of QLoRA those it was trained on. A GGUF that was
    trained on as it is stays as it is: there the adapter is computed beside it.
    """

    def __init__(self, model: Any, has_adapter: bool, *, merged: bool = True) -> None:
        self._model = model
        self.has_adapter = has_adapter
        self.merged = merged

    @property
    def parameters(self) -> int:
        """Weights of the base, each counted once."""
        model = self._model.get_base_model() if self.has_adapter else self._model
        names = ((name, weight) for name, weight in model.named_parameters() if ".lora_" not in name)
        return sum({id(weight): weight.numel() for _, weight in names}.values())

    @property
    def vocabulary(self) -> int:
        return int(self._model.get_output_embeddings().weight.shape[0])

    def log_probs(self, tokens: Sequence[int], rows: Sequence[int]) -> NDArray[np.float32]:
        """Next-token log-probabilities after the tokens at `rows`: shape (len(rows), vocabulary), natural log."""
        import torch

        with torch.inference_mode():
            ids = torch.tensor([list(tokens)])
            # Only the wanted rows go through the head: all of them would be tokens x vocabulary floats.
            logits = self._model(input_ids=ids, use_cache=False, logits_to_keep=torch.tensor(list(rows))).logits[0]
            result: NDArray[np.float32] = torch.log_softmax(logits.float(), dim=-1).numpy()
            return result

    def plain_copy(self) -> Any:
        """The merged model by itself, in memory of its own."""
        copied = copy.deepcopy(self._model)
        with quiet_libraries():
            return copied.merge_and_unload() if self.has_adapter else copied

    @contextlib.contextmanager
    def without_adapter(self) -> Iterator[None]:
        """The base model, for as long as the context lasts."""
        if not self.has_adapter:
            yield
            return
        if not self.merged:
            with self._model.disable_adapter():
                yield
            return
        self._model.unmerge_adapter()
        try:
            with self._model.disable_adapter():
                yield
        finally:
            self._model.merge_adapter()

    def save(self, folder: Path, *, rounded: bool = True) -> None:
        """Write the model with its adapter merged, in bfloat16 or as it is; it is of no use afterwards."""
        import torch

        merged = self._model.merge_and_unload() if self.has_adapter else self._model
        (merged.to(torch.bfloat16) if rounded else merged).save_pretrained(folder)


def available() -> bool:
    """Whether the reference can be computed here (torch, transformers and peft are installed)."""
    from importlib.util import find_spec

    return all(find_spec(name) is not None for name in ("torch", "transformers", "peft"))


def load_reference(
    base: Path,
    adapter: Path | None,
    *,
    rounded: bool = False,
    gguf: Path | None = None,
    packed: Path | None = None,
) -> TorchReference:
    """Load a base model in float32 and merge an adapter into it.

    Args:
        rounded: take the base as QLoRA trained on it, rounded to NF4 by bitsandbytes itself.
        packed: take these weights (`edgeft.models.packed`), which have the adapter in them.
        gguf: take the weights of this file, of which `base` is the text side, and do not merge.

    Raises:
        MissingDependency: torch, transformers or peft is not installed.
        ModelError: the adapter does not fit the base, or one of them cannot be read.
    """
    if not available():
        raise MissingDependency("verifying needs torch, transformers and peft", "pip install 'edgeft[train]'")
    with short_spins(TRAINING):
        require("torch", "train")  # takes turns with llama.cpp: its threads must not hold the cores
    with quiet_libraries():
        model = _load_base(base) if gguf is None else _load_gguf(gguf, base)
        if rounded:
            _round_to_nf4(model)
        if packed is not None:
            fill(model, read_packed(packed))
            adapter = None
        if adapter is not None:
            model = with_adapter(model, base, adapter)
            if gguf is None:
                model.merge_adapter()
    return TorchReference(model.eval(), adapter is not None, merged=gguf is None)


def _load_gguf(file: Path, folder: Path) -> Any:
    torch = require("torch", "train")
    from edgeft.models.gguf_torch import load_packed, unpack

    model = load_packed(file, folder, torch.float32)
    unpack(model)
    return model


def _load_base(base: Path) -> Any:
    torch = require("torch", "train")
    transformers = require("transformers", "train")
    refuse_pickles(base)
    try:
        # The attention is transformers' choice: Gemma 2 soft-caps its scores, which torch's fused one cannot.
        model, found = transformers.AutoModelForCausalLM.from_pretrained(
            base,
            output_loading_info=True,
            dtype=torch.float32,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
        )
    except Exception as error:  # transformers and safetensors raise anything on files made wrong
        raise ModelError(f"{base} cannot be loaded: {_first_line(error)}") from error
    refuse_missing(base, found)
    return model


def _round_to_nf4(model: Any) -> None:
    torch = require("torch", "train")
    functional = require("bitsandbytes.functional", "train")
    kept = nf4.kept(model)
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear) and name not in kept:
            packed, state = functional.quantize_4bit(layer.weight.data, quant_type="nf4", compress_statistics=True)
            layer.weight.data = functional.dequantize_4bit(packed, state)


def with_adapter(model: Any, base: Path, adapter: Path) -> Any:
    """A base model with a PEFT adapter beside it, its embedding as long as the adapter's. Raises: ModelError."""
    peft = require("peft", "train")
    refuse_pickles(adapter)
    try:
        if (rows := _embedding_rows(adapter)) is not None and rows != model.get_input_embeddings().weight.shape[0]:
            model.resize_token_embeddings(rows)
        model = peft.PeftModel.from_pretrained(model, str(adapter), local_files_only=True)
    except Exception as error:  # PEFT, too
        raise ModelError(
            f"the adapter {adapter} does not go onto {base}: {_first_line(error)}",
            "Give the base model that the adapter was trained on.",
        ) from error
    return model


def _embedding_rows(adapter: Path) -> int | None:
    """Rows of the token embedding that the adapter brings (training added tokens), if it brings one."""
    safetensors = require("safetensors", "export")
    file = adapter / "adapter_model.safetensors"
    if not file.is_file():
        return None
    with safetensors.safe_open(file, "pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118, not a mapping
            if name.endswith("embed_tokens.weight"):
                return int(tensors.get_slice(name).get_shape()[0])
    return None


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
