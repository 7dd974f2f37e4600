"""Models for telephones: exported in their toolchains, and run on this machine in the engines that apps use."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import tiny
from test_conformance import prompt
from tiny_letters import ANSWER, write_letters

from edgeft import plugins, toolchain
from edgeft.artifact import Artifact
from edgeft.errors import UsageError
from edgeft.plugins import ConvertOptions, Source
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


def script(name: str) -> Any:
    """A worker as a module: its libraries are imported only when it does something."""
    spec = importlib.util.spec_from_file_location(name, toolchain.WORKERS / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def letters(folder: Path) -> Models:
    hf = write_letters(folder / "hf")
    plain = shutil.copytree(hf, folder / "plain-hf")
    (plain / "chat_template.jinja").unlink()
    return {"hf": hf, "hf plain": plain}


# --- LiteRT ---------------------------------------------------------------------


def test_the_rules_of_q8_rotate_the_layers_and_leave_the_heads_activations_alone() -> None:
    from edgeft.converters.litert_recipe import RECIPES, recipe_rules

    layers, embedding, head = recipe_rules(RECIPES["litert-q8"]) or []
    assert layers["algorithm_key"] == "DECOMPOSED_HADAMARD_ROTATION"
    assert layers["op_config"]["weight_tensor_config"]["algorithm_params"] == {"max_hadamard_size": 512}
    # The same table as the embedding's, so that the file has it once.
    assert embedding["op_config"]["weight_tensor_config"] == head["op_config"]["weight_tensor_config"]
    assert (head["op_config"]["compute_precision"], head["op_config"]["explicit_dequantize"]) == ("FLOAT", True)
    for rule in recipe_rules(RECIPES["litert-int8"]) or []:
        assert rule["op_config"]["compute_precision"] == "INTEGER"
        assert rule["algorithm_key"] == "min_max_uniform_quantize"


def test_a_plan_counts_the_scales_of_every_row_and_both_signatures(tmp_path: Path) -> None:
    tiny.write_model(tmp_path / "base")
    converter = plugins.load("converters", "litert")
    options = ConvertOptions(out=tmp_path / "out.litertlm")
    plans = {name: converter.plan(Source(tmp_path / "base"), name, options) for name in ("litert-int8", "litert-q8")}
    for tensor in plans["litert-q8"].tensors:
        if len(tensor.shape) == 2:
            rows, columns = tensor.shape
            assert tensor.bytes == rows * (columns + (12 if tensor.name == "lm_head.weight" else 24))
    inputs = {tensor.shape[1] for tensor in plans["litert-q8"].tensors if "layers" in tensor.name and tensor.shape[1:]}
    matrices = sum(4 * min(width & -width, 512) ** 2 for width in inputs)
    assert plans["litert-q8"].bytes - plans["litert-int8"].bytes == matrices > 0
    usual = converter.plan(Source(tmp_path / "base"), "litert", options)
    assert (usual.target, usual.bytes) == ("litert-q8", plans["litert-q8"].bytes)


@pytest.mark.parametrize("words", ["block=64", "algorithm=octav"])
def test_a_setting_that_a_target_does_not_have_is_refused(words: str, tmp_path: Path) -> None:
    tiny.write_model(tmp_path / "base")
    name, value = words.split("=")
    options = ConvertOptions(out=tmp_path / "out.litertlm", extra={"settings": {name: value}})
    with pytest.raises(UsageError, match=words):
        plugins.load("converters", "litert").plan(Source(tmp_path / "base"), "litert-q8", options)


def test_a_step_is_told_without_the_folder_it_writes_to() -> None:
    worker = script("litert_export")
    said: list[dict[str, object]] = []
    watcher = worker.Watcher(said.append)
    begin, bold = (
        "[dim default](00:01)[/dim default] [bold cyan][START][/bold cyan] ",
        "[bold default]{}[/bold default]",
    )
    watcher.print(begin + bold.format("Convert") + " > " + bold.format("Write Model to /tmp/a/model.tflite"))
    watcher.print(begin + bold.format("Torch Export: decode"))
    watcher.print("[dim default](00:02)[/dim default] [bold green][ DONE][/bold green] anything")
    assert [event["note"] for event in said] == ["Write Model", "Torch Export: decode"]


def with_outliers(folder: Path) -> Path:
    """The same model, but one channel of every norm's output is fifty times as large, as trained models have them: one
    scale for all of a token's activations then leaves little for the others."""
    import torch
    from safetensors.torch import load_file, save_file

    read_by = {
        "input_layernorm.weight": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "post_attention_layernorm.weight": ("mlp.gate_proj", "mlp.up_proj"),
    }
    file, times, channel = folder / "model.safetensors", 50.0, 300
    weights: dict[str, torch.Tensor] = load_file(file)
    for name in list(weights):
        for norm, readers in read_by.items():
            if name.endswith(norm):
                weights[name][channel] *= times
                for reader in readers:
                    weights[name.removesuffix(norm) + reader + ".weight"][:, channel] /= times
    save_file(weights, file, metadata={"format": "pt"})
    return folder


@pytest.mark.slow
def test_a_rotation_costs_less_than_outliers_do(tmp_path: Path, toolchain_home: Path) -> None:
    need("litert", toolchain_home)
    hf, kl, size = with_outliers(write_letters(tmp_path / "hf", noise=0.1, logit=4.0)), {}, {}
    for target in ("litert-int8", "litert-q8"):
        out = tmp_path / f"{target}.litertlm"
        planned = edgeft(toolchain_home, "export", hf, "--to", target, "--out", out, "--dry-run", "--json")
        done = edgeft(toolchain_home, "export", hf, "--to", target, "--out", out, "--json")
        assert done.returncode == 0, done.stderr
        kl[target] = next(one["value"] for one in json.loads(done.stdout)["findings"] if one["name"] == "kl")
        size[target] = out.stat().st_size
        assert json.loads(planned.stdout)["bytes"] == pytest.approx(size[target], rel=0.05)
    assert kl["litert-q8"] < kl["litert-int8"] / 2


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


def test_a_stage_of_minutes_tells_of_itself_before_it_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = script("executorch_export")
    monkeypatch.setattr(worker, "BEAT_S", 0.001)
    told: list[float] = []
    heard = threading.Event()

    def send(event: dict[str, Any]) -> None:
        told.append(event["advance"])
        if sum(told) > 0:
            heard.set()

    with worker.stage(send, "lower", "lowering", seconds=1000.0):
        assert heard.wait(60)
    assert len(told) >= 3 and told[0] == 0
    assert sum(told) == pytest.approx(worker.STAGES["lower"])
    assert told[-1] >= 0.1 * worker.STAGES["lower"]  # the clock alone never fills it


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
