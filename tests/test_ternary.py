"""Ternary training: what is computed with is s · {-1, 0, 1}, the file holds it, llama.cpp says what the graph says."""

from __future__ import annotations

import ctypes
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import test_train_runs
import tiny
import torch
from test_train_runs import InterruptAt, curve, settings

from edgeft import export as exporting
from edgeft.artifact import Artifact
from edgeft.chat import Sampling
from edgeft.cli.main import main
from edgeft.data.load import load_split
from edgeft.errors import UnsupportedModel, UsageError
from edgeft.evaluate import reference_nll
from edgeft.models import ggml_rows
from edgeft.models.packed import read_packed
from edgeft.plugins import AdapterScale, LoadOptions, Source
from edgeft.progress import Silent
from edgeft.run import Run
from edgeft.sessions import open_session
from edgeft.ternary_verdict import Figures, verdict
from edgeft.train import Interrupted, read_config, train
from edgeft.train import ternary_activations as activations
from edgeft.train.ternary import Ramp
from edgeft.train.ternary_grid import KINDS, LARGEST, LEAST, TernaryGrid, scales
from edgeft.train.ternary_notes import ternary_notes
from edgeft.verify.codes import check_codes

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*deprecated.*"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

data = test_train_runs.data
GROUPS = ("tensor", "row", "block")
SHAPE = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "head_dim": 64}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_loadable(tmp_path_factory.mktemp("model") / "base", **SHAPE)


