"""`llama-cpp-python`: llama.cpp compiled on this machine, for its very processor."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from .llama_runtime import LlamaRuntime


def find_library() -> Path | None:
    """libllama inside the package. Nothing is imported."""
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or not spec.submodule_search_locations:
        return None
    folder = Path(next(iter(spec.submodule_search_locations))) / "lib"
    names = ("libllama.so", "libllama.dylib", "llama.dll")
    return next((folder / name for name in names if (folder / name).is_file()), None)


runtime = LlamaRuntime(
    "llama-cpp-python", find_library, "pip install llama-cpp-python (compiles, needs a C++ compiler)"
)
