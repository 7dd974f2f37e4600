"""Training for a target: the same codes as ggml on every block, in training, in the file, after a resume."""

from __future__ import annotations

import dataclasses
import json
import struct
from pathlib import Path
from typing import Any

import pytest
import test_train_runs
import tiny
import torch
from test_train_runs import InterruptAt, curve, settings

from edgeft import export as exporting
from edgeft import plugins
from edgeft.cli.main import main
from edgeft.errors import ModelError, UnsupportedModel, UsageError
from edgeft.models.ggml_grid import GgmlGrid
from edgeft.models.packed import read_packed
from edgeft.models.torch_grid import FORMULAS, values
from edgeft.plugins import ConvertOptions, Source
from edgeft.progress import Silent
from edgeft.run import Run
from edgeft.train import Interrupted, read_config, rounded, train
from edgeft.train.aware_gguf import first_rounded, tensor_types
from edgeft.train.rounded import Merged, RoundedLinear, scale_gradient
from edgeft.verify.codes import check_codes

pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated.*")

KINDS = tuple(FORMULAS)
data = test_train_runs.data


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_loadable(tmp_path_factory.mktemp("model") / "base")


# --- Grids ----------------------------------------------------------------------


def adversarial() -> torch.Tensor:
    """Blocks of 32 on which a careless formula goes wrong, (rows, 64)."""
    torch.manual_seed(0)
    largest = 65504 * 8.0
    rows = [
        torch.zeros(64),
        torch.full((64,), -0.0),
        torch.full((64,), 0.3),
        torch.tensor([-1.0, 1.0] * 32),  # the largest magnitude twice, with both signs
        torch.tensor([1.0, -1.0] * 32),
        torch.tensor([1e-40, -3e-41, 0.0, -0.0] * 16),  # denormal
        torch.tensor([6e-8, -5e-8, 1e-9, 0.0] * 16),  # the scale is denormal, or 0, in float16
        torch.arange(-32, 32) / 8.0,  # halves between two codes
        (torch.arange(64) % 16 - 8) * 0.25 + 0.125,
        torch.tensor([largest, -largest / 3, 1.0, 0.0] * 16),
        torch.tensor([3e38, -3e38, 1e30, -1.0] * 16),  # 1/d is denormal
        torch.randn(64) * 0.02 + 5,  # no zero near
    ]
    normal = torch.randn(400, 64) * torch.logspace(-9, 4, 400)[:, None]
    ties = torch.randint(-8, 8, (400, 64)) * 2.0 ** torch.randint(-12, 4, (400, 1)) + 0.5
    return torch.cat((torch.stack(rows), normal, ties)).float()


def stored(kind: str, weights: torch.Tensor) -> torch.Tensor:
    """What the exporter's own call of ggml_quantize_chunk makes."""
    import numpy as np

    ggml = pytest.importorskip("edgeft.converters.ggml")
    out = np.empty((len(weights), ggml.TYPES[kind].row_bytes(weights.shape[1])), np.uint8)
    ggml.load()._fill(ggml.TYPES[kind], weights.numpy(), out)
    return torch.from_numpy(out)


@pytest.mark.parametrize("kind", KINDS)
def test_codes_and_scales_are_those_of_the_exporter(kind: str) -> None:
    weights = adversarial()
    weights = weights[weights.abs().amax(1) < 65504]  # beyond, a scale does not fit and `pack` refuses
    assert torch.equal(GgmlGrid(kind).pack(weights), stored(kind, weights))


@pytest.mark.parametrize("kind", KINDS)
def test_values_are_what_a_runtime_reads_back(kind: str) -> None:
    weights, grid = adversarial(), GgmlGrid(kind)
    expected = grid.unpack(stored(kind, weights), 64)
    found, narrow = torch.empty_like(weights), torch.empty_like(weights, dtype=torch.bfloat16)
    grid.values(weights, found)
    grid.values(weights, narrow)
    assert torch.equal(bits(found), bits(expected))
    finite = expected.isfinite().all(1)
    assert torch.equal(bits(narrow[finite].float()), bits(expected[finite].bfloat16().float()))


