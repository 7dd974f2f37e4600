"""Vectors of texts by a static embedding model on this device: a table of token vectors, their mean, length one.

A folder with `tokenizer.json` and a `model.safetensors` that has one matrix `embeddings` (tokens, dimensions): what
model2vec makes and publishes. A text takes tens of microseconds; there is no network and no torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeft.errors import ConfigError, require

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Vector = NDArray[np.float32]


class Embedder:
    def __init__(self, folder: Path) -> None:
        """Raises: ConfigError when the folder has no such model; MissingDependency."""
        tokenizers, safetensors = require("tokenizers", "near"), require("safetensors.numpy", "near")
        try:
            self._tokenizer: Any = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
            self._table: Any = safetensors.load_file(folder / "model.safetensors")["embeddings"]
        except Exception as error:  # both libraries raise what they like
            raise ConfigError(
                f"{folder} is no static embedding model: {error}",
                "It needs tokenizer.json, and model.safetensors with a matrix named embeddings.",
            ) from error
        if self._table.ndim != 2 or len(self._table) < self._tokenizer.get_vocab_size():
            raise ConfigError(f"{folder}: {self._table.shape} vectors do not belong to this tokenizer")

    def vector(self, text: str) -> Vector | None:
        """Of length one, shape (dimensions,); None for a text that has no known token."""
        import numpy as np

        tokens = self._tokenizer.encode(text, add_special_tokens=False).ids
        if not tokens:
            return None
        mean = self._table[tokens].astype(np.float32).mean(0)
        length = float(np.linalg.norm(mean))
        return mean / length if length > 0 else None