@pytest.fixture(scope="module")
def trained(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train(ternary(base, data, tmp_path_factory.mktemp("runs") / "run")).run


@pytest.fixture(scope="module")
def shipped(trained: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("files") / "file.gguf"
    exporting.export(exporting.prepare(str(trained.path), out=file), Silent())
    return file


def ternary(base: Path, data: Path, out: Path, **others: Any) -> Any:
    chosen = {"method": "full", "learning_rate": 2e-3, "target": "gguf-tq2_0", "dtype": "float32"}
    return settings(base, data, out, **{**chosen, **others})


# --- The grid -------------------------------------------------------------------


def adversarial() -> torch.Tensor:
    """(rows, 512), float32, on which a careless scale goes wrong."""
    torch.manual_seed(0)
    one = torch.zeros(512)
    one[300] = -0.7
    rows = [
        torch.zeros(512),
        torch.full((512,), -0.0),
        one,
        torch.cat((torch.zeros(256), torch.randn(256))),
        torch.cat((torch.full((256,), 1e-3), torch.full((256,), 5.0))),  # a block whose codes are all zero
        torch.full((512,), 1e-9),
        torch.full((512,), 3e-5),  # the scale is a denormal float16
        torch.tensor([1e9, -1e9] * 256),
        torch.tensor([0.5, -0.5] * 256),
        torch.tensor([1.0, -3.0, 0.49999997, 0.5] * 128),
    ]
    return torch.cat((torch.stack(rows), torch.randn(300, 512) * torch.logspace(-5, 4, 300)[:, None])).float()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("group", GROUPS)
def test_blocks_hold_the_very_values(kind: str, group: Any) -> None:
    weights, grid = adversarial(), TernaryGrid(kind, group)
    found = torch.empty_like(weights)
    grid.values(weights, found)
    assert torch.equal(grid.unpack(grid.pack(weights), 512), found)
    assert torch.equal(found.half().float(), found)
    assert torch.equal(found.bfloat16().float(), found)
    assert not torch.signbit(found[found == 0]).any()
    assert set(torch.unique(found.sign()).tolist()) == {-1.0, 0.0, 1.0}


def test_the_formula_is_bitnets() -> None:
    weights = torch.randn(8, 512)
    found = torch.empty_like(weights)
    TernaryGrid("TQ2_0", "row").values(weights, found)
    for row, exact in zip(found, weights, strict=True):
        scale = exact.abs().mean()
        assert torch.equal(row.sign(), (exact / row.abs().max()).round().clamp(-1, 1))
        assert row.abs().max() == pytest.approx(float(scale), rel=2**-8)


def test_scales_stay_within_bounds() -> None:
    assert scales(torch.zeros(1, 4)).item() == LEAST
    assert scales(torch.full((1, 4), 1e9)).item() == LARGEST
    for bound in (LEAST, LARGEST):
        assert torch.tensor(bound).half().float() == torch.tensor(bound).bfloat16().float() == bound


def test_a_block_of_zeros_has_no_scale() -> None:
    weights = torch.cat((torch.zeros(256), torch.ones(256)))[None]
    blocks = TernaryGrid("TQ2_0", "row").pack(weights).view(2, 66)
    assert blocks[:, 64:].reshape(-1).view(torch.float16).tolist() == [0.0, 0.5]
    assert (blocks[0, :64] == 0b01010101).all()


def test_activations_are_rounded_as_llama_cpp_rounds_them() -> None:
    torch.manual_seed(0)
    x = torch.cat((torch.zeros(2, 512), torch.randn(40, 512) * torch.logspace(-6, 6, 40)[:, None]))
    library = ggml_rows.library()
    blocks = torch.zeros(42 * 2 * 292, dtype=torch.uint8)
    arguments = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    for name in ("quantize_row_q8_K_ref", "dequantize_row_q8_K"):
        getattr(library, name).argtypes = arguments
    library.quantize_row_q8_K_ref(x.data_ptr(), blocks.data_ptr(), x.numel())
    expected = torch.empty_like(x)
    library.dequantize_row_q8_K(blocks.data_ptr(), expected.data_ptr(), x.numel())
    torch.testing.assert_close(activations.values(x), expected, rtol=1e-6, atol=0)


def test_rounding_grows() -> None:
    ramp = Ramp.over(10, after=0.2, share=0.4)
    assert [round(ramp.at(step), 2) for step in range(10)] == [0, 0, 0, 0.25, 0.5, 0.75, 1, 1, 1, 1]
    assert [Ramp.over(5, 0.0, 0.0).at(step) for step in (0, 1)] == [1, 1]
    assert Ramp.over(4, 0.0, 1.0).at(3) == 1


# --- Runs -----------------------------------------------------------------------


def test_the_run_learns_and_says_which_values(trained: Run) -> None:
    losses = [line["loss"] for line in trained.metrics() if "loss" in line]
    assert losses[-1] < losses[0] - 0.1
    assert trained.adapter is None
    assert trained.manifest().target == "gguf-tq2_0"


@pytest.mark.parametrize("target", ["gguf-tq2_0", "gguf-tq1_0"])
@pytest.mark.parametrize("group", GROUPS)
def test_trained_weights_file_and_codes_are_the_same(
    target: str, group: str, base: Path, data: Path, tmp_path: Path
) -> None:
    run = train(ternary(base, data, tmp_path / "run", target=target, ternary_scale=group, epochs=1)).run
    file = tmp_path / "file.gguf"
    prepared = exporting.prepare(str(run.path), out=file)
    assert prepared.plan.target == target
    exporting.export(prepared, Silent())
    (finding,) = check_codes(prepared.origin.source, file)
    assert (finding.ok, finding.value) == (True, 1.0)
    values = model_values(run)
    for name, stored in file_values(run, file).items():
        assert torch.equal(stored, values[name]), name


def model_values(run: Run) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    found: dict[str, torch.Tensor] = load_file(run.model / "model.safetensors")
    return found


def file_values(run: Run, file: Path) -> dict[str, torch.Tensor]:
    """All weights of the file, as transformers would hold them: read by another path than the one that wrote it."""
    from edgeft.models.gguf_torch import load_packed, unpack

    model = load_packed(file, run.model, torch.float32)
    unpack(model)
    return {name: value.detach() for name, value in model.named_parameters()}


def test_llama_cpp_says_what_the_graph_says(trained: Run, shipped: Path) -> None:
    import transformers

    from edgeft import plugins

    model = transformers.AutoModelForCausalLM.from_pretrained(trained.model, dtype=torch.float32)
    runtime = plugins.load("runtimes", "xllamacpp")
    with runtime.load(Artifact(shipped), LoadOptions(context=256)) as session:
        ids = session.render([{"role": "user", "content": "train 12"}])
        said = [delta.token for delta in session.generate(ids, Sampling(max_tokens=8, temperature=0.0))]
    expected = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=8)[0][len(ids) :].tolist()
    assert [token for token in said if token is not None] == [token for token in expected if token != 257]


def test_verify_proves_it(trained: Run, shipped: Path) -> None:
    assert main(["verify", str(trained.path), str(shipped), "--tolerance", "top1=0.9"]) == 0
    ledger = json.loads(shipped.with_name("file.gguf.json").read_text())["ledger"]
    assert abs(ledger["nll_file"] - trained.manifest().evaluation["nll_training_graph"]) < 2e-3


def test_the_verdict_names_the_file_to_take(
    trained: Run, shipped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "q8.gguf"
    exporting.export(exporting.prepare(str(trained.path), "gguf-q8_0", out=other), Silent())
    command = ["verify", str(trained.path), str(shipped), "--quick", "--tolerance", "top1=0.9", "--against", str(other)]
    assert main(command) == 0
    assert "Take the ternary file: as good and smaller" in capsys.readouterr().out
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["against"]
    assert [file["name"] for file in found["files"]] == ["file.gguf", "q8.gguf"]


@pytest.mark.parametrize(
    ("other", "choice"),
    [
        (Figures("b", 100, 1.0, 10.0), "Take b: as good, no larger"),
        (Figures("b", 200, 1.0, 10.0), "Take the ternary file: as good and smaller"),
        (Figures("b", 200, 0.9), "Take b, unless its size does not fit: it is better"),
        (Figures("b", 101, 0.9), "Take b: it is better at equal bytes or less"),
        (Figures("b", 100, 1.1), "Take the ternary file: it answers better"),
    ],
)
def test_a_verdict_says_plainly_when_4_bits_are_better(other: Figures, choice: str) -> None:
    said = verdict(Figures("a", 100, 1.0, 20.0), other)
    assert said.startswith(choice)
    assert ("0.50 times the speed" in said) == (other.tokens_per_s is not None)


def test_another_target_gets_the_ternary_values(trained: Run, tmp_path: Path) -> None:
    file = tmp_path / "f16.gguf"
    prepared = exporting.prepare(str(trained.path), "gguf-f16", out=file)
    assert prepared.origin.source.packed is None
    exporting.export(prepared, Silent())
    name, values = "model.layers.0.mlp.down_proj.weight", model_values(trained)
    assert torch.equal(file_values(trained, file)[name], values[name])


def test_a_resumed_run_is_the_same_run(base: Path, data: Path, tmp_path: Path) -> None:
    config = ternary(base, data, tmp_path / "whole", ramp=0.5, epochs=4)
    whole = train(config).run
    for at in (2, 6):  # while rounding grows, and after
        broken = dataclasses.replace(config, out=tmp_path / f"broken-{at}")
        with pytest.raises(Interrupted):
            train(broken, InterruptAt(at))
        resumed = train(read_config(broken.out), resume=True).run
        assert curve(resumed) == curve(whole)
        assert packed_bytes(resumed) == packed_bytes(whole)


def packed_bytes(run: Run) -> bytes:
    return read_packed(run.packed).weights.read_bytes()


def test_8_bit_activations_and_a_teacher_train_too(base: Path, data: Path, tmp_path: Path) -> None:
    run = train(ternary(base, data, tmp_path / "run", activations=8, teacher=0.5, dtype="auto", epochs=3)).run
    losses = [line["loss"] for line in run.metrics() if "loss" in line]
    assert losses[-1] < losses[0]
    assert read_config(run.path).activations == 8


def test_the_teachers_loss_is_the_divergence_from_the_original() -> None:
    from edgeft.train.ternary_teacher import _Taught

    torch.manual_seed(0)
    states, said = torch.randn(50, 16, requires_grad=True), torch.randn(50, 16)
    head, known = torch.randn(300, 16, requires_grad=True), torch.randn(300, 16)
    targets = torch.randint(0, 300, (50,))
    for share in (0.0, 0.3, 1.0):
        loss = _Taught.apply(states, head, said, known, targets, share)
        found = torch.autograd.grad(loss, (states, head))
        logits = states @ head.t()
        nll = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
        teacher = torch.log_softmax(said @ known.t(), 1)
        kl = torch.nn.functional.kl_div(torch.log_softmax(logits, 1), teacher, log_target=True, reduction="sum")
        expected = (1 - share) * nll + share * kl
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-3)
        for mine, theirs in zip(found, torch.autograd.grad(expected, (states, head)), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_an_adapter_is_trained_over_a_ternary_file(
    shipped: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The third mode, end to end: the file's weights stay ternary, llama.cpp adds the adapter when it runs."""
    config = settings(shipped, data, tmp_path / "run", method="gguf", learning_rate=1e-2, epochs=3)
    before = shipped.read_bytes()
    run = train(config).run
    losses = [line["loss"] for line in run.metrics() if "loss" in line]
    assert losses[-1] < losses[0] - 0.05
    adapter = tmp_path / "adapter.gguf"
    exporting.export(exporting.prepare(str(run.path), out=adapter), Silent())
    assert shipped.read_bytes() == before
    capsys.readouterr()
    assert main(["verify", str(run.path), str(adapter), "--tolerance", "top1=0.9", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["nll_file"] == pytest.approx(report["nll_training_graph"], abs=5e-3)
    examples = load_split(str(data), "test")
    with open_session(str(shipped), adapters=(AdapterScale(adapter),)).session as session:
        beside = reference_nll(session, shipped, examples)
        session.set_adapters(())
        alone = reference_nll(session, shipped, examples)
    assert beside is not None and alone is not None
    assert beside == pytest.approx(report["nll_file"], abs=5e-3)
    assert alone > beside + 0.05


# --- Shapes ---------------------------------------------------------------------


def test_rows_that_do_not_fill_blocks_are_named(data: Path, tmp_path: Path) -> None:
    odd = tiny.write_loadable(tmp_path / "odd", **{**SHAPE, "intermediate_size": 320})
    config = ternary(odd, data, tmp_path / "run", epochs=1)
    retrofit, share, fallback, top, _ = ternary_notes(config, odd)
    assert "lose to 4 bits" in retrofit
    assert share.startswith("12 of 14 layer tensors become ternary (TQ2_0)")
    assert fallback == (
        "not ternary: ffn_down: 320 columns do not fill blocks of 256: Q4_0 instead of TQ2_0; they are trained "
        "through Q4_0"
    )
    assert top == "embedding and head, which are one: Q6_K, trained through that rounding; 16% of the file"
    run = train(config).run
    prepared = exporting.prepare(str(run.path), out=tmp_path / "file.gguf")
    exporting.export(prepared, Silent())
    assert check_codes(prepared.origin.source, tmp_path / "file.gguf")[0].value == 1.0
    assert read_packed(run.packed).types["model.layers.0.mlp.down_proj.weight"] == "Q4_0"


def test_a_model_without_a_ternary_tensor_is_refused(data: Path, tmp_path: Path) -> None:
    narrow = tiny.write_loadable(tmp_path / "narrow")
    with pytest.raises(UnsupportedModel, match="would have no ternary weights"):
        train(ternary(narrow, data, tmp_path / "run"))


def test_a_head_of_its_own_and_biases_are_trained_too(data: Path, tmp_path: Path) -> None:
    other = tiny.write_loadable(tmp_path / "base", "qwen2", **SHAPE, tie_word_embeddings=False)
    config = ternary(other, data, tmp_path / "run", epochs=1)
    assert ternary_notes(config, other)[2:4] == [
        "head: Q6_K, trained through that rounding; 14% of the file",
        "embedding: Q4_K, trained through that rounding; 9% of the file",
    ]
    run, file = train(config).run, tmp_path / "file.gguf"
    exporting.export(exporting.prepare(str(run.path), out=file), Silent())
    values = model_values(run)
    for name, stored in file_values(run, file).items():
        assert torch.equal(stored, values[name]), name


def test_in_bfloat16_the_graph_has_the_files_ternary_weights(base: Path, data: Path, tmp_path: Path) -> None:
    run, file = train(ternary(base, data, tmp_path / "run", dtype="bfloat16")).run, tmp_path / "file.gguf"
    exporting.export(exporting.prepare(str(run.path), out=file), Silent())
    values, kinds = model_values(run), read_packed(run.packed).types
    for name, stored in file_values(run, file).items():
        assert values[name].dtype == torch.bfloat16
        exact = stored if kinds.get(name) != "Q6_K" else stored.bfloat16().float()
        assert torch.equal(exact, values[name].float()), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "lora"}, "the method lora do not go together"),
        ({"tune": "scales"}, "no scales to tune"),
        ({"ramp": 1.5}, "the ramp must be"),
        ({"ramp": 0.5, "quantize_after": 0.6}, "the ramp must be"),
        ({"ternary_scale": "column"}, "no scale per 'column'"),
        ({"activations": 4}, "8 or 16 bits"),
        ({"target": None, "ramp": 0.1}, "--ramp is for ternary training"),
        ({"target": None, "activations": 8}, "--activations is for ternary training"),
        ({"from_scratch": "base", "teacher": 0.5}, "no original model"),
        ({"from_scratch": "base", "target": None, "method": "qlora"}, "all weights are trained"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(
    changes: dict[str, Any], message: str, base: Path, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        ternary(base, data, tmp_path / "run", **changes)


# --- From scratch ---------------------------------------------------------------


def test_random_weights_take_the_shape_and_the_first_words(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shape = tmp_path / "shape.json"
    shape.write_text(json.dumps({"num_hidden_layers": 1, "intermediate_size": 256, "vocab_size": tiny.TOKENS + 1}))
    command = ["train", "--model", str(base), "--data", str(data), "--from-scratch", str(shape)]
    command += ["--for", "gguf-tq2_0", "--epochs", "1", "--batch-tokens", "384", "--out"]
    assert main([*command, str(tmp_path / "run")]) == 0
    assert "edgeft export" in capsys.readouterr().out
    assert main([*command, str(tmp_path / "again")]) == 0
    run = Run(tmp_path / "run")
    assert packed_bytes(run) == packed_bytes(Run(tmp_path / "again"))
    model = run.model
    vocabulary = json.loads((model / "tokenizer.json").read_text())["model"]
    assert len(vocabulary["vocab"]) == tiny.TOKENS + 1
    assert vocabulary["merges"] == ["t h"]
    assert model_values(run)["model.embed_tokens.weight"].shape == (tiny.TOKENS + 1, 256)
    file = tmp_path / "file.gguf"
    assert main(["export", str(run.path), "--out", str(file), "--no-verify"]) == 0
    assert check_codes(Source(model, packed=run.packed), file)[0].value == 1.0


def test_a_seed_gives_its_own_weights(base: Path, data: Path, tmp_path: Path) -> None:
    from edgeft.train.workflow import prepare

    made = [
        prepare(ternary(base, data, tmp_path / "run", from_scratch="base", seed=seed)).base.path for seed in (0, 1, 0)
    ]
    assert made[0] == made[2] != made[1]
    assert (made[0] / "model.safetensors").read_bytes() != (made[1] / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ('{"hidden_size": ', "cannot be read"),
        ('{"width": 3}', "is no shape"),
        ('{"vocab_size": 9999}', "the tokenizer has"),
        ('{"vocab_size": 100}', "there is no"),
        ('{"num_key_value_heads": 3}', "cannot share 3 pairs"),
        ('{"hidden_size": "wide"}', "not a number above 0"),
    ],
)
def test_shapes_that_are_none_are_refused(shape: str, message: str, base: Path, data: Path, tmp_path: Path) -> None:
    from edgeft.train.workflow import prepare

    file = tmp_path / "shape.json"
    file.write_text(shape)
    with pytest.raises(UsageError, match=message):
        prepare(ternary(base, data, tmp_path / "run", from_scratch=str(file)))