@pytest.mark.parametrize("kind", KINDS)
def test_the_formulas_in_torch_agree_on_every_block(kind: str) -> None:
    weights = adversarial()
    expected = GgmlGrid(kind).unpack(stored(kind, weights), 64)
    finite = expected.isfinite().all(1)
    assert finite.sum() > 700
    assert torch.equal(values(kind, weights[finite]), expected[finite])


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0"])
def test_rounding_what_is_rounded_changes_nothing(kind: str) -> None:
    weights, grid = torch.randn(64, 128) * 0.02, GgmlGrid(kind)
    once, twice = torch.empty_like(weights), torch.empty_like(weights)
    grid.values(weights, once)
    grid.values(once, twice)
    assert torch.equal(once, twice)
    if kind == "Q4_0":
        assert torch.equal(grid.pack(weights), grid.pack(once))


def bits(values: torch.Tensor) -> torch.Tensor:
    """Tells -0 from 0."""
    return values.contiguous().view(torch.int32)


def test_many_slabs_give_what_one_gives() -> None:
    weights, grid = torch.randn(700, 512), GgmlGrid("Q4_0")  # above the size of a slab
    assert torch.equal(grid.pack(weights)[650:], grid.pack(weights[650:].contiguous()))


def test_weights_that_no_block_can_hold_are_refused() -> None:
    with pytest.raises(ModelError, match="too large for Q4_0"):
        GgmlGrid("Q4_0").pack(torch.full((1, 32), 3e38))
    with pytest.raises(UnsupportedModel, match="do not fill blocks of 32"):
        GgmlGrid("Q4_0").check("weight", 48)


# --- Layers ---------------------------------------------------------------------


