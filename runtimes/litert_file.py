"""What the two runtimes of .litertlm files share: when they take a file, and how it reads and writes text."""

from __future__ import annotations

import importlib.util
import tempfile
from pathlib import Path

from edgeft.artifact import Artifact
from edgeft.errors import ModelError
from edgeft.models.litertlm import LitertFile, is_litertlm
from edgeft.plugins import Support

from .hf_text import HfText

INSTALL = "pip install 'edgeft[litert]'"


def supports(artifact: Artifact, modules: tuple[str, ...]) -> Support:
    if not artifact.path.is_file() or not is_litertlm(artifact.path):
        return Support(False, f"{artifact.path.name} is not a .litertlm file")
    return ready(modules)


def ready(modules: tuple[str, ...]) -> Support:
    for module in (*modules, "tokenizers", "numpy", "jinja2"):
        if importlib.util.find_spec(module) is None:
            return Support(False, f"{module} is not installed", INSTALL)
    return Support(True)


def text_of(file: LitertFile) -> HfText:
    """Raises: ModelError, MissingDependency."""
    try:
        with tempfile.TemporaryDirectory(prefix="edgeft-") as name:
            file.write_text_side(Path(name))
            text = HfText(Path(name), shown=file.path)
    except OSError as error:
        raise ModelError(f"the tokenizer of {file.path} cannot be unpacked: {error}") from error
    return text
