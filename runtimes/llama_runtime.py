"""What makes a package that brings llama.cpp a runtime."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgeft.artifact import Artifact
from edgeft.errors import MissingDependency, ModelError, PluginError
from edgeft.plugins import LOADING, KvType, LoadOptions, Session, Support

from .llama_api import open_library
from .llama_session import LlamaSession
from .llama_slots import LlamaSlots


@dataclass(frozen=True)
class LlamaRuntime:
    name: str
    find_library: Callable[[], Path | None]
    install: str
    flash_attention: bool = True
    """Whether the library's own choice, flash attention wherever it can, is the faster one."""
    kv_types: Sequence[KvType] = ("f16", "q8_0")
    lookup: bool = True
    loading: Sequence[str] = LOADING

    def supports(self, artifact: Artifact) -> Support:
        if not artifact.path.is_file() or not _is_gguf(artifact.path):
            return Support(False, f"{artifact.path.name} is not a GGUF file")
        return self.ready()

    def ready(self) -> Support:
        library = self.find_library()
        if library is None:
            return Support(False, f"{self.name} is not installed", self.install)
        try:
            open_library(library)
        except PluginError as error:  # another package may bring a library that fits
            return Support(False, error.message)
        return Support(True)

    def load(self, artifact: Artifact, options: LoadOptions) -> Session:
        if not artifact.path.is_file():
            raise ModelError(f"no file {artifact.path}")
        library = self.find_library()
        if library is None:
            raise MissingDependency(f"{self.name} is not installed", self.install)
        kind = LlamaSlots if options.parallel > 1 else LlamaSession
        return kind(open_library(library), artifact.path, options, self.flash_attention)


def _is_gguf(path: Path) -> bool:
    """Raises: ModelError when the file cannot be read."""
    try:
        with path.open("rb") as stream:
            return stream.read(4) == b"GGUF"
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from error