def test_gradients_are_those_of_rounding_as_the_identity() -> None:
    torch.manual_seed(0)
    weight, a, b = torch.randn(48, 64) * 0.1, torch.randn(4, 64), torch.randn(48, 4) * 0.1
    x = torch.randn(3, 5, 64, requires_grad=True)
    a.requires_grad_(), b.requires_grad_()
    merged = Merged(GgmlGrid("Q4_0"), weight, a, b, 0.5)
    RoundedLinear.apply(x, merged, a, b, None, None).square().sum().backward()
    found = [tensor.grad.clone() for tensor in (x, a, b)]
    for tensor in (x, a, b):
        tensor.grad = None
    exact = weight + 0.5 * b @ a
    straight = exact + (merged.rounded() - exact).detach()
    (x @ straight.t()).square().sum().backward()
    for ours, theirs in zip(found, (x.grad, a.grad, b.grad), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_the_teacher_loss_is_the_divergence_from_the_unrounded_model() -> None:
    from edgeft.train.distillation import _ChunkedMixture

    torch.manual_seed(0)
    student, teacher, head = torch.randn(50, 16, requires_grad=True), torch.randn(50, 16), torch.randn(300, 16)
    targets = torch.randint(0, 300, (50,))
    for share in (0.0, 0.3):
        loss = _ChunkedMixture.apply(student, teacher, head, None, targets, share)
        (found,) = torch.autograd.grad(loss, student)
        logits = student @ head.t()
        nll = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
        said = torch.log_softmax(teacher @ head.t(), 1)
        kl = torch.nn.functional.kl_div(torch.log_softmax(logits, 1), said, log_target=True, reduction="sum")
        expected = (1 - share) * nll + share * kl
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(found, torch.autograd.grad(expected, student)[0], rtol=1e-4, atol=1e-4)


def test_a_run_with_a_teacher_learns(base: Path, data: Path, tmp_path: Path) -> None:
    run = train(aware(base, data, tmp_path / "run", teacher=0.5, quantize_after=0.3)).run
    losses = [line["loss"] for line in run.metrics() if "loss" in line]
    assert losses[-1] < losses[0]


def test_weights_are_rounded_once_per_step() -> None:
    weight, a, b = torch.randn(8, 32), torch.randn(2, 32), torch.randn(8, 2)
    merged = Merged(GgmlGrid("Q8_0"), weight, a, b, 1.0)
    before = merged.rounded().clone()
    b.mul_(2)
    assert torch.equal(merged.rounded(), before)
    merged.moved()
    assert not torch.equal(merged.rounded(), before)
    assert torch.equal(merged.grid.unpack(merged.pack(), 32), merged.rounded())  # type: ignore[attr-defined]


def test_rounding_begins_in_time_for_one_step() -> None:
    assert [first_rounded(share, 10) for share in (0.0, 0.5, 0.99)] == [0, 5, 9]
    assert first_rounded(0.99, 1) == 0


def test_every_tensor_gets_the_type_it_ships_in(base: Path) -> None:
    kinds = tensor_types(base, "gguf-q4_0")
    assert kinds["model.embed_tokens.weight"] == "Q8_0"  # 64 columns do not fill the blocks of Q6_K
    assert {kind for name, kind in kinds.items() if ".layers." in name} == {"Q4_0"}
    assert not any("norm" in name for name in kinds)


# --- Runs -----------------------------------------------------------------------


def aware(base: Path, data: Path, out: Path, **others: Any) -> Any:
    return settings(base, data, out, **{"method": "lora", "learning_rate": 5e-2, "target": "gguf-q4_0", **others})


@pytest.mark.parametrize("target", ["gguf-q4_0", "gguf-q4_1", "gguf-q8_0"])
def test_the_file_holds_the_very_codes_of_the_trained_graph(
    target: str, base: Path, data: Path, tmp_path: Path
) -> None:
    run = train(aware(base, data, tmp_path / "run", target=target)).run
    prepared = exporting.prepare(str(run.path), out=tmp_path / "file.gguf")
    assert prepared.plan.target == target == run.manifest().target
    exporting.export(prepared, Silent())
    (finding,) = check_codes(prepared.origin.source, tmp_path / "file.gguf")
    assert finding.ok
    assert finding.value == 1.0
    assert damaged(tmp_path / "file.gguf").value == pytest.approx(1.0, abs=0.01)
    (finding,) = check_codes(prepared.origin.source, tmp_path / "file.gguf")
    assert not finding.ok


def damaged(file: Path) -> Any:
    """Flip one bit of the last block, and say so."""
    content = bytearray(file.read_bytes())
    content[-1 - 64 * 4 - 32] ^= 1
    file.write_bytes(content)
    return type("Damaged", (), {"value": 1.0})


def test_what_is_scored_is_what_the_file_computes(base: Path, data: Path, tmp_path: Path) -> None:
    run = train(aware(base, data, tmp_path / "run", dtype="float32")).run
    out = tmp_path / "file.gguf"
    assert main(["export", str(run.path), "--out", str(out), "--no-verify"]) == 0
    assert main(["verify", str(run.path), str(out), "--tolerance", "top1=0.9"]) == 0
    ledger = json.loads(out.with_name("file.gguf.json").read_text())["ledger"]
    assert abs(ledger["nll_file"] - run.manifest().evaluation["nll_training_graph"]) < 2e-3


@pytest.mark.parametrize("tune", ["adapter", "both"])
def test_a_resumed_run_is_the_same_run(
    tune: str, base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rounded, "_FEWEST", 8)  # the steps here have few tokens, and some are to be drawn
    config = aware(base, data, tmp_path / "whole", quantize_after=0.4, epochs=4, tune=tune)
    whole = train(config).run
    for at in (2, 6):  # before rounding begins, and after
        broken = dataclasses.replace(config, out=tmp_path / f"broken-{at}")
        with pytest.raises(Interrupted):
            train(broken, InterruptAt(at))
        resumed = train(read_config(broken.out), resume=True).run
        assert curve(resumed) == curve(whole)
        assert packed_bytes(resumed) == packed_bytes(whole)


def packed_bytes(run: Run) -> bytes:
    return read_packed(run.packed).weights.read_bytes()


def test_validations_before_rounding_do_not_choose_the_weights(base: Path, data: Path, tmp_path: Path) -> None:
    config = aware(base, data, tmp_path / "run", quantize_after=0.6, eval_every=1, patience=1, epochs=3)
    outcome = train(config)
    assert outcome.manifest.evaluation["best_step"] >= first_rounded(0.6, outcome.steps)


def test_scales_alone_are_trained_and_shipped(base: Path, data: Path, tmp_path: Path) -> None:
    run = train(aware(base, data, tmp_path / "run", tune="scales", learning_rate=5e-2, epochs=6)).run
    losses = [line["loss"] for line in run.metrics() if "loss" in line]
    assert losses[-1] < losses[0] - 0.03
    assert run.adapter is None
    prepared = exporting.prepare(str(run.path), out=tmp_path / "file.gguf")
    exporting.export(prepared, Silent())
    assert check_codes(prepared.origin.source, tmp_path / "file.gguf")[0].ok
    same_codes(run, base)
    with pytest.raises(UsageError, match="trained the scales"):
        exporting.prepare(str(run.path), "gguf-q8_0", out=tmp_path / "other.gguf")


def test_an_adapter_and_its_scales_are_trained_together_and_shipped(base: Path, data: Path, tmp_path: Path) -> None:
    run = train(aware(base, data, tmp_path / "run", tune="both")).run
    alone = train(aware(base, data, tmp_path / "alone")).run
    both, one = ([line["loss"] for line in each.metrics() if "loss" in line] for each in (run, alone))
    assert both[0] == one[0]  # all factors are 1 at first
    assert both[-1] != one[-1]
    prepared = exporting.prepare(str(run.path), out=tmp_path / "file.gguf")
    exporting.export(prepared, Silent())
    assert check_codes(prepared.origin.source, tmp_path / "file.gguf")[0].ok
    with pytest.raises(UsageError, match="trained the scales"):
        exporting.prepare(str(run.path), "gguf-q8_0", out=tmp_path / "other.gguf")
    scales = [scales_of(each, "model.layers.0.mlp.up_proj.weight") for each in (run, alone)]
    assert not torch.equal(*scales)


def test_gradients_of_scales_are_those_of_rounding_as_the_identity() -> None:
    torch.manual_seed(0)
    weight, a, b = torch.randn(48, 64) * 0.1, torch.randn(4, 64), torch.randn(48, 4) * 0.1
    x, change = torch.randn(7, 64), (torch.randn(48, 2) * 0.05).requires_grad_()
    merged = Merged(GgmlGrid("Q4_0"), weight, a, b, 0.5, change)
    RoundedLinear.apply(x, merged, a, b, change, None).square().sum().backward()
    plain = Merged(GgmlGrid("Q4_0"), weight, a, b, 0.5).rounded()
    factors = change.detach().clone().requires_grad_()
    scaled = (plain.view(48, 2, 32) * (1 + factors).unsqueeze(-1)).view(48, 64)
    torch.testing.assert_close(merged.rounded(), scaled, rtol=1e-3, atol=1e-6)  # the scale is a float16 number
    (x @ scaled.t()).square().sum().backward()
    torch.testing.assert_close(change.grad, factors.grad, rtol=5e-3, atol=5e-2)
    assert torch.equal(merged.grid.unpack(merged.pack(), 64), merged.rounded())  # type: ignore[attr-defined]


def test_gradients_of_scales_of_many_tokens_are_on_average_those_of_all() -> None:
    torch.manual_seed(0)
    grad, x, weight = torch.randn(600, 8), torch.randn(600, 64) + 0.5, torch.randn(8, 64)
    grad[100:] *= 0.05  # most tokens say little
    change = torch.zeros(8, 2)
    whole = ((grad.t() @ x) * weight).view(8, 2, 32).sum(-1)
    drawn = torch.stack([scale_gradient(grad, x, weight, change) for _ in range(400)])
    any_quarter = torch.stack([quarter(grad, x, weight) for _ in range(400)])
    spread, wider = ((found - whole).square().mean().sqrt() for found in (drawn, any_quarter))
    assert 0 < spread < 0.6 * wider
    torch.testing.assert_close(drawn.mean(0), whole, rtol=0, atol=5 * float(spread) / 20)


def quarter(grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The same of tokens that are all as likely."""
    drawn = torch.randperm(len(grad))[: len(grad) // 4]
    return 4 * ((grad[drawn].t() @ x[drawn]) * weight).view(8, 2, 32).sum(-1)


def test_tokens_without_a_gradient_are_no_trouble() -> None:
    grad, x = torch.zeros(600, 8), torch.randn(600, 64)
    assert torch.equal(scale_gradient(grad, x, torch.randn(8, 64), torch.zeros(8, 2)), torch.zeros(8, 2))


def test_layers_rounded_together_are_those_rounded_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)

    def layers() -> list[Merged]:
        torch.manual_seed(1)
        grids = [GgmlGrid("Q4_0"), GgmlGrid("Q8_0")]
        return [
            Merged(grids[rows > 40], torch.randn(rows, 64), torch.randn(2, 64), torch.randn(rows, 2), 0.5)
            for rows in (8, 24, 40, 48, 8)
        ]

    alone = [layer.rounded() for layer in layers()]
    monkeypatch.setattr(rounded, "_AT_ONCE", 2048)  # one layer in two parts, and several groups
    together = layers()
    for layer in together:
        layer.together = together
    assert all(torch.equal(layer.rounded(), other) for layer, other in zip(together, alone, strict=True))
    assert all(layer.current for layer in together)


def scales_of(run: Run, name: str) -> torch.Tensor:
    from safetensors.torch import load_file

    packed: torch.Tensor = load_file(run.packed / "weights.safetensors")[name]
    return packed.view(len(packed), -1, 18)[:, :, :2].contiguous().view(torch.float16)


def test_limits_of_a_file_that_is_the_graph_leave_room_for_8_bit_activations() -> None:
    from edgeft.verify.report import as_trained

    sure, unsure = as_trained(0.05), as_trained(2.75)
    assert 0.003 < sure.kl < unsure.kl < 0.02
    assert 0.9 < unsure.top1 < 0.97 < sure.top1 < 0.99
    assert unsure.nll > 0.003


def same_codes(run: Run, base: Path) -> None:
    from safetensors.torch import load_file

    name = "model.layers.0.mlp.up_proj.weight"
    weight = load_file(base / "model.safetensors")[name]
    before = GgmlGrid("Q4_0").pack(weight.bfloat16().float()).view(-1, 18)
    after = load_file(read_packed(run.packed).weights)[name].view(-1, 18)
    assert torch.equal(before[:, 2:], after[:, 2:])
    assert not torch.equal(before[:, :2], after[:, :2])


def test_for_another_target_it_is_base_and_adapter(base: Path, data: Path, tmp_path: Path) -> None:
    run = train(aware(base, data, tmp_path / "run", epochs=1)).run
    prepared = exporting.prepare(str(run.path), "gguf-q8_0", out=tmp_path / "file.gguf")
    assert prepared.origin.source.packed is None
    artifact = exporting.export(prepared, Silent())
    assert artifact.manifest is not None
    assert artifact.manifest.adapter is not None


# --- What does not go together --------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target": "gguf-iq2_xxs"}, "training for 'gguf-iq2_xxs' is not possible"),
        ({"method": "qlora"}, "the method qlora do not go together"),
        ({"dora": True}, "--dora and --for"),
        ({"dropout": 0.1}, "--dropout and --for"),
        ({"quantize_after": 1.0}, "quantize-after must be"),
        ({"tune": "scales", "target": "gguf-q4_1"}, "no scales to tune"),
        ({"tune": "scales", "quantize_after": 0.5}, "from the first step"),
        ({"tune": "scales", "target": None}, "needs the file"),
        ({"teacher": 0.5, "target": None}, "without a target"),
        ({"teacher": 0.5, "tune": "scales"}, "no unrounded model"),
        ({"teacher": 1.0}, "teacher must be"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(
    changes: dict[str, Any], message: str, base: Path, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        aware(base, data, tmp_path / "run", **changes)


def test_options_that_would_change_the_file_are_refused(base: Path, data: Path, tmp_path: Path) -> None:
    run = train(aware(base, data, tmp_path / "run", epochs=1)).run
    with pytest.raises(UsageError, match="was trained as Q4_0"):
        exporting.prepare(str(run.path), out=tmp_path / "a.gguf", extra={"types": [("ffn_down", "q8_0")]})
    with pytest.raises(UsageError, match="--merge-base w16 is for adapters"):
        exporting.prepare(str(run.path), out=tmp_path / "a.gguf", merge_base="w16")


def test_a_method_is_chosen_with_the_target(base: Path, data: Path, tmp_path: Path) -> None:
    command = ["train", "--model", str(base), "--data", str(data), "--out", str(tmp_path / "run")]
    assert main([*command, "--for", "gguf-q4_0", "--rank", "4", "--epochs", "1"]) == 0
    assert Run(tmp_path / "run").manifest().method == "lora"


# --- Into which base ------------------------------------------------------------


def test_the_merge_base_can_be_chosen(base: Path, data: Path, tmp_path: Path) -> None:
    run = train(settings(base, data, tmp_path / "run", method="qlora", epochs=1)).run
    files = {name: tmp_path / f"{name}.gguf" for name in ("default", "w16", "nf4-roundtrip")}
    for name, file in files.items():
        more = [] if name == "default" else ["--merge-base", name]
        assert main(["export", str(run.path), "--to", "gguf-f16", "--out", str(file), *more]) == 0
        assert main(["verify", str(run.path), str(file), "--tolerance", "top1=0.9"]) == 0
    assert files["default"].read_bytes() == files["nf4-roundtrip"].read_bytes() != files["w16"].read_bytes()
    plain = Source(run.model, run.adapter)
    gguf = plugins.load("converters", "gguf")
    gguf.convert(gguf.plan(plain, "gguf-f16", ConvertOptions(tmp_path / "plain.gguf")), Silent())
    assert tensor_data(tmp_path / "plain.gguf") == tensor_data(files["w16"])


def tensor_data(file: Path) -> bytes:
    from edgeft.models.gguf_header import read_header

    assert struct.unpack("<I", file.read_bytes()[:4])[0] == 0x46554747
    return file.read_bytes()[read_header(file).data_offset :]
