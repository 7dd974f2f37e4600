"""What makes a package that brings llama.cpp a runtime."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from edgeft.artifact import Artifact
from edgeft.errors import MissingDependency, ModelError
from edgeft.plugins import LoadOptions, Session, Support

from .llama_api import open_library
from .llama_session import LlamaSession


@dataclass(frozen=True)
class LlamaRuntime:
    name: str
    find_library: Callable[[], Path | None]
    install: str

    def supports(self, artifact: Artifact) -> Support:
        if not artifact.path.is_file() or artifact.path.open("rb").read(4) != b"GGUF":
            return Support(False, f"{artifact.path.name} is not a GGUF file")
        if self.find_library() is None:
            return Support(False, f"{self.name} is not installed", self.install)
        return Support(True)

    def load(self, artifact: Artifact, options: LoadOptions) -> Session:
        if not artifact.path.is_file():
            raise ModelError(f"no file {artifact.path}")
        library = self.find_library()
        if library is None:
            raise MissingDependency(f"{self.name} is not installed", self.install)
        return LlamaSession(open_library(library), artifact.path, options)
