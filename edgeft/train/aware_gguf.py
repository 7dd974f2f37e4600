"""Training for a GGUF target: linear layers compute with ggml's values of W + s·B·A."""

from __future__ import annotations
