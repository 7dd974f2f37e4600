"""Making, finding and removing the environments."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from edgeft.errors import EdgeftError, MissingDependency, UsageError, WriteError
from edgeft.paths import home, parse_json, write_json
from edgeft.progress import Progress

MARKER = "toolchain.json"


@dataclass(frozen=True)
class Toolchain:
    """What goes into an environment."""

    name: str
    about: str
    requirements: tuple[str, ...]
    """Pins, as pip takes them: what was tried together."""
    worker: str
    """The script in `edgeft/toolchain/workers` that runs in it."""
    size_mb: int
    """Of the installed environment, roughly."""

    @property
    def digest(self) -> str:
        """Of the requirements and the Python: an environment with another one is stale."""
        text = "\n".join((*self.requirements, f"python {sys.version_info.major}.{sys.version_info.minor}"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]


TOOLCHAINS: Mapping[str, Toolchain] = {
    "optimum": Toolchain(
        "optimum",
        "ONNX graphs of architectures that onnxruntime-genai's builder does not know.",
        (
            "optimum-onnx==0.1.0",  # holds transformers below 4.58
            "transformers==4.57.6",
            "torch==2.13.0",
            "onnx==1.23.2",
            "onnxruntime==1.32.0",  # Optimum runs the graph to find what its axes are
        ),
        "optimum_export.py",
        2100,
    ),
    "litert": Toolchain(
        "litert",
        "LiteRT-LM files (.litertlm) for Android, iOS and desktops.",
        (
            "litert-torch==0.10.0",
            "ai-edge-litert==2.3.0",
            "ai-edge-quantizer==0.10.0",
            "litert-converter==0.5.0",  # x86-64 only
            "litert-lm-builder==0.18.1",
            "jax==0.10.2",
            "jaxlib==0.10.2",
            "torchao==0.18.0",
            "torch==2.13.0",
            "transformers==5.23.0",
        ),
        "litert_export.py",
        2200,
    ),
    "executorch": Toolchain(
        "executorch",
        "ExecuTorch programs (.pte) for Android and iOS, and running them here.",
        (
            "executorch==1.5.1",
            "torchao==0.18.0",
            "pytorch-tokenizers==1.5.0",
            "torch==2.13.0",
            "transformers==5.23.0",
        ),
        "executorch_export.py",
        1700,
    ),
}

State = Literal["installed", "stale", "missing"]


@dataclass(frozen=True)
class Status:
    """How an environment is."""

    toolchain: Toolchain
    state: State
    """"stale": made from other requirements or another Python."""
    folder: Path


def toolchains_dir() -> Path:
    return home() / "toolchains"


def find_toolchain(name: str) -> Toolchain:
    """Raises: UsageError."""
    if name not in TOOLCHAINS:
        raise UsageError(f"there is no toolchain {name!r}", f"There are: {', '.join(TOOLCHAINS)}.")
    return TOOLCHAINS[name]


def status(toolchain: Toolchain) -> Status:
    """Whether it is there and made from today's requirements."""
    folder = toolchains_dir() / toolchain.name
    try:
        marker = parse_json((folder / MARKER).read_bytes())
        state: State = "installed" if marker["digest"] == toolchain.digest else "stale"
    except (OSError, ValueError, KeyError, TypeError):
        state = "stale" if folder.is_dir() else "missing"
    return Status(toolchain, state, folder)


def python_of(toolchain: Toolchain) -> Path:
    """The environment's interpreter.

    Raises:
        MissingDependency: it is not installed, or stale.
    """
    found = status(toolchain)
    if found.state != "installed":
        what = "is out of date" if found.state == "stale" else "is not installed"
        raise MissingDependency(f"the toolchain {toolchain.name} {what}", f"edgeft toolchain install {toolchain.name}")
    return _python(found.folder)


def install(toolchain: Toolchain, progress: Progress) -> Status:
    """Make the environment anew, under a hidden name that becomes its own when all is in it.

    Raises:
        WriteError: the folder cannot be written.
        EdgeftError: pip failed; its last words are in the message.
    """
    root = toolchains_dir()
    try:
        root.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{toolchain.name}.", dir=root))
    except OSError as error:
        raise WriteError.from_os_error(error, root) from error
    progress.start(f"Installing {toolchain.name}", None)
    try:
        _run([sys.executable, "-m", "venv", str(temporary)], progress)
        if toolchain.requirements:
            pip = [str(_python(temporary)), "-m", "pip", "install", "--disable-pip-version-check", "--progress-bar=off"]
            _run([*pip, *toolchain.requirements], progress)
        write_json(temporary / MARKER, {"digest": toolchain.digest, "requirements": toolchain.requirements})
        _replace(root / toolchain.name, temporary)
    except OSError as error:
        raise WriteError.from_os_error(error, root) from error
    finally:
        progress.finish()
        shutil.rmtree(temporary, ignore_errors=True)
    return status(toolchain)


def remove(toolchain: Toolchain) -> None:
    """Raises: UsageError when it is not there, WriteError."""
    folder = toolchains_dir() / toolchain.name
    if not folder.is_dir():
        raise UsageError(f"the toolchain {toolchain.name} is not installed")
    try:
        shutil.rmtree(folder)
    except OSError as error:
        raise WriteError.from_os_error(error, folder) from error


def _replace(folder: Path, new: Path) -> None:
    old = new.with_name(new.name + ".old")
    with contextlib.suppress(FileNotFoundError):
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _python(folder: Path) -> Path:
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def _run(command: Sequence[str], progress: Progress) -> None:
    """Run a command; each of its lines is a note. It ends with this process's interest in it."""
    last: deque[str] = deque(maxlen=5)
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", env=environment
    ) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                last.append(line.rstrip())
                progress.advance(0, line.strip()[:60])
        except BaseException:
            process.kill()
            raise
    if process.returncode:
        raise EdgeftError(
            "the toolchain could not be installed: " + "\n  ".join(line for line in last if line),
            "It needs pip's package index once. Then it works without a network.",
        )
