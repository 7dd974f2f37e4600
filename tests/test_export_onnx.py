"""ONNX export: the graph computes what transformers computes, from base and adapter, with bounded rounding."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

pytest.importorskip("onnxruntime_genai")

from edgeft.converters.onnx_quantize import Blocks, Settings, quantize

from edgeft.artifact import digest_of, read_manifest
from edgeft.chat import Sampling
from edgeft.cli.main import main
from edgeft.models import resolve
from edgeft.plugins import Session
from edgeft.sessions import open_session

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers"),
    pytest.mark.filterwarnings("ignore:The given NumPy array is not writable"),
]

RUNTIMES = ("onnxruntime-genai", "onnxruntime")
PROMPT = [10, 200, 33, 7, 90, 41, 41, 12]


@pytest.fixture
def opened() -> Iterator[Callable[..., Session]]:
    sessions: list[Session] = []

    def open_(path: Path, runtime: str = "auto") -> Session:
        sessions.append(open_session(str(path), runtime).session)
        return sessions[-1]

    yield open_
    for session in sessions:
        session.close()


def export(*arguments: object, out: Path) -> int:
    return main(["export", *map(str, arguments), "--out", str(out), "--no-verify"])


def made(*arguments: object, out: Path) -> Path:
    assert export(*arguments, out=out) == 0
    return out


def reference(base: Path, adapter: Path | None = None, **options: Any) -> Any:
    from edgeft.verify.torch_reference import load_reference

    return load_reference(base, adapter, **options)


def greedy(session: Session, count: int = 16) -> list[int]:
    return [d.token for d in session.generate(PROMPT, Sampling(max_tokens=count)) if d.token is not None]


def greedy_in_torch(model: Any, count: int = 16) -> list[int]:
    tokens = list(PROMPT)
    for _ in range(count):
        tokens.append(int(model.log_probs(tokens, [len(tokens) - 1])[0].argmax()))
    return tokens[len(PROMPT) :]


# --- The same numbers as transformers ---------------------------------------------------


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": False}),
        (
            "llama",
            {
                "rope_parameters": {
                    "rope_type": "llama3",
                    "rope_theta": 10000.0,
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 64,
                }
            },
        ),
        ("mistral", {}),
        ("qwen2", {}),
        ("qwen3", {}),
    ],
)
def test_float32_is_transformers(
    kind: str, settings: dict[str, Any], runtime: str, tmp_path: Path, opened: Any
) -> None:
    base = tiny.write_model(tmp_path / "base", kind, eos_token_id=None, **settings)
    session = opened(made(base, "--to", "onnx-fp32", out=tmp_path / "x-onnx"), runtime)
    model = reference(base)
    np.testing.assert_allclose(session.score(PROMPT), model.log_probs(PROMPT, range(len(PROMPT))), atol=2e-4)
    expected = greedy_in_torch(model)
    end = expected.index(258) if 258 in expected else len(expected)
    assert greedy(session) == expected[:end]


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "v_proj", "down_proj"]},
        {"target_modules": ["o_proj", "up_proj"], "use_rslora": True},
        {"target_modules": ["q_proj", "gate_proj"], "use_dora": True},
        {"target_modules": ["k_proj", "embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    ],
    ids=["lora", "rslora", "dora", "embedding", "head"],
)
def test_an_adapter_is_merged_as_peft_does(settings: dict[str, Any], tmp_path: Path, opened: Any) -> None:
    base = tiny.write_model(tmp_path / "base")
    # Unmerged: PEFT's merge of a tied embedding would change the head as well, which training did not.
    trained = tiny.write_adapter(base, tmp_path / "adapter", **{"lora_alpha": 60, **settings}).eval()
    out = made(base, "--adapter", tmp_path / "adapter", "--to", "onnx-fp32", out=tmp_path / "x-onnx")
    with torch.inference_mode():
        expected = torch.log_softmax(trained(torch.tensor([PROMPT])).logits[0], dim=-1).numpy()
    np.testing.assert_allclose(opened(out).score(PROMPT), expected, atol=5e-4)
    assert np.abs(reference(base).log_probs(PROMPT, range(len(PROMPT))) - expected).max() > 0.01
    manifest = read_manifest(out)
    assert (
        manifest is not None
        and manifest.adapter is not None
        and re.fullmatch("[0-9a-f]{64}", manifest.adapter["digest"])
    )


def test_a_qlora_run_is_merged_into_the_rounded_base(tmp_path: Path, opened: Any) -> None:
    from edgeft.run import Run, RunManifest

    base = tiny.write_model(tmp_path / "base", dtype="bfloat16", hidden_size=128)
    run = Run(tmp_path / "run")
    tiny.write_adapter(base, run.path / "adapter", target_modules=["q_proj", "down_proj"])
    (run.path / "config.toml").write_text("")
    where = {"reference": str(base), "path": str(base)}
    run.write_manifest(RunManifest("qlora", where, {}, tiny.TEMPLATE, 0, {}))
    session = opened(made(run.path, "--to", "onnx-fp32", out=tmp_path / "x-onnx"))
    got, rows = session.score(PROMPT), range(len(PROMPT))
    rounded, plain = (
        np.abs(got - reference(base, run.adapter, rounded=which).log_probs(PROMPT, rows)).mean()
        for which in (True, False)
    )
    # bitsandbytes looks 8-bit scales up in a table, which between two levels at times takes the farther one.
    assert rounded < plain / 5


# --- Quantized --------------------------------------------------------------------------


def dequantized(blocks: Blocks, bits: int, columns: int) -> np.ndarray:
    codes, zeros = blocks.codes, blocks.zeros
    if bits == 4:
        codes = np.stack([codes & 15, codes >> 4], axis=-1).reshape(*codes.shape[:2], -1)
        if zeros is not None and zeros.dtype == np.uint8:
            zeros = np.stack([zeros & 15, zeros >> 4], axis=-1).reshape(len(zeros), -1)[:, : blocks.scales.shape[1]]
    middle = np.float32(1 << (bits - 1)) if zeros is None else zeros[..., None].astype(np.float32)
    return ((codes - middle) * blocks.scales[..., None]).reshape(len(codes), -1)[:, :columns]


@pytest.mark.parametrize("columns", [96, 128, 80], ids=["odd blocks", "even blocks", "half a block"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("method", ["rtn", "k_quant", "hqq"])
def test_blocks_are_near_the_weights(method: Any, bits: int, columns: int) -> None:
    weights = np.random.default_rng(0).standard_normal((50, columns)).astype(np.float32)
    blocks = quantize(weights, bits, Settings(bits, bits, bits, 32, method=method))
    # A step is the range of 32 normal values, about 4.1, in 15 or 255 parts; rounding errs by step / sqrt(12).
    step = 4.1 / (2**bits - 1)
    assert np.sqrt(np.square(dequantized(blocks, bits, columns) - weights).mean()) < 1.15 * step / np.sqrt(12)


@pytest.mark.parametrize("method", ["rtn", "k_quant", "hqq"])
def test_zeros_stay_finite(method: Any) -> None:
    blocks = quantize(np.zeros((8, 64), np.float32), 4, Settings(4, 4, 4, method=method))
    assert not dequantized(blocks, 4, 64).any()


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize(
    ("settings", "limit"),
    [
        ((), 0.3),
        (("method=k_quant",), 0.3),
        (("method=rtn", "symmetric=yes"), 0.4),
        (("method=hqq",), 0.3),
        (("block=16",), 0.25),
        (("head-bits=4",), 0.4),
        (("head-bits=32", "embedding-bits=32"), 0.3),
    ],
    ids=["default", "k_quant", "symmetric", "hqq", "block 16", "head 4", "head float"],
)
@pytest.mark.parametrize("tied", [True, False])
def test_four_bits_are_near(
    tied: bool, settings: tuple[str, ...], limit: float, runtime: str, tmp_path: Path, opened: Any
) -> None:
    base = tiny.write_model(tmp_path / "base", tie_word_embeddings=tied)
    flags = [part for setting in settings for part in ("--set", setting)]
    session = opened(made(base, "--to", "onnx-q4", *flags, out=tmp_path / "x-onnx"), runtime)
    error = session.score(PROMPT) - reference(base).log_probs(PROMPT, range(len(PROMPT)))
    assert 1e-4 < np.sqrt(np.square(error).mean()) < limit


@pytest.mark.parametrize("bits", ["4", "8"])
def test_an_embedding_of_half_blocks_is_shared_too(bits: str, tmp_path: Path, opened: Any) -> None:
    base = tiny.write_model(tmp_path / "base", hidden_size=80)
    out = made(base, "--to", "onnx-int8", "--set", f"head-bits={bits}", out=tmp_path / "x-onnx")
    error = opened(out).score(PROMPT) - reference(base).log_probs(PROMPT, range(len(PROMPT)))
    assert np.sqrt(np.square(error).mean()) < (0.4 if bits == "4" else 0.03)
    manifest = read_manifest(out)
    assert manifest is not None and manifest.types.get("fp32", 0) == 5 * 80


def test_eight_bits_are_nearer_than_four(tmp_path: Path, opened: Any) -> None:
    base = tiny.write_model(tmp_path / "base")
    rows = reference(base).log_probs(PROMPT, range(len(PROMPT)))
    four, eight = (
        np.abs(opened(made(base, "--to", f"onnx-{name}", out=tmp_path / name)).score(PROMPT) - rows).mean()
        for name in ("q4", "int8")
    )
    assert eight < four / 4


# --- The folder and its manifest --------------------------------------------------------


def test_the_manifest_says_what_is_there(tmp_path: Path) -> None:
    base = tiny.write_model(tmp_path / "base")
    out = made(base, "--to", "onnx-q4", out=tmp_path / "x-onnx")
    manifest = read_manifest(out)
    assert manifest is not None
    assert manifest.format == "onnx" and manifest.target == "onnx-q4"
    assert manifest.types == {"int4": 2 * (64 * 128 + 64 * 64 + 3 * 64 * 96), "int8": 260 * 64, "fp32": 5 * 64}
    assert manifest.parameters == sum(manifest.types.values())
    assert manifest.bytes == sum(file.stat().st_size for file in out.iterdir())
    assert manifest.sha256 == digest_of(out)
    assert manifest.stop_token_ids == (258, 257)
    rotary = 2 * 256 * 8 * 4
    stored = (out / "model.onnx.data").stat().st_size - rotary
    assert 8 * stored / manifest.parameters == pytest.approx(manifest.bits_per_weight, rel=0.005)
    assert resolve(str(out)).kind == "onnx"


def test_a_dry_run_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = tiny.write_model(tmp_path / "base")
    assert main(["export", str(base), "--to", "onnx-q4", "--out", str(tmp_path / "x"), "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert not (tmp_path / "x").exists() and set(plan["bytes_by_type"]) == {"int4", "int8", "fp32"}
    out = made(base, "--to", "onnx-q4", out=tmp_path / "x")
    assert plan["bytes"] == pytest.approx((out / "model.onnx.data").stat().st_size, rel=0.005)


def test_a_damaged_weight_leaves_the_old_model_and_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.numpy import load_file, save_file

    base = tiny.write_model(tmp_path / "base")
    out = made(base, "--to", "onnx-q4", out=tmp_path / "x-onnx")
    before = digest_of(out)
    weights = load_file(base / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][7, 3] = np.nan
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    assert export(base, "--to", "onnx-q4", out=out) == 1
    assert "model.layers.1.mlp.up_proj.weight is NaN or infinite in row 7" in capsys.readouterr().err
    assert digest_of(out) == before and read_manifest(out) is not None
    assert {file.name for file in tmp_path.iterdir()} == {"base", "x-onnx", "x-onnx.json"}


def test_an_older_model_is_replaced_and_a_strangers_folder_is_not(tmp_path: Path) -> None:
    base = tiny.write_model(tmp_path / "base")
    out = made(base, "--to", "onnx-q4", out=tmp_path / "x-onnx")
    before = digest_of(out)
    made(base, "--to", "onnx-int8", out=out)
    assert digest_of(out) != before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    assert export(base, "--to", "onnx-q4", out=tmp_path / "mine") == 2
    assert (tmp_path / "mine" / "thesis.txt").exists()


@pytest.mark.parametrize(
    ("target", "setting", "said"),
    [
        ("onnx-q4", "blok=32", "no setting 'blok'"),
        ("onnx-q4", "block=33", "block cannot be '33'"),
        ("onnx-q4", "method=k_quant symmetric=yes", "k_quant has zero points"),
        ("onnx-int8", "method=hqq", "hqq rounds to 4 bits only"),
        ("onnx-fp32", "block=32", "would change nothing"),
        ("onnx-q4", "block", "write NAME=VALUE"),
    ],
)
def test_settings_that_make_no_sense_are_refused(
    target: str, setting: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tiny.write_model(tmp_path / "base")
    flags = [part for one in setting.split() for part in ("--set", one)]
    assert export(base, "--to", target, *flags, out=tmp_path / "x") == 2
    assert said in capsys.readouterr().err


def test_verify_tells_the_model_from_another(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = tiny.write_model(tmp_path / "base")
    for name, seed in (("adapter", 1), ("other", 2)):
        tiny.write_adapter(base, tmp_path / name, seed=seed, target_modules=["q_proj", "down_proj"], lora_alpha=800)
    data = tmp_path / "data.jsonl"
    lines = []
    for n in range(60):
        ask, answer = {"role": "user", "content": f"light {n}"}, {"role": "assistant", "content": f"on {n}"}
        lines.append(json.dumps({"messages": [ask, answer]}))
    data.write_text("\n".join(lines))
    out = made(base, "--adapter", tmp_path / "adapter", "--to", "onnx-fp32", out=tmp_path / "x-onnx")
    capsys.readouterr()
    for name, code in (("adapter", 0), ("other", 5)):
        arguments = ["verify", base, out, "--adapter", tmp_path / name, "--data", data]
        assert main([*map(str, arguments), "--json"]) == code
        report = json.loads(capsys.readouterr().out)
        findings = {finding["name"]: finding["ok"] for finding in report["findings"]}
        assert findings["tokenizer"] and findings["template"] and findings["prompt"]
        assert report["ok"] == (code == 0) and report["bits_per_weight"] == 32
        assert (report["kl"] < 1e-5) == (code == 0)


@pytest.mark.model
@pytest.mark.slow
def test_the_real_model_answers(smollm2_hf: Path, tmp_path: Path, opened: Any) -> None:
    out = tmp_path / "smollm2-q4-onnx"
    assert main(["export", str(smollm2_hf), "--to", "onnx-q4", "--out", str(out)]) == 0
    for runtime in RUNTIMES:
        session = opened(out, runtime)
        prompt = session.render([{"role": "user", "content": "What is the capital of France?"}])
        answer = "".join(delta.text for delta in session.generate(prompt, Sampling(max_tokens=20)))
        assert "Paris" in answer


# --- What is missing, and what is never sent --------------------------------------------


@pytest.mark.parametrize("module", ["onnxruntime_genai", "onnx_ir", "onnx"])
def test_a_missing_package_is_named_with_the_line_that_installs_it(
    module: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny.write_model(tmp_path / "base")
    monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    assert export(base, "--to", "onnx-q4", out=tmp_path / "x-onnx") == 3
    said = capsys.readouterr().err
    assert module in said and "pip install 'edgeft[onnx-export]'" in said
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_running_without_onnxruntime_names_the_smaller_extra(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = made(tiny.write_model(tmp_path / "base"), "--to", "onnx-fp32", out=tmp_path / "x-onnx")
    for module in ("onnxruntime_genai", "onnxruntime"):
        monkeypatch.setitem(sys.modules, module, None)
    assert main(["run", str(out), "hello"]) == 3
    assert "pip install 'edgeft[onnx]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "call",
    ["onnx_quantize.quantize(numpy.ones((1, 32), 'f4'), 4, settings)", "onnx_graph._builder_module().__enter__()"],
)
def test_telemetry_is_off_before_onnxruntime_is_imported(call: str) -> None:
    code = f"""
import os, sys
import numpy
from edgeft.converters import onnx_graph, onnx_quantize
class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "onnxruntime":
            print(os.environ.get("ORT_DISABLE_TELEMETRY"))
sys.meta_path.insert(0, Watch())
settings = onnx_quantize.Settings(4, 8, 8)
{call}
"""
    environment = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1"]
