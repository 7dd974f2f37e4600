"""The merged model as other programs see it: tensors by their Hugging Face names, in float32, one at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgeft.errors import ModelError
from edgeft.plugins import Source

from .ggml import Ggml
from .gguf_plan import named_tensors
from .safetensors_rows import Reader

if TYPE_CHECKING:
    from types import TracebackType

    import numpy as np
    from numpy.typing import NDArray


class Merged:
    """Base plus adapter, exactly as an export has them. A context manager: it holds files open."""

    def __init__(self, source: Source, ggml: Ggml) -> None:
        """Raises: ModelError, UnsupportedModel."""
        self._ggml = ggml
        self._tensors = named_tensors(source)
        self._reader = Reader()

    @property
    def gguf_names(self) -> dict[str, tuple[str, ...]]:
        """Hugging Face name -> the tensors of the file that hold its rows, in equal parts."""
        return {name: names for name, (_, names) in self._tensors.items()}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tensor.shape for name, (tensor, _) in self._tensors.items()}

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
