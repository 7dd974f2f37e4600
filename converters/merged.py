"""The merged model as other programs see it: tensors by their Hugging Face names, in float32, one at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from edgeft.errors import ModelError
from edgeft.plugins import Source

from . import gguf_architectures as architectures
from .adapter import read_adapter
from .ggml import Ggml
from .gguf_plan import merged_tensors, named_tensors, read_config
from .merge import Stack
from .safetensors_rows import Reader

if TYPE_CHECKING:
    from types import TracebackType

    from numpy.typing import NDArray


def stacked_tensors(source: Source) -> dict[str, dict[str, Stack]]:
    """Parameter that holds all experts of a layer, by transformers 5's name -> GGUF name -> its experts, merged.

    Raises:
        ModelError, UnsupportedModel
    """
    config = read_config(source.base)
    family = architectures.family_of(config)
    config = architectures.settings(config, family)
    together = {name: weight for layout in family.layouts for name, weight in layout.items() if len(weight.shape) > 2}
    if not together:
        return {}
    sizes = architectures.sizes_of(config)
    adapter = read_adapter(source.adapter) if source.adapter else None
    merged = merged_tensors(source, adapter, config, family, sizes, warnings=[])
    found: dict[str, dict[str, Stack]] = {}
    for layer in range(sizes.layers):
        for name, weight in together.items():
            stacks = {f"blk.{layer}.{gguf}": merged[f"blk.{layer}.{gguf}"] for gguf in weight.gguf}
            found[f"model.layers.{layer}.{name}"] = {k: v for k, v in stacks.items() if isinstance(v, Stack)}
    return found


class Merged:
    """Base plus adapter, exactly as an export has them. A context manager: it holds files open."""

    def __init__(self, source: Source, ggml: Ggml) -> None:
        """Raises: ModelError, UnsupportedModel."""
        self._ggml = ggml
        self._tensors = named_tensors(source)
        self._stacks = stacked_tensors(source)
        self._reader = Reader()

    @property
    def gguf_names(self) -> dict[str, tuple[str, ...]]:
        """Hugging Face name -> the tensors of the file that hold its rows, in equal parts."""
        return {name: names for name, (_, names) in self._tensors.items()}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tensor.shape for name, (tensor, _) in self._tensors.items()}

    @property
    def stacked(self) -> dict[str, tuple[str, ...]]:
        """Parameter that holds all experts of a layer, as transformers 5 names it -> the file's tensors, likewise."""
        return {name: tuple(gguf) for name, gguf in self._stacks.items()}

    def experts(self, name: str) -> Iterator[NDArray[np.float32]]:
        """Such a parameter expert by expert, (rows, columns), however the checkpoint has it. Raises: ModelError."""
        stacks = self._stacks[name].values()
        for parts in zip(*(stack.parts for stack in stacks), strict=True):
            loaded = [(part, part.load(self._reader, self._ggml)) for part in parts]
            # A copy: rows are valid until the next call.
            yield np.concatenate([tensor.rows(0, part.shape[0]).copy() for part, tensor in loaded])

    def read(self, name: str) -> NDArray[np.float32]:
        """One tensor. Raises: ModelError when there is none of that name, or it is damaged."""
        if name not in self._tensors:
            raise ModelError(f"the model has no tensor {name}")
        tensor = self._tensors[name][0]
        rows = tensor.shape[0] if len(tensor.shape) > 1 else 1
        # A copy: the rows are valid until the next call.
        return tensor.load(self._reader, self._ggml).rows(0, rows).reshape(tensor.shape).copy()

    def __enter__(self) -> Merged:
        self._reader.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._reader.__exit__(kind, error, at)
