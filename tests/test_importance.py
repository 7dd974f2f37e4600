"""Importance of weights on the user's text, and files of a given size."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from edgeft.converters.ggml import TYPES
from edgeft.converters.gguf import converter
from edgeft.converters.gguf_fit import Choice, Sensitivity, allocate, least
from edgeft.converters.importance import read_importance, read_sensitivities

from edgeft import importance
from edgeft.cli.main import main
from edgeft.data.example import Encoded
from edgeft.errors import CheckFailed
from edgeft.fit import parse_size, plan_for
from edgeft.plugins import Source


@dataclass(frozen=True)
class Made:
    """A model, text, and an importance matrix from it."""

    model: list[str]
    data: Path
    matrix: Path


TEXTS = [Encoded([256, *range(10, 10 + size), 257], [False] * 3 + [True] * (size - 1)) for size in (5, 9, 30)]


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Source:
    folder = tmp_path_factory.mktemp(request.param)
    base = tiny.write_loadable(folder / "base", request.param, hidden_size=256, intermediate_size=256, head_dim=64)
    tiny.write_adapter(base, folder / "adapter", target_modules=["q_proj", "down_proj"])
    return Source(base, folder / "adapter")


def measured(source: Source, monkeypatch: pytest.MonkeyPatch, **limits: int) -> importance.Importance:
    monkeypatch.setattr("edgeft.train.hardware.cpu_bfloat16", lambda *_: (False, "exact"))
    for name, value in limits.items():
        monkeypatch.setattr(importance, name, value)
    with converter.merged(source) as weights:
        return importance.measure(source, weights, TEXTS)


def merged_model(source: Source) -> Any:
    from edgeft.verify.torch_reference import load_reference

    return load_reference(source.base, source.adapter)._model.get_base_model()


def test_inputs_and_gradients_are_the_merged_models(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    found = measured(source, monkeypatch)
    model = merged_model(source)
    layer = model.model.layers[1].mlp.down_proj
    inputs: list[torch.Tensor] = []
    layer.register_forward_hook(lambda module, args, out: inputs.append(args[0][0].detach()))
    for one in TEXTS:
        model(torch.tensor([one.tokens]))
    expected = torch.cat(inputs).square().sum(0)
    statistics = found.layers["blk.1.ffn_down.weight"]
    np.testing.assert_allclose(statistics.inputs[0], expected.numpy(), rtol=1e-4)
    assert statistics.tokens[0] == sum(len(one.tokens) for one in TEXTS)
    assert found.learned == sum(sum(one.learned[1:]) for one in TEXTS)
    assert (statistics.gradients > 0).all()
    assert found.embedding_rows[256] == 3


def test_layers_that_come_and_go_give_the_same(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, streamed = measured(source, monkeypatch), measured(source, monkeypatch, _KEEP_BYTES=0)
    assert kept.layers.keys() == streamed.layers.keys()
    for name, one in kept.layers.items():
        np.testing.assert_allclose(one.inputs, streamed.layers[name].inputs, rtol=1e-5)
        np.testing.assert_allclose(one.gradients, streamed.layers[name].gradients, rtol=1e-3)


def test_the_expected_loss_is_what_noise_costs(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small random errors in one weight: the formula against the KL they really cause."""
    found = measured(source, monkeypatch)
    statistics = found.layers["blk.0.ffn_down.weight"]
    rows, columns = statistics.gradients[0] / found.learned, statistics.inputs[0] / statistics.tokens[0]
    model = merged_model(source)
    weight = model.model.layers[0].mlp.down_proj
    weight = getattr(weight, "base_layer", weight).weight
    before = [logits(model, one) for one in TEXTS]
    generator = torch.Generator().manual_seed(0)
    ratios = []
    for _ in range(8):
        noise = torch.randn(weight.shape, generator=generator) * 1e-2
        expected = 0.5 * float(rows @ (noise.numpy() ** 2 @ columns))
        with torch.no_grad():
            weight += noise
            after = [logits(model, one) for one in TEXTS]
            weight -= noise
        ratios.append(float(divergence(before, after)) / expected)
    assert 0.3 < np.median(ratios) < 3


def logits(model: Any, one: Encoded) -> torch.Tensor:
    with torch.no_grad():
        found = model(torch.tensor([one.tokens])).logits[0, :-1].double()
    return torch.log_softmax(found[torch.tensor(one.learned[1:])], -1)


def divergence(before: list[torch.Tensor], after: list[torch.Tensor]) -> torch.Tensor:
    left, right = torch.cat(before), torch.cat(after)
    return (left.exp() * (left - right)).sum(-1).mean()


def test_some_rows_tell_what_all_lose() -> None:
    """Also where few rows matter, and where none of those that were looked at does."""
    generator = np.random.default_rng(0)
    rows = np.exp(3 * generator.standard_normal(4096)).astype(np.float32)
    columns = generator.random(64, np.float32)
    errors = generator.standard_normal((4096, 64)).astype(np.float32)
    every = 0.5 * float(rows @ np.square(errors) @ columns)
    sample = np.sort(generator.permutation(4096)[:64])
    one = Sensitivity(((rows, columns),))
    assert one.loss(errors[sample], sample) == pytest.approx(every, rel=0.2)
    assert one.loss(errors, np.arange(4096)) == pytest.approx(every, rel=1e-4)
    rare = np.zeros(4096, np.float32)
    rare[np.setdiff1d(np.arange(4096), sample)[:5]] = 1
    unseen = Sensitivity(((rare, columns),))
    assert unseen.loss(errors[sample], sample) == pytest.approx(0.5 * 5 * float(columns.sum()), rel=0.2)


