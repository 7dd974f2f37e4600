"""What is stored in a GGUF, as a torch model in float32: quantization without the runtime's arithmetic.

The tensors are widened by gguf-py's numpy code and computed with by transformers: neither is the runtime's, so where
this model and the runtime agree, both read the file as it is meant.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeft.errors import ModelError, UnsupportedModel, require
from edgeft.models.gguf_header import GgufHeader, TensorInfo, read_header
from edgeft.models.gguf_values import values
from edgeft.models.quiet import quiet_libraries
from edgeft.plugins import AdapterScale
from edgeft.verify.torch_reference import TorchReference

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

_ROTARY = ("llama", "granite", "smollm3")
"""Architectures whose files hold the two halves of every query and key head's rows in turn."""

_PLUS_ONE = ("gemma2", "gemma3")
"""Those whose norms are stored with the 1 that transformers adds while it computes."""

_EMBEDDING, _HEAD = "token_embd.weight", "output.weight"


@dataclass(frozen=True)
class _Lora:
    header: GgufHeader
    scale: float

    def change(self, name: str) -> Floats | None:
        """What the adapter adds to a tensor, in the file's row order: scale · alpha / rank · B A."""
        found = {info.name: info for info in self.header.tensors}
        if f"{name}.lora_a" not in found:
            return None
        a, b = (values(self.header, found[f"{name}.lora_{part}"]) for part in "ab")
        # llama.cpp takes an alpha of 0 for "no scale" (`llama-adapter.h`).
        alpha = float(self.header.metadata.get("adapter.lora.alpha", 0.0))
        rank = b.shape[-1]
        factor = self.scale * (alpha / rank if alpha else 1.0)
        return factor * (a @ b.T if name == _EMBEDDING else b @ a)


class _File:
    """The tensors of a GGUF, with adapters added, by transformers' names."""

    def __init__(self, header: GgufHeader, adapters: Sequence[AdapterScale], config: Any) -> None:
        gguf = require("gguf", "export")
        self._header, self._config = header, config
        self._tensors = {tensor.name: tensor for tensor in header.tensors}
        self._loras = [_Lora(read_header(adapter.path), adapter.scale) for adapter in adapters]
        kind = next((key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == header.architecture), None)
        if kind is None:
            raise UnsupportedModel(f"gguf does not know the architecture {header.architecture}")
        self._names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)

    def find(self, name: str) -> TensorInfo:
        found = self._tensors.get(str(self._names.get_name(name, try_suffixes=(".weight", ".bias"))))
        if found is None:
            raise UnsupportedModel(f"{self._header.path} has no tensor that edgeft knows to be {name}")
        return found

    def read(self, name: str, shape: tuple[int, ...]) -> Floats:
        """A parameter in transformers' layout. Raises: ModelError, UnsupportedModel."""
        info = self.find(name)
        found = values(self._header, info)
        if found.shape != shape:
            raise ModelError(f"{self._header.path}: {info.name} has shape {found.shape}, the model needs {shape}")
        for lora in self._loras:
            if (change := lora.change(info.name)) is not None:
                found += change
        if self._header.architecture in _PLUS_ONE and name.endswith("norm.weight"):
            found -= 1
        if self._header.architecture in _ROTARY and (".q_proj." in name or ".k_proj." in name):
            return found[self._rotary_order(len(found))]
        return found

    def _rotary_order(self, rows: int) -> NDArray[np.intp]:
        import numpy as np

        config = self._config
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return np.arange(rows).reshape(-1, head // 2, 2).transpose(0, 2, 1).reshape(-1)


def load_gguf_tensors(file: Path, folder: Path, adapters: Sequence[AdapterScale] = ()) -> TorchReference:
    """The weights a GGUF stores, in the model that `folder` has the configuration of.

    Args:
        adapters: adapter files that the runtime has beside the file.

    Raises:
        UnsupportedModel: the architecture's tensors are not transformers' own, or a type has no numpy code.
        ModelError: a file is damaged, or not of this model.
    """
    transformers, torch = require("transformers", "train"), require("torch", "train")
    header = read_header(file)
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    stored = {tensor.name: tensor for tensor in header.tensors}
    config.vocab_size = stored[_EMBEDDING].shape[1] if _EMBEDDING in stored else config.vocab_size
    config.tie_word_embeddings = _HEAD not in stored
    with quiet_libraries():
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    _fill(model, _File(header, adapters, config), torch)
    if "rope_freqs.weight" in stored:
        _scale_rotary(model, torch.from_numpy(values(header, stored["rope_freqs.weight"])))
    return TorchReference(model.eval(), has_adapter=False)


def _fill(model: Any, stored: _File, torch: Any) -> None:
    head, tied = model.get_output_embeddings(), model.config.tie_word_embeddings
    shared = {id(head.weight)} if tied and head is not None else set()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for module in model.modules():
        for attribute, parameter in list(module.named_parameters(recurse=False)):
            if not (module is head and id(parameter) in shared):
                found = torch.from_numpy(stored.read(names[id(parameter)], tuple(parameter.shape)))
                setattr(module, attribute, torch.nn.Parameter(found, requires_grad=False))
    model.tie_weights()


def _scale_rotary(model: Any, factors: Any) -> None:
    """Llama 3.1's divisors of the rotary frequencies, where the configuration does not have them already."""
    rope = getattr(model.config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") == "default":
        rotary = model.base_model.rotary_emb
        rotary.inv_freq = rotary.original_inv_freq = rotary.inv_freq / factors
