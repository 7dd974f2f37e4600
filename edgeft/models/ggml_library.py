"""Where ggml is: the shared library that a llama.cpp binding brings along."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from edgeft.errors import MissingDependency

_LIBRARIES = (
    ("llama_cpp", "lib", ("libggml-base.so", "libggml-base.dylib", "ggml-base.dll", "libggml-base.so.*")),
    ("xllamacpp", "", ("xllamacpp*.so", "xllamacpp*.pyd")),
)


def ggml_library() -> Path:
    """The shared library with ggml's quantizers; found without importing the package that ships it.

    Raises:
        MissingDependency: neither binding is installed.
    """
    for package, folder, patterns in _LIBRARIES:
        spec = importlib.util.find_spec(package)
        for location in (spec.submodule_search_locations or ()) if spec else ():
            for pattern in patterns:
                if found := sorted(Path(location, folder).glob(pattern)):
                    return found[0]
    raise MissingDependency("no library with ggml's quantizers is installed", "pip install 'edgeft[export]'")