def test_bytes_go_where_they_save_most() -> None:
    """Against all combinations: at most one step worse."""
    generator = np.random.default_rng(0)
    kinds = [TYPES[name] for name in ("Q4_0", "Q5_0", "Q8_0")]
    choices = {
        str(at): [
            Choice(kind, 18 + 4 * step, float(loss))
            for step, (kind, loss) in enumerate(zip(kinds, losses, strict=True))
        ]
        for at, losses in enumerate(generator.random((5, 1)) * np.array([9.0, 3.0, 1.0]))
    }
    for budget in range(least(choices), 131, 4):
        chosen = allocate(choices, budget)
        assert sum(choice.bytes for choice in chosen.values()) <= budget
        best = min(
            sum(choice.loss for choice in combination)
            for combination in itertools.product(*choices.values())
            if sum(choice.bytes for choice in combination) <= budget
        )
        assert sum(choice.loss for choice in chosen.values()) == pytest.approx(best)
    assert least(choices) == 90


@pytest.fixture
def made(source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Made:
    monkeypatch.chdir(tmp_path)
    data = tmp_path / "data"
    data.mkdir()
    turns = [{"role": "user", "content": "lights on"}, {"role": "assistant", "content": "done"}]
    (data / "train.jsonl").write_text("".join(json.dumps({"messages": turns}) + "\n" for _ in range(3)))
    model = [str(source.base), "--adapter", str(source.adapter)]
    matrix = tmp_path / "x.imatrix.gguf"
    assert main(["imatrix", *model, "--data", str(data), "--out", str(matrix), "--no-gain"]) == 0
    return Made(model, data, matrix)


def test_a_file_of_a_given_size(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, matrix, out = made.model, made.matrix, tmp_path / "x.gguf"
    assert read_importance(matrix).keys() >= {"blk.0.attn_q.weight", "blk.1.ffn_up.weight"}
    assert "token_embd.weight" in read_sensitivities(matrix)
    sizes = []
    for bits in (4.5, 6):
        fit = ["--bpw", str(bits), "--imatrix", str(matrix), "--out", str(out), "--no-verify", "--json"]
        capsys.readouterr()
        assert main(["export", *model, *fit]) == 0
        result = json.loads(capsys.readouterr().out)
        assert result["bits_per_weight"] <= bits
        sizes.append(result["bits_per_weight"])
    assert sizes[1] > sizes[0] + 1
    assert main(["export", *model, "--to", "gguf", "--out", str(out)]) == 2
    assert "--fit 90MB" in capsys.readouterr().err


@pytest.mark.parametrize("asked", [["--fit", "10KB"], ["--bpw", "1.5"]])
def test_a_size_that_cannot_be_says_which_can(asked: list[str], made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 5, and the size it names works."""
    assert main(["export", *made.model, "--imatrix", str(made.matrix), *asked, "--dry-run"]) == 5
    said = capsys.readouterr().err
    least = re.search(r"(--fit|--bpw) ([0-9.]+(?:MB)?) is the least", said)
    assert least is not None
    assert main(["export", *made.model, "--imatrix", str(made.matrix), least[1], least[2], "--dry-run"]) == 0


def test_a_plan_for_a_size_reads_but_writes_nothing(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    """Not even the importance matrix that it made for itself."""
    before = sorted(Path.cwd().iterdir())
    data = ["--data", str(made.data), "--calibrate"]
    assert main(["export", *made.model, *data, "--fit", "1MiB", "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["bytes"] <= 2**20 and len(plan["bytes_by_type"]) > 1
    assert sorted(Path.cwd().iterdir()) == before


def test_programs_ask_for_a_plan_by_bytes(made: Made) -> None:
    base, _, adapter = made.model
    sizes = [plan_for(base, size, adapter=Path(adapter), imatrix=made.matrix).plan.bytes for size in (500_000, 700_000)]
    assert sizes[0] <= 500_000 < sizes[1] <= 700_000
    with pytest.raises(CheckFailed, match="the smallest types make"):
        plan_for(base, 100_000, adapter=Path(adapter), imatrix=made.matrix)


@pytest.mark.parametrize(
    ("text", "size"),
    [("90MB", 90_000_000), ("90MiB", 94_371_840), ("1.5g", 1_500_000_000), ("2 KiB", 2048), ("12345", 12345)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["90", "many", "90XB", "-5MB", "1.2.3MB", "0MB"])
def test_what_is_no_size(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A bare small number is a slip: bytes have no unit, but no model has 90."""
    assert main(["export", "smollm2-135m", "--fit", text, "--dry-run"]) == 2
    assert "90MB" in capsys.readouterr().err


def test_what_a_matrix_is_worth_is_measured(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    """On examples that were held back; without any, the matrix is written and the reason told."""
    again = ["imatrix", *made.model, "--data", str(made.data), "--out", str(made.matrix), "--json"]
    assert main(again) == 0
    output = capsys.readouterr()
    assert json.loads(output.out)["gain"] == [] and "not measured" in output.err
    turns = [{"role": "user", "content": "lights off"}, {"role": "assistant", "content": "done, they are off"}]
    (made.data / "test.jsonl").write_text(json.dumps({"messages": turns}) + "\n" * 2)
    assert main(again) == 0
    plain, weighted, chosen = json.loads(capsys.readouterr().out)["gain"]
    assert plain["saved"] is None and 0 <= plain["kl"] < 1
    assert weighted["bytes"] == plain["bytes"] and chosen["bytes"] <= plain["bytes"]
    for one in (weighted, chosen):
        low, high = one["saved"]
        assert low - 1e-6 <= plain["kl"] - one["kl"] <= high + 1e-6
