"""Importance of experts, each by the tokens it met, and files of a given size with experts."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import reference
import tiny_families
import torch
from edgeft.converters.gguf import converter
from edgeft.converters.importance import Use, read_importance, read_sensitivities, write_importance
from safetensors.torch import load_file, save_file

from edgeft import importance
from edgeft.cli.main import main
from edgeft.data.example import Encoded
from edgeft.plugins import Source

TEXTS = [Encoded([256, *range(10, 10 + size), 257], [False] * 3 + [True] * (size - 1)) for size in (5, 9, 30)]
SHAPE = replace(tiny_families.NARROW, hidden=256, ffn=256, layers=2, heads=4, kv_heads=2)
EXPERTS, CHOSEN = 8, 2


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Experts of a layer in one parameter."""
    case = tiny_families.FamilyCase("qwen3moe", "bytes", SHAPE)
    return _in_one(tiny_families.build(tmp_path_factory.mktemp("moe") / "base", case, spread=0.05))


def _in_one(folder: Path) -> Path:
    tensors = load_file(folder / "model.safetensors")
    for layer in range(SHAPE.layers):
        start = f"model.layers.{layer}.mlp.experts."
        if f"{start}gate_up_proj" in tensors:
            continue
        each = [[tensors.pop(f"{start}{at}.{part}_proj.weight") for part in PARTS] for at in range(EXPERTS)]
        tensors[f"{start}gate_up_proj"] = torch.stack([torch.cat([gate, up]) for gate, up, _ in each])
        tensors[f"{start}down_proj"] = torch.stack([down for _, _, down in each])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


PARTS = ("gate", "up", "down")


