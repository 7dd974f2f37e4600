"""Training on the GGUF that ships: its weights are read exactly, stay as they are, and the adapter fits that file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tiny
from edgeft.converters import ggml
from test_adapter_files import base_file
from test_train_runs import InterruptAt, curve, settings, write_examples

from edgeft.artifact import read_manifest
from edgeft.cli.main import main
from edgeft.errors import ModelError, UnsupportedModel, UsageError
from edgeft.models.gguf_header import TENSOR_TYPES, read_header
from edgeft.models.gguf_import import text_side
from edgeft.paths import sha256_file
from edgeft.plugins import AdapterScale, LoadOptions
from edgeft.run import Run
from edgeft.sessions import open_session
from edgeft.train import Interrupted, TrainConfig, train

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*deprecated.*"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny models gain nothing from threads, and two thread pools that wait for each other lose much."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


READABLE = (
    *("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
    *("IQ4_NL", "IQ4_XS", "TQ1_0", "TQ2_0", "MXFP4"),
)


@pytest.mark.parametrize("kind", READABLE)
@pytest.mark.parametrize("threads", [1, 3])
def test_every_type_is_read_as_ggml_reads_it(kind: str, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from edgeft.models import gguf_torch

    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(gguf_torch, "_SLAB", 2048)
    weights = np.random.default_rng(0).standard_normal((37, 512)).astype(np.float32)
    stored = quantized(kind, weights)
    expected = gguf.quants.dequantize(stored, gguf.GGMLQuantizationType[kind])
    wide = gguf_torch.dense(torch.from_numpy(stored), kind, 512, torch.float32)
    np.testing.assert_array_equal(wide.numpy(), expected)
    narrow = gguf_torch.dense(torch.from_numpy(stored), kind, 512, torch.bfloat16)
    assert torch.equal(narrow, torch.from_numpy(np.ascontiguousarray(expected)).bfloat16())


def quantized(kind: str, weights: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Rows as a file has them; random bytes with small scales where no quantizer is at hand."""
    if kind in ggml.TYPES:
        return ggml.load().quantize(ggml.TYPES[kind], weights)
    block, size = {name: (block, size) for name, block, size in TENSOR_TYPES.values()}[kind]
    # Bytes up to 59 keep every 16-bit scale finite, wherever it lies in the block.
    shape = (len(weights), weights.shape[1] // block * size)
    return np.random.default_rng(1).integers(0, 60, shape, dtype=np.uint8)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_model_is_the_file(kind: str, tied: bool, tmp_path: Path) -> None:
    """From the model's directory to a 16-bit file and back, with the rotary rows in place again."""
    import torch
    from transformers import AutoModelForCausalLM

    from edgeft.models.gguf_torch import PackedLinear, load_packed

    base = tiny.write_loadable(tmp_path / "base", kind, dtype="bfloat16", tie_word_embeddings=tied)
    file = base_file(base, "gguf-bf16")
    model = load_packed(file, text_side(file), torch.float32)
    assert sum(isinstance(layer, PackedLinear) for layer in model.modules()) == 14
    ids = torch.arange(40)[None]
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)(ids).logits
        torch.testing.assert_close(model(ids).logits, theirs, rtol=1e-5, atol=1e-5)


def test_gradients_pass_through_packed_layers(tmp_path: Path) -> None:
    import torch

    from edgeft.models.gguf_torch import PackedLinear

    stored = torch.from_numpy(quantized("Q4_0", np.random.default_rng(0).standard_normal((8, 64)).astype(np.float32)))
    layer = PackedLinear(stored, "Q4_0", 64, torch.ones(8))
    plain = torch.nn.Linear(64, 8)
    plain.load_state_dict({"weight": layer.dense(torch.float32), "bias": torch.ones(8)})
    results = []
    for made in (layer, plain):
        x = torch.arange(128.0).view(2, 64).requires_grad_()
        made(x).square().sum().backward()
        results.append(x.grad)
    torch.testing.assert_close(results[0], results[1])


def test_long_rope_factors_of_the_file_are_used(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from edgeft.models.gguf_torch import load_packed

    rope = {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }  # fmt: skip
    base = tiny.write_loadable(tmp_path / "base", dtype="bfloat16", rope_parameters=rope)
    file = base_file(base, "gguf-bf16")
    model = load_packed(file, text_side(file), torch.float32)
    ids = torch.arange(100)[None]
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)(ids).logits
        torch.testing.assert_close(model(ids).logits, theirs, rtol=1e-4, atol=1e-4)


# --- Runs ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base_file(tiny.write_loadable(tmp_path_factory.mktemp("model") / "base", dtype="bfloat16"), "gguf-q4_0")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for split, count in (("train", 40), ("valid", 6), ("test", 6)):
        write_examples(folder / f"{split}.jsonl", count)
    return folder


def gguf_settings(file: Path, data: Path, out: Path, **others: Any) -> TrainConfig:
    return settings(file, data, out, method="gguf", learning_rate=5e-2, **others)


