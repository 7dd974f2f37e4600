"""Toolchains, and graphs that another exporter wrote: into 4 bits, and run with a cache that grows."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from edgeft import plugins, toolchain
from edgeft.chat import Sampling
from edgeft.cli.main import main
from edgeft.errors import MissingDependency, PluginError, UnsupportedModel
from edgeft.optimum_route import older_config
from edgeft.plugins import ConvertOptions, LoadOptions, Source
from edgeft.progress import Silent
from edgeft.sessions import open_session
from edgeft.toolchain import Toolchain

WIDTH, PROMPT = 64, [1, 9, 77, 30]


# --- Toolchains -----------------------------------------------------------------


@pytest.fixture
def tiny_toolchain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Toolchain:
    """An environment without requirements, which needs no network; its worker does what the request says."""
    script = tmp_path / "worker.py"
    script.write_text(
        "import json, sys\n"
        "request = json.load(sys.stdin)\n"
        "print('a library prints this')\n"
        "print(json.dumps({'start': 'Work', 'total': 2}), json.dumps({'advance': 1}), sep='\\n')\n"
        "if request['do'] == 'fail': sys.exit('it broke')\n"
        "if request['do'] == 'refuse': print(json.dumps({'error': 'not this one', 'hint': 'another'}))\n"
        "else: print(json.dumps({'result': {'prefix': sys.prefix, 'path': len(sys.path)}}))\n"
    )
    made = Toolchain("tiny", "Nothing.", (), str(script), 10)
    monkeypatch.setattr("edgeft.toolchain.environments.TOOLCHAINS", {"tiny": made})
    monkeypatch.setattr("edgeft.toolchain.TOOLCHAINS", {"tiny": made})
    return made


def test_a_toolchain_is_made_used_and_removed(tiny_toolchain: Toolchain, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["toolchain", "install", "tiny", "--dry-run"]) == 0
    assert toolchain.status(tiny_toolchain).state == "missing"
    assert main(["toolchain", "install", "tiny"]) == 0
    folder = Path(capsys.readouterr().out.strip())
    result = toolchain.call(tiny_toolchain, {"do": "answer"}, Silent())
    assert Path(result["prefix"]) == folder == toolchain.toolchains_dir() / "tiny"
    assert main(["toolchain", "list", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["state"] == "installed"
    assert main(["toolchain", "rm", "tiny"]) == 0
    assert not folder.exists() and main(["toolchain", "rm", "tiny"]) == 2


def test_a_worker_that_fails_or_refuses_is_heard(tiny_toolchain: Toolchain) -> None:
    toolchain.install(tiny_toolchain, Silent())
    with pytest.raises(PluginError, match="it broke"):
        toolchain.call(tiny_toolchain, {"do": "fail"}, Silent())
    with pytest.raises(UnsupportedModel, match="not this one"):
        toolchain.call(tiny_toolchain, {"do": "refuse"}, Silent())


def test_a_toolchain_of_other_requirements_is_stale(tiny_toolchain: Toolchain) -> None:
    toolchain.install(tiny_toolchain, Silent())
    changed = replace(tiny_toolchain, requirements=("something==1",))
    assert toolchain.status(changed).state == "stale"
    with pytest.raises(MissingDependency) as caught:
        toolchain.call(changed, {}, Silent())
    assert caught.value.hint == "edgeft toolchain install tiny"


def test_an_installation_that_fails_leaves_the_old_one(tiny_toolchain: Toolchain, monkeypatch: Any) -> None:
    toolchain.install(tiny_toolchain, Silent())
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(Exception, match="could not be installed"):
        toolchain.install(replace(tiny_toolchain, requirements=("no-such-package-at-all",)), Silent())
    assert toolchain.status(tiny_toolchain).state == "installed"
    assert [path.name for path in toolchain.toolchains_dir().iterdir()] == ["tiny"]


def test_without_its_toolchain_the_route_says_what_to_install(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tiny.write_model(tmp_path / "base")
    assert main(["export", str(base), "--engine", "optimum", "--to", "onnx-q4", "--out", str(tmp_path / "o")]) == 3
    assert "edgeft toolchain install optimum" in capsys.readouterr().err
    assert main(["export", str(base), "--engine", "optimum", "--to", "gguf-q4_0"]) == 2
    assert not (tmp_path / "o").exists()


def test_a_configuration_of_transformers_5_is_told_in_the_words_of_4() -> None:
    """Unknown keys are passed over in silence there, and the rotary embedding would be another."""
    rope = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e5}
    assert older_config({"a": 1, "rope_parameters": rope, "dtype": "bfloat16"}) == {
        "a": 1,
        "rope_theta": 1e5,
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0},
        "torch_dtype": "bfloat16",
    }
    assert older_config({"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}) == {"rope_theta": 7.0}
    with pytest.raises(Exception, match="per layer"):
        older_config({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}})


# --- Graphs ---------------------------------------------------------------------


def exported(folder: Path, *, tied: bool) -> tuple[Any, Path]:
    """A model of one layer with keys and values, as torch and as the graph that torch's exporter makes of it."""
    import torch
    from torch import nn

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(tiny.TOKENS, WIDTH)
            self.qkv = nn.Linear(WIDTH, 3 * WIDTH)  # with a bias and on a matrix: Gemm
            self.out = nn.Linear(WIDTH, WIDTH, bias=False)
            self.head = nn.Linear(WIDTH, tiny.TOKENS, bias=False)
            if tied:
                self.head.weight = self.embed.weight

        def forward(self, input_ids: Any, attention_mask: Any, key: Any, value: Any) -> Any:
            x = self.embed(input_ids)
            q, k, v = self.qkv(x.reshape(-1, WIDTH)).reshape(1, -1, 3, 4, WIDTH // 4).permute(2, 0, 3, 1, 4)
            k, v = torch.cat([key, k], 2), torch.cat([value, v], 2)
            scores = q @ k.transpose(2, 3)
            place = torch.cumsum(attention_mask, 1)  # 1, 2, …: whoever is later is not seen
            mine = place[:, -x.shape[1] :]
            scores = scores.masked_fill((place[:, None, None, :] > mine[:, None, :, None]), -1e9)
            y = (scores.softmax(-1) @ v).transpose(1, 2).reshape(1, -1, WIDTH)
            return self.head(torch.tanh(x + self.out(y))), k, v

    torch.manual_seed(0)
    model = Layer().eval()
    folder.mkdir(parents=True)
    empty = torch.zeros(1, 4, 3, WIDTH // 4)
    torch.onnx.export(
        model,
        (torch.tensor([[1, 2]]), torch.ones(1, 5, dtype=torch.int64), empty, empty),
        str(folder / "model.onnx"),
        input_names=["input_ids", "attention_mask", "past_key_values.0.key", "past_key_values.0.value"],
        output_names=["logits", "present.0.key", "present.0.value"],
        dynamic_axes={
            "input_ids": {1: "new"},
            "attention_mask": {1: "all"},
            "past_key_values.0.key": {2: "past"},
            "past_key_values.0.value": {2: "past"},
            "logits": {1: "new"},
        },
        dynamo=False,
    )
    return model, folder / "model.onnx"


def in_torch(model: Any, tokens: list[int]) -> np.ndarray:
    import torch

    empty = torch.zeros(1, 4, 0, WIDTH // 4)
    with torch.no_grad():
        logits = model(torch.tensor([tokens]), torch.ones(1, len(tokens), dtype=torch.int64), empty, empty)[0][0]
    return torch.log_softmax(logits, -1).numpy()


def quantized(tmp_path: Path, target: str, settings: Mapping[str, str] | None = None, *, tied: bool = True) -> Any:
    model, file = exported(tmp_path / f"graph-{target}", tied=tied)
    base = tiny.write_model(tmp_path / f"base-{target}")
    options = ConvertOptions(tmp_path / target, extra={"settings": settings or {}})
    converter: Any = plugins.load("converters", "onnx")
    return model, converter.from_graph(file, base, Source(base), target, options, Silent())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
class TestGraphs:
    @pytest.mark.parametrize("tied", [True, False])
    def test_float32_is_the_model(self, tied: bool, tmp_path: Path) -> None:
        model, artifact = quantized(tmp_path, "onnx-fp32", tied=tied)
        with open_session(str(artifact.path), "auto", LoadOptions(context=64)).session as session:
            tokens = list(range(3, 40))
            assert np.abs(session.score(tokens) - in_torch(model, tokens)).max() < 1e-5
            # Token by token over the growing cache, and again from a shorter prefix.
            expected = list(PROMPT)
            for _ in range(16):
                expected.append(int(in_torch(model, expected)[-1].argmax()))
            said = [d.token for d in session.generate(PROMPT, Sampling(max_tokens=16)) if d.token is not None]
            ends = [at for at, token in enumerate(expected) if token in artifact.manifest.stop_token_ids]
            assert said == expected[len(PROMPT) : min(ends, default=None)] and len(said) > 3
            *_, last = session.generate([*expected[:7], 200], Sampling(max_tokens=1))
            assert last.usage and last.usage.reused_tokens == 7
            assert np.abs(session.score([*expected[:5], 8, 9]) - in_torch(model, [*expected[:5], 8, 9])).max() < 1e-5

    def test_four_bits_are_near_and_every_matrix_is_rounded(self, tmp_path: Path) -> None:
        import onnx_ir

        model, artifact = quantized(tmp_path, "onnx-q4")
        graph = onnx_ir.load(artifact.path / "model.onnx").graph
        kinds = [node.op_type for node in graph]
        assert kinds.count("MatMulNBits") == 3 and kinds.count("GatherBlockQuantized") == 1
        with open_session(str(artifact.path), "auto", LoadOptions(context=64)).session as session:
            tokens = list(range(3, 40))
            mine, theirs = session.score(tokens), in_torch(model, tokens)
            assert 0 < (np.exp(theirs) * (theirs - mine)).sum(-1).mean() < 0.02

    def test_a_tied_head_ships_once(self, tmp_path: Path) -> None:
        _, tied = quantized(tmp_path / "a", "onnx-int8", tied=True)
        _, apart = quantized(tmp_path / "b", "onnx-int8", tied=False)
        assert apart.manifest.parameters - tied.manifest.parameters == tiny.TOKENS * WIDTH
        assert tied.manifest.bytes < apart.manifest.bytes - tiny.TOKENS * WIDTH

    def test_only_plain_onnxruntime_takes_such_a_graph(self, tmp_path: Path) -> None:
        _, artifact = quantized(tmp_path, "onnx-q4")
        support = plugins.load("runtimes", "onnxruntime-genai").supports(artifact)
        assert not support.ok and "onnxruntime runs" in support.reason

    def test_a_graph_without_a_cache_is_refused(self, tmp_path: Path) -> None:
        from edgeft.converters.onnx_graph_file import runtime_config

        class Empty:
            graph = type("Graph", (), {"inputs": [], "outputs": []})

        tiny.write_model(tmp_path / "base")
        with pytest.raises(UnsupportedModel, match="keys and values"):
            runtime_config(Empty, tmp_path / "base")


# --- The real exporter ----------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "rounded"), [("gpt2", "onnx-q4"), ("gpt_neox", "onnx-q4"), ("opt", "onnx-int8")])
def test_what_the_builder_does_not_know_goes_through_optimum(
    kind: str, rounded: str, tmp_path: Path, cache: Path
) -> None:
    """Random models of architectures that onnxruntime-genai's builder refuses; verify compares them with torch.

    A random OPT has no favourites clear enough for 4 bits to keep; 8 bits go the same way.
    """
    import torch
    import transformers

    home = cache / "toolchain-home"
    environment = {**os.environ, "EDGEFT_HOME": str(home)}

    def edgeft(*words: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "edgeft", *map(str, words)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    assert edgeft("toolchain", "install", "optimum").returncode == 0
    sizes = {
        "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256},
        "gpt_neox": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128},
        "opt": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 128}
        | {"word_embed_proj_dim": 64, "max_position_embeddings": 256},
    }
    base = tmp_path / kind
    tiny.write_model(base)
    for file in (base / "model.safetensors", base / "config.json"):
        file.unlink()
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        kind, vocab_size=tiny.TOKENS, bos_token_id=0, eos_token_id=1, **sizes[kind]
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        parameter.data.mul_(3 if parameter.dim() > 1 else 1)  # so that one token is clearly the most probable
    model.save_pretrained(base)
    refused = edgeft("export", base, "--to", "onnx-q4", "--out", tmp_path / "builder")
    assert refused.returncode == 1
    for target in ("onnx-fp32", rounded):
        done = edgeft("export", base, "--to", target, "--engine", "optimum", "--out", tmp_path / target, "--json")
        assert done.returncode == 0, done.stderr
        findings = {finding["name"]: finding for finding in json.loads(done.stdout)["findings"]}
        assert all(finding["ok"] for finding in findings.values()) and "kl" in findings
        assert findings["kl"]["value"] < (1e-6 if target == "onnx-fp32" else 0.02)