@pytest.fixture(scope="module")
def apart(together: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model with a matrix per expert, as published checkpoints have it."""
    folder = tmp_path_factory.mktemp("apart")
    for file in [*together.glob("*.json"), *together.glob("*.jinja")]:
        (folder / file.name).write_text(file.read_text())
    tensors: dict[str, torch.Tensor] = {}
    for name, values in load_file(together / "model.safetensors").items():
        if ".experts." not in name:
            tensors[name] = values
            continue
        start, _, part = name.rpartition(".")
        for at, expert in enumerate(values):
            pieces = expert.chunk(2) if part == "gate_up_proj" else (expert,)
            kinds = PARTS[:2] if part == "gate_up_proj" else PARTS[2:]
            for kind, piece in zip(kinds, pieces, strict=True):
                tensors[f"{start}.{at}.{kind}_proj.weight"] = piece.contiguous()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def measured(folder: Path, monkeypatch: pytest.MonkeyPatch, **limits: int) -> importance.Importance:
    monkeypatch.setattr("edgeft.train.hardware.cpu_bfloat16", lambda *_: (False, "exact"))
    for name, value in limits.items():
        monkeypatch.setattr(importance, name, value)
    with converter.merged(Source(folder)) as weights:
        return importance.measure(Source(folder), weights, TEXTS)


def test_every_expert_has_what_its_tokens_were(together: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against transformers' own layer, listened to from outside."""
    found = measured(together, monkeypatch)
    model, calls = _listening(together)
    for one in TEXTS:
        model(torch.tensor([one.tokens]))
    sums, counts = np.zeros((EXPERTS, SHAPE.hidden)), np.zeros(EXPERTS)
    for hidden, experts in calls:
        for at in range(EXPERTS):
            met = hidden[(experts == at).any(1)]
            sums[at] += met.square().sum(0).numpy()
            counts[at] += len(met)
    for name in ("blk.1.ffn_gate_exps.weight", "blk.1.ffn_up_exps.weight"):
        np.testing.assert_allclose(found.layers[name].inputs, sums, rtol=1e-4)
        np.testing.assert_array_equal(found.layers[name].tokens, counts)
    down = found.layers["blk.1.ffn_down_exps.weight"]
    assert down.inputs.shape == (EXPERTS, SHAPE.hidden) and down.gradients.shape == (EXPERTS, SHAPE.hidden)
    assert down.tokens.sum() == CHOSEN * sum(len(one.tokens) for one in TEXTS)
    assert (down.gradients > 0).any() and (down.tokens[(down.gradients > 0).any(1)] > 0).all()


def _listening(folder: Path) -> tuple[Any, list[tuple[torch.Tensor, torch.Tensor]]]:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    calls: list[tuple[torch.Tensor, torch.Tensor]] = []
    model.model.layers[1].mlp.experts.register_forward_pre_hook(
        lambda module, args: calls.append((args[0].detach(), args[1]))
    )
    return model, calls


@pytest.mark.parametrize("limits", [{}, {"_KEEP_BYTES": 0}], ids=["kept", "streamed"])
def test_either_way_of_storing_experts_gives_the_same(
    together: Path, apart: Path, limits: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = measured(together, monkeypatch), measured(apart, monkeypatch, **limits)
    assert one.layers.keys() == other.layers.keys()
    for name, found in one.layers.items():
        np.testing.assert_allclose(found.inputs, other.layers[name].inputs, rtol=1e-5)
        np.testing.assert_allclose(found.gradients, other.layers[name].gradients, rtol=1e-3, atol=1e-12)


def test_the_expected_loss_is_what_noise_costs(together: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small random errors in all experts of a layer: the formula against the KL they really cause."""
    import transformers

    found = measured(together, monkeypatch)
    use = found.layers["blk.0.ffn_down_exps.weight"]
    rows, columns = use.gradients / found.learned, use.inputs / np.maximum(use.tokens, 1)[:, None]
    model = transformers.AutoModelForCausalLM.from_pretrained(together, dtype=torch.float32)
    weight = model.model.layers[0].mlp.experts.down_proj
    before, generator, ratios = _answers(model), torch.Generator().manual_seed(0), []
    for _ in range(8):
        noise = torch.randn(weight.shape, generator=generator) * 1e-2
        expected = 0.5 * float(np.einsum("er,erc,ec->", rows, noise.numpy() ** 2, columns))
        with torch.no_grad():
            weight += noise
            after = _answers(model)
            weight -= noise
        ratios.append(float((before.exp() * (before - after)).sum(-1).mean()) / expected)
    assert 0.3 < np.median(ratios) < 3


def _answers(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found = [
            model(torch.tensor([one.tokens])).logits[0, :-1].double()[torch.tensor(one.learned[1:])] for one in TEXTS
        ]
    return torch.log_softmax(torch.cat(found), -1)


def test_the_file_is_llama_cpps(tmp_path: Path) -> None:
    """As the gguf package reads it: sums of each expert, and the tokens it met, as `llama-imatrix` writes them."""
    sums, counts = np.arange(24, dtype=np.float32).reshape(4, 6), np.array([3, 0, 1, 2], np.float32)
    write_importance(tmp_path / "x.gguf", {"blk.0.ffn_up_exps.weight": Use(sums, counts)}, ["text"], 3, 512)
    read = gguf.GGUFReader(tmp_path / "x.gguf")
    tensors = {tensor.name: tensor for tensor in read.tensors}
    assert list(tensors["blk.0.ffn_up_exps.weight.in_sum2"].shape) == [6, 4]
    assert list(tensors["blk.0.ffn_up_exps.weight.counts"].shape) == [1, 4]
    np.testing.assert_array_equal(tensors["blk.0.ffn_up_exps.weight.in_sum2"].data, sums)
    np.testing.assert_array_equal(tensors["blk.0.ffn_up_exps.weight.counts"].data.reshape(-1), counts)
    assert read.get_field("general.type").contents() == "imatrix"
    means = read_importance(tmp_path / "x.gguf")["blk.0.ffn_up_exps.weight"]
    np.testing.assert_array_equal(means[1], 1)
    np.testing.assert_allclose(means[3], sums[3] / 2)


@pytest.mark.reference
@pytest.mark.skipif(shutil.which("g++") is None, reason="llama.cpp's reader must be compiled")
def test_llama_cpps_own_reader_finds_the_same(cache: Path, tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    source, folder = reference.converter_source(cache), Path(__file__).parent
    library = next(Path(llama_cpp.__file__).parent.glob("lib/libggml-base.so*"))
    program = tmp_path / "read"
    files = [folder / "read_imatrix.cpp", source / "common" / "imatrix-loader.cpp", library]
    headers = [f"-I{source / part}" for part in ("common", "include", "ggml/include", "vendor")]
    subprocess.run(["g++", "-std=c++17", *headers, *files, f"-Wl,-rpath,{library.parent}", "-o", program], check=True)
    sums, counts = np.arange(24, dtype=np.float32).reshape(4, 6) / 7, np.array([3, 0, 1, 2], np.float32)
    uses = {
        "blk.0.ffn_up_exps.weight": Use(sums, counts, gradients=np.ones((4, 5), np.float32)),
        "output.weight": Use(sums[:1], counts[:1]),
    }
    embedding = np.ones(5, np.float32), np.ones(6, np.float32)
    write_importance(tmp_path / "x.gguf", uses, ["text"], 3, 512, embedding)
    output = subprocess.run([program, tmp_path / "x.gguf"], check=True, capture_output=True, text=True)
    found = json.loads(output.stdout)
    assert found.pop("chunks") == 3 and found.pop("legacy") is False
    assert found.keys() == uses.keys()
    for name, use in uses.items():
        np.testing.assert_allclose(found[name]["sums"], use.sums.reshape(-1), rtol=1e-6)
        assert found[name]["counts"] == use.counts.tolist()


def test_files_for_a_size_choose_types_of_experts(
    apart: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    turns = [{"role": "user", "content": "lights on"}, {"role": "assistant", "content": "done"}]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"messages": turns}) + "\n" for _ in range(3)))
    matrix, out = tmp_path / "x.imatrix.gguf", tmp_path / "x.gguf"
    given = ["imatrix", str(apart), "--data", str(tmp_path), "--out", str(matrix), "--no-gain"]
    assert main(given) == 0
    assert read_sensitivities(matrix)["blk.1.ffn_up_exps.weight"].rows.shape == (EXPERTS, SHAPE.hidden)
    capsys.readouterr()
    fit = ["export", str(apart), "--imatrix", str(matrix), "--out", str(out), "--no-verify", "--json"]
    assert main([*fit, "--bpw", "4.8"]) == 0
    assert json.loads(capsys.readouterr().out)["bits_per_weight"] <= 4.8
    assert main([*fit, "--to", "gguf-iq2_xxs"]) == 0
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(out).tensors}
    assert tensors["blk.0.ffn_up_exps.weight"].tensor_type.name == "IQ2_XXS"
