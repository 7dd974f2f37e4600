"""The merged model's tensors under their Hugging Face names, each read and merged when it is needed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeft.errors import ModelError
from edgeft.plugins import Source

from . import safetensors_rows
from .adapter import EMBEDDING, HEAD, check_fit, read_adapter
from .ggml import TYPES, Ggml
from .gguf_plan import read_config
from .merge import MergedTensor
from .safetensors_rows import Reader
from .tying import is_nf4, separate_head

if TYPE_CHECKING:
    from numpy.typing import NDArray

_SLAB = 1 << 20
"""Weights merged at once."""


@dataclass(frozen=True)
class Weights:
    """A merged model: what it is, and where its tensors come from."""

    config: Mapping[str, Any]
    """config.json of the merged model: an adapter may have grown the vocabulary or parted embedding and head."""
    tensors: Mapping[str, MergedTensor]
    tied: bool
    warnings: tuple[str, ...]

    @property
    def parameters(self) -> int:
        return sum(int(np.prod(tensor.shape)) for tensor in self.tensors.values())


def merged_weights(source: Source) -> Weights:
    """Headers only. Raises: ModelError, UnsupportedModel."""
    config = read_config(source.base)
    base = safetensors_rows.index(source.base)
    if EMBEDDING not in base:
        raise ModelError(f"{source.base} has no tensor {EMBEDDING}", "ONNX export knows decoder-only text models.")
    warnings: list[str] = []
    tied = bool(config.get("tie_word_embeddings", HEAD not in base))
    if tied:
        base.pop(HEAD, None)
    adapter = read_adapter(source.adapter) if source.adapter else None
    changes = dict(adapter.changes) if adapter else {}
    if tied:
        tied = not separate_head(base, adapter, changes, warnings)
    if adapter:
        check_fit(adapter, changes, base)
    if source.nf4:
        warnings.append("merged into the base as QLoRA trained on it, rounded to NF4 (docs/export.md)")
    tensors = {
        name: MergedTensor(stored, changes.get(name), nf4=source.nf4 and is_nf4(name, stored))
        for name, stored in base.items()
    }
    rows = tensors[EMBEDDING].shape[0]
    return Weights(
        {**config, "tie_word_embeddings": tied, "vocab_size": rows, "dtype": "float32"}, tensors, tied, tuple(warnings)
    )


class WeightReader:
    """Reads merged tensors as float32, one at a time."""

    def __init__(self, weights: Weights, reader: Reader, ggml: Ggml, rounding: str = "none") -> None:
        self._weights, self._reader, self._ggml = weights, reader, ggml
        self._rounding = rounding

    def read(self, name: str) -> NDArray[np.float32]:
        """All of a tensor, shape as stored.

        Raises:
            ModelError: it is missing, not finite, or cannot be read.
        """
        tensor = self._weights.tensors.get(name)
        if tensor is None:
            raise ModelError(f"the model lacks tensor {name}", "Copy or download the model again.")
        loaded = tensor.load(self._reader, self._ggml)
        matrix = np.empty((tensor.source.rows, tensor.source.columns), np.float32)
        step = max(1, _SLAB // tensor.source.columns)
        for start in range(0, len(matrix), step):
            part = loaded.rows(start, min(start + step, len(matrix)))
            if self._rounding != "none":
                self._ggml.round_to(TYPES[self._rounding.upper()], part)
            matrix[start : start + len(part)] = part
        return matrix.reshape(tensor.shape)
