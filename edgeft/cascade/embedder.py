"""Vectors of texts by a static embedding model on this device: a table of token vectors, their mean, length one.

A folder with `tokenizer.json` and a `model.safetensors` that has one matrix `embeddings` (tokens, dimensions): what
model2vec makes and publishes. A text takes tens of microseconds; there is no network and no torch.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeft.errors import ConfigError, require
from edgeft.paths import sha256_file

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Vector = NDArray[np.float32]

_MODEL, _TOKENIZER = "model.safetensors", "tokenizer.json"


class Embedder:
    def __init__(self, folder: Path) -> None:
        """Raises: ConfigError when the folder has no such model; MissingDependency."""
        self._folder = folder
        tokenizers, safetensors = require("tokenizers", "near"), require("safetensors.numpy", "near")
        try:
            self._tokenizer: Any = tokenizers.Tokenizer.from_file(str(folder / _TOKENIZER))
            self._table: Any = safetensors.load_file(folder / _MODEL)["embeddings"]
        except Exception as error:  # both libraries raise what they like
            raise ConfigError(
                f"{folder} is no static embedding model: {error}",
                "It needs tokenizer.json, and model.safetensors with a matrix named embeddings.",
            ) from error
        if self._table.ndim != 2 or len(self._table) < self._tokenizer.get_vocab_size():
            raise ConfigError(f"{folder}: {self._table.shape} vectors do not belong to this tokenizer")

    @functools.cached_property
    def digest(self) -> str:
        """Hex SHA-256 over those of the model and of its tokenizer: either changes what vectors mean."""
        digests = [sha256_file(self._folder / name) for name in (_MODEL, _TOKENIZER)]
        return hashlib.sha256("\n".join(digests).encode()).hexdigest()

    def vector(self, text: str) -> Vector | None:
        """Of length one, shape (dimensions,); None for a text that has no known token."""
        import numpy as np

        tokens = self._tokenizer.encode(text, add_special_tokens=False).ids
        if not tokens:
            return None
        mean = self._table[tokens].astype(np.float32).mean(0)
        length = float(np.linalg.norm(mean))
        return mean / length if length > 0 else None