def test_a_run_on_a_file_from_training_to_the_runtime(
    file: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sha256_file(file)
    command = ["train", "--model", str(file), "--data", str(data), "--out", "run", "--learning-rate", "5e-2"]
    assert main([*command, "--epochs", "6", "--micro-tokens", "192", "--batch-tokens", "384"]) == 0
    said = capsys.readouterr()
    assert f"training on {file.name} itself" in said.err
    assert "edgeft export" in said.out and "--to" not in said.out
    run = Run(tmp_path / "run")
    losses = [line["loss"] for line in run.metrics() if "loss" in line]
    assert losses[-1] < losses[0] - 0.1
    manifest = run.manifest()
    assert (manifest.method, manifest.base["gguf"], manifest.base["digest"]) == ("gguf", str(file), before)
    assert sha256_file(file) == before

    assert main(["export", "run"]) == 0
    assert "writing the adapter alone (gguf-lora)" in capsys.readouterr().err
    adapter = tmp_path / "run-lora.gguf"
    made = read_manifest(adapter)
    assert made is not None and made.format == "adapter" and made.base["sha256"] == before
    assert main(["verify", "run", str(adapter), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] and report["nll_training_graph"] == pytest.approx(report["nll_file"], abs=0.02)
    assert {finding["name"] for finding in report["findings"]} >= {"kl", "top1", "nll", "adapter"}


def test_the_adapter_goes_onto_no_other_file_of_the_same_base(file: Path, data: Path, tmp_path: Path) -> None:
    train(gguf_settings(file, data, tmp_path / "run", epochs=1))
    out = tmp_path / "a.gguf"
    assert main(["export", str(tmp_path / "run"), "--out", str(out), "--no-verify"]) == 0
    other = base_file(file.parent / "base", "gguf-q8_0")
    with pytest.raises(ModelError, match="was trained on the file with SHA-256"):
        open_session(str(other), "xllamacpp", LoadOptions(threads=1), adapters=[AdapterScale(out)])


def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(file: Path, data: Path, tmp_path: Path) -> None:
    whole = train(gguf_settings(file, data, tmp_path / "whole")).run
    config = gguf_settings(file, data, tmp_path / "parts")
    with pytest.raises(Interrupted):
        train(config, InterruptAt(3))
    parts = train(config, resume=True).run
    assert curve(parts) == curve(whole)
    name = "adapter/adapter_model.safetensors"
    assert (parts.path / name).read_bytes() == (whole.path / name).read_bytes()


def test_a_file_that_changed_meanwhile_is_refused(file: Path, data: Path, tmp_path: Path) -> None:
    copy = tmp_path / "base.gguf"
    copy.write_bytes(file.read_bytes())
    config = gguf_settings(copy, data, tmp_path / "run")
    with pytest.raises(Interrupted):
        train(config, InterruptAt(2))
    changed = bytearray(copy.read_bytes())
    changed[-40] ^= 1
    copy.write_bytes(changed)
    with pytest.raises(ModelError, match="is not the file that"):
        train(config, resume=True)


def test_export_refuses_a_changed_file_and_can_merge_after_all(file: Path, data: Path, tmp_path: Path) -> None:
    copy = tmp_path / "base.gguf"
    copy.write_bytes(file.read_bytes())
    train(gguf_settings(copy, data, tmp_path / "run", epochs=1))
    merged = tmp_path / "merged.gguf"
    assert main(["export", str(tmp_path / "run"), "--to", "gguf-f16", "--out", str(merged), "--no-verify"]) == 0
    assert {tensor.type for tensor in read_header(merged).tensors} == {"F16", "F32"}
    changed = bytearray(copy.read_bytes())
    changed[-40] ^= 1
    copy.write_bytes(changed)
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "a.gguf")]) == 1


def test_what_cannot_be_trained_in_place_is_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="DoRA"):
        settings(tmp_path, data, tmp_path / "run", method="gguf", dora=True)
    with pytest.raises(UsageError, match="is not a GGUF file but"):
        train(settings(tiny.write_model(tmp_path / "base"), data, tmp_path / "run", method="gguf"))
    from edgeft.models.gguf_torch import check_supported

    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "mamba")
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnsupportedModel, match="architecture mamba, which cannot be trained in place"):
        check_supported(read_header(tmp_path / "other.gguf"))


def test_a_whole_run_on_a_directory_has_an_adapter_file_too(
    file: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Trained on the 16-bit weights, run on a GGUF of them: `--base` names it, its bits decide the limits."""
    base = file.parent / "base"
    train(settings(base, data, tmp_path / "run", method="lora", learning_rate=5e-2))
    out = tmp_path / "a.gguf"
    assert main(["export", str(tmp_path / "run"), "--to", "gguf-lora", "--out", str(out)]) == 0
    assert "--base BASE.gguf" in capsys.readouterr().err
    assert main(["verify", str(tmp_path / "run"), str(out)]) == 2
    assert "Name the GGUF it goes onto" in capsys.readouterr().err
    shipped = base_file(base, "gguf-q8_0")
    assert main(["verify", str(tmp_path / "run"), str(out), "--base", str(shipped), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["nll_merged"] == pytest.approx(report["nll_file"], abs=0.05)
    made = read_manifest(out)
    assert made is not None and set(made.ledger) == {"nll_training_graph", "nll_merged", "nll_file"}


@pytest.mark.model
@pytest.mark.slow
def test_smollm2_answers_beside_its_adapter_as_it_was_trained(
    smollm2_hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, run = tmp_path / "base.gguf", tmp_path / "run"
    assert main(["export", str(smollm2_hf), "--to", "gguf-q4_0", "--out", str(base), "--no-verify"]) == 0
    train(TrainConfig(str(base), "smart-home", run, method="gguf", epochs=0.1))
    out = tmp_path / "a.gguf"
    assert main(["export", str(run), "--out", str(out), "--no-verify"]) == 0
    capsys.readouterr()
    assert main(["verify", str(run), str(out), "--examples", "40", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["nll_file"] - report["nll_unmerged"] <= 0.005
    assert report["top1_agreement"] >= 0.99
