"""`xllamacpp`: llama.cpp in a prebuilt wheel for Linux, macOS and Windows; needs no compiler."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from .llama_runtime import LlamaRuntime


def find_library() -> Path | None:
    """The extension module itself: it carries all of llama.cpp and exports its C interface. Nothing is imported."""
    spec = importlib.util.find_spec("xllamacpp")
    if spec is None or not spec.submodule_search_locations:
        return None
    folder = Path(next(iter(spec.submodule_search_locations)))
    return next((file for pattern in ("*.so", "*.pyd") for file in sorted(folder.glob(pattern))), None)


runtime = LlamaRuntime("xllamacpp", find_library, "pip install 'edgeft[device]'")
