"""Models for telephones: exported in their toolchains, and run on this machine in the engines that apps use."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_conformance import prompt
from tiny_letters import ANSWER, write_letters

from edgeft import toolchain
from edgeft.artifact import Artifact
from edgeft.testing import RuntimeConformance, Subject

Models = dict[str, Path]


def need(name: str, home: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEFT_HOME", str(home))
        state = toolchain.status(toolchain.find_toolchain(name)).state
    if state != "installed":
        pytest.skip(f"the toolchain {name} is {state}: EDGEFT_HOME={home} edgeft toolchain install {name}")


def edgeft(home: Path, *words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "edgeft", *map(str, words)]
    environment = {**os.environ, "EDGEFT_HOME": str(home)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def letters(folder: Path) -> Models:
    hf = write_letters(folder / "hf")
    plain = shutil.copytree(hf, folder / "plain-hf")
    (plain / "chat_template.jinja").unlink()
    return {"hf": hf, "hf plain": plain}


# --- LiteRT ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def litert_models(tmp_path_factory: pytest.TempPathFactory, toolchain_home: Path) -> Models:
    need("litert", toolchain_home)
    folder = tmp_path_factory.mktemp("litert")
    found = letters(folder)
    for name, source in (("file", "hf"), ("file plain", "hf plain")):
        found[name] = folder / f"{name.replace(' ', '-')}.litertlm"
        done = edgeft(toolchain_home, "export", found[source], "--to", "litert-fp32", "--out", found[name])
        assert done.returncode == 0, done.stderr
    found["file damaged"] = folder / "cut.litertlm"
    found["file damaged"].write_bytes(found["file"].read_bytes()[:-100_000])
    return found


class OfLitert(RuntimeConformance):
    runtime: str

    @pytest.fixture(scope="class")
    def subject(self, litert_models: Models) -> Subject:
        return Subject(
            self.runtime,
            Artifact(litert_models["file"]),
            prompt=prompt(litert_models),
            answer=ANSWER,
            plain=Artifact(litert_models["file plain"]),
            damaged=Artifact(litert_models["file damaged"]),
            tolerance=0.002,
        )


@pytest.mark.slow
class TestLitertLm(OfLitert):
    runtime = "litert-lm"


@pytest.mark.slow
class TestLitert(OfLitert):
    runtime = "litert"


# --- ExecuTorch -------------------------------------------------------------------


@pytest.fixture(scope="module")
def executorch_models(tmp_path_factory: pytest.TempPathFactory, toolchain_home: Path) -> Models:
    need("executorch", toolchain_home)
    folder = tmp_path_factory.mktemp("executorch")
    found = letters(folder)
    found["program"] = folder / "program"
    done = edgeft(toolchain_home, "export", found["hf"], "--to", "executorch-fp32", "--out", found["program"])
    assert done.returncode == 0, done.stderr
    plain = found["program plain"] = shutil.copytree(found["program"], folder / "plain-program")
    (plain / "chat_template.jinja").unlink()
    cut = found["program damaged"] = shutil.copytree(found["program"], folder / "cut-program")
    (cut / "model.pte").write_bytes((cut / "model.pte").read_bytes()[:-100_000])
    return found


@pytest.mark.slow
class TestExecutorch(RuntimeConformance):
    @pytest.fixture(autouse=True)
    def home(self, toolchain_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("EDGEFT_HOME", str(toolchain_home))

    @pytest.fixture(scope="class")
    def subject(self, executorch_models: Models) -> Subject:
        return Subject(
            "executorch",
            Artifact(executorch_models["program"]),
            prompt=prompt(executorch_models),
            answer=ANSWER,
            plain=Artifact(executorch_models["program plain"]),
            damaged=Artifact(executorch_models["program damaged"]),
            tolerance=0.002,
        )
