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


# Flash attention in 0.3.36 reads keys and values slowly: on SmolLM2-135M with 1,024 tokens in the cache, one core took
# 376 ms instead of 111 for the next turn's 13 tokens, and 824 instead of 442 for a turn with an answer of 17. (A whole
# prompt of 1,024 tokens took 11 % less with it.) In xllamacpp 2026.10 it is the better choice: 25 % less for a prompt.
runtime = LlamaRuntime(
    "llama-cpp-python",
    find_library,
    "pip install llama-cpp-python (compiles, needs a C++ compiler)",
    flash_attention=False,
)
