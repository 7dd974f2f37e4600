"""`edgeft diff` finds what sets two artifacts apart, and nothing where there is nothing."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tiny
import tiny_gguf
from edgeft.converters import ggml
from test_adapter_files import base_file

from edgeft.cli.main import main
from edgeft.diff.gguf_files import widened
from edgeft.models.gguf_header import TENSOR_TYPES, TensorInfo, read_header

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers"),
    pytest.mark.filterwarnings("ignore:The given NumPy array is not writable"),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_loadable(tmp_path_factory.mktemp("diff") / "base")


@pytest.fixture
def diff(capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    def run(*arguments: object, code: int = 0) -> dict[str, Any]:
        capsys.readouterr()
        assert main(["diff", *map(str, arguments), "--json"]) == code
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    return run


def sibling(file: Path, **options: Any) -> Path:
    """A tiny GGUF with the same random weights, but for what is asked."""
    return tiny_gguf.write_random(file, **options)


# --- GGUF -----------------------------------------------------------------------------


def test_a_file_does_not_differ_from_its_copy(tmp_path: Path, diff: Callable[..., dict[str, Any]]) -> None:
    a = sibling(tmp_path / "a.gguf")
    b = Path(shutil.copy(a, tmp_path / "b.gguf"))
    found = diff(a, b, "--fail-on-difference")
    assert found["same"] and found["metadata"] == [] and found["types"] == []
    assert all(tensor["equal"] for tensor in found["tensors"]) and len(found["tensors"]) == 21
    assert found["logits"]["kl"] == 0 and found["logits"]["same_top"] == 1 and found["tokenizer"] == "same"


def test_a_change_of_weights_is_measured(tmp_path: Path, diff: Callable[..., dict[str, Any]]) -> None:
    a = sibling(tmp_path / "a.gguf")
    stored = next(tensor for tensor in gguf.GGUFReader(a).tensors if tensor.name == "blk.1.ffn_up.weight")
    change = np.random.default_rng(9).normal(size=stored.data.shape).astype(np.float32) * 0.01
    b = sibling(tmp_path / "b.gguf", changes={"blk.1.ffn_up.weight": change})
    found = diff(a, b)
    (tensor,) = (tensor for tensor in found["tensors"] if not tensor["equal"])
    assert tensor["name"] == "blk.1.ffn_up.weight" and tensor["type_a"] == tensor["type_b"] == "F32"
    expected = np.linalg.norm(change) / np.linalg.norm(stored.data)
    assert tensor["relative_rms"] == pytest.approx(expected, rel=1e-4)
    assert tensor["largest"] == pytest.approx(np.abs(change).max(), rel=1e-4)
    assert found["logits"]["kl"] > 0 and not found["same"]


def test_two_types_of_one_model(base: Path, diff: Callable[..., dict[str, Any]]) -> None:
    a, b = base_file(base, "gguf-f16"), base_file(base, "gguf-q4_0")
    found = diff(a, b)
    by_name = {tensor["name"]: tensor for tensor in found["tensors"]}
    for info in read_header(b).tensors:
        tensor = by_name[info.name]
        if info.type == "F32":
            assert tensor["equal"]
            continue
        assert (tensor["type_a"], tensor["type_b"]) == ("F16", info.type) and not tensor["equal"]
        one, other = (dense(file, info.name) for file in (a, b))
        expected = np.linalg.norm(one - other) / np.linalg.norm(one)
        assert tensor["relative_rms"] == pytest.approx(expected, rel=1e-4)
    changed = {change["name"]: (change["a"], change["b"]) for change in found["types"]}
    assert changed["Q4_0"][0] == 0 < changed["Q4_0"][1]
    assert {change["name"] for change in found["metadata"]} == {"general.file_type"}
    assert found["bits_per_weight"][0] > found["bits_per_weight"][1]
    assert found["template"] == "same" and found["tokenizer"] == "same" and found["logits"]["kl"] > 0


def dense(file: Path, name: str) -> Any:
    tensor = next(tensor for tensor in gguf.GGUFReader(file).tensors if tensor.name == name)
    return gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float64)


READABLE = [kind for kind in ggml.TYPES if kind in {name for name, _, _ in TENSOR_TYPES.values()}]


@pytest.mark.parametrize("kind", READABLE)
def test_values_are_those_of_ggml(kind: str) -> None:
    weights, size = next((w, s) for name, w, s in TENSOR_TYPES.values() if name == kind)
    packed = np.random.default_rng(2).integers(0, 256, (4, 512 // weights * size), np.uint8)
    found = widened(packed, TensorInfo("x", (512, 4), kind, 0, packed.size))
    expected = ggml.load().dequantize(ggml.TYPES[kind], packed, 512)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("template", [None, tiny_gguf.TEMPLATE + " "])
def test_another_template_is_a_difference(
    template: str | None, tmp_path: Path, diff: Callable[..., dict[str, Any]]
) -> None:
    chain = tiny_gguf.chain_of(tiny_gguf.ANSWER)
    a = tiny_gguf.write_scripted(tmp_path / "a.gguf", chain)
    b = tiny_gguf.write_scripted(tmp_path / "b.gguf", chain, template=template)
    found = diff(a, b, "--no-logits", "--no-tensors")
    assert found["template"] == "different" and not found["same"] and found["tensors"] == []


def test_metadata_and_shapes(tmp_path: Path, diff: Callable[..., dict[str, Any]]) -> None:
    a, b = sibling(tmp_path / "a.gguf"), sibling(tmp_path / "b.gguf", context=512)
    assert diff(a, b, "--no-logits")["metadata"] == [{"name": "llama.context_length", "a": 2048, "b": 512}]
    other = tiny_gguf.write_scripted(tmp_path / "c.gguf", tiny_gguf.chain_of("ab"))
    found = diff(a, other, "--no-logits")
    shapes = {tensor["name"]: (tensor["shape_a"], tensor["shape_b"]) for tensor in found["tensors"]}
    assert shapes["output.weight"] == ([261, 64], [261, 288])
    assert all(tensor["relative_rms"] is None for tensor in found["tensors"] if tensor["shape_a"] != tensor["shape_b"])


def test_a_tensor_that_one_of_them_lacks(tmp_path: Path, diff: Callable[..., dict[str, Any]]) -> None:
    tensors = tiny_gguf._layers(64, 96, 0)
    a = tiny_gguf.write_gguf(tmp_path / "a.gguf", tensors)
    b = tiny_gguf.write_gguf(tmp_path / "b.gguf", {k: v for k, v in tensors.items() if k != "output.weight"})
    for one, other, side in ((a, b, "b"), (b, a, "a")):
        found = diff(one, other, "--no-logits")
        (lacking,) = (tensor for tensor in found["tensors"] if not tensor["equal"])
        assert lacking["name"] == "output.weight" and lacking[f"type_{side}"] is None


def test_another_vocabulary_is_said(tmp_path: Path, diff: Callable[..., dict[str, Any]]) -> None:
    a = sibling(tmp_path / "a.gguf")
    b = base_file(tiny.write_loadable(tmp_path / "other"))
    found = diff(a, b)
    assert found["tokenizer"] == "different" and found["logits"] is None
    assert any("261 tokens against 262" in note for note in found["notes"])


def test_the_exit_code(tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = str(base_file(base, "gguf-f16")), str(base_file(base, "gguf-q4_0"))
    assert main(["diff", a, b]) == 0
    said = capsys.readouterr().out
    assert "relative RMS error" in said and "blk.*.ffn_up.weight" in said and "They differ in" in said
    assert main(["diff", a, b, "--fail-on-difference"]) == 5
    assert "differ" in capsys.readouterr().err
    assert main(["diff", a, a, "--fail-on-difference"]) == 0
    assert "No difference was found" in capsys.readouterr().out
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(40))
    assert main(["diff", a, str(tmp_path / "bad.gguf")]) == 1
    assert main(["diff", a, "nothing.gguf"]) == 2


def test_no_torch_is_needed(base: Path) -> None:
    files = [str(base_file(base, target)) for target in ("gguf-f16", "gguf-q4_0")]
    code = (
        "import sys\n"
        "sys.modules.update(torch=None, transformers=None, peft=None, onnx=None)\n"
        "from edgeft.cli.main import main\n"
        f"sys.exit(main(['diff', *{files!r}]))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "KL(A ‖ B)" in result.stdout


def test_data_of_ones_own(base: Path, tmp_path: Path, diff: Callable[..., dict[str, Any]]) -> None:
    turns = [{"role": "user", "content": "light"}, {"role": "assistant", "content": "on it"}]
    (tmp_path / "test.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    found = diff(base_file(base, "gguf-f16"), base_file(base, "gguf-q4_0"), "--data", tmp_path)
    # This template writes no generation prompt, so the role is learned too; then the answer and the token that ends it.
    assert found["logits"]["texts"] == 1
    assert found["logits"]["tokens"] == 1 + len("assistant\n") + len("on it") + 1


# --- Adapters -----------------------------------------------------------------------------


def test_two_adapters_on_one_base(base: Path, tmp_path: Path, diff: Callable[..., dict[str, Any]]) -> None:
    files = []
    for seed in (1, 2):
        tiny.write_adapter(base, tmp_path / f"a{seed}", seed=seed, target_modules=["q_proj"], lora_alpha=100)
        files.append(tmp_path / f"a{seed}.gguf")
        command = ["export", base, "--adapter", tmp_path / f"a{seed}", "--to", "gguf-lora", "--out", files[-1]]
        assert main([*map(str, command), "--no-verify"]) == 0
    found = diff(*files)
    assert found["formats"] == ["gguf adapter"] * 2 and found["logits"] is None
    assert any("--base FILE" in note for note in found["notes"])
    assert all(tensor["relative_rms"] > 0 for tensor in found["tensors"])
    assert diff(*files, "--base", base_file(base))["logits"]["kl"] > 0
    assert diff(files[0], files[0], "--base", base_file(base), "--fail-on-difference")["same"]


# --- ONNX ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def directories(base: Path) -> dict[str, Path]:
    pytest.importorskip("onnxruntime_genai")
    made = {}
    for target in ("onnx-q4", "onnx-int8"):
        made[target] = base.parent / target
        assert main(["export", str(base), "--to", target, "--out", str(made[target]), "--no-verify"]) == 0
    return made


def test_two_onnx_directories(directories: dict[str, Path], diff: Callable[..., dict[str, Any]]) -> None:
    found = diff(directories["onnx-q4"], directories["onnx-int8"])
    by_name = {tensor["name"]: tensor for tensor in found["tensors"]}
    up = by_name["model.layers.0.mlp.up_proj.MatMul.weight"]
    assert (up["type_a"], up["type_b"]) == ("int4", "int8") and 0.01 < up["relative_rms"] < 0.2
    assert by_name["model.layers.0.input_layernorm.weight"]["equal"]
    assert found["formats"] == ["onnx", "onnx"] and found["logits"]["kl"] > 0 and found["template"] == "same"
    same = diff(directories["onnx-q4"], directories["onnx-q4"], "--fail-on-difference")
    assert same["same"] and same["tensors"]


def test_settings_of_onnx_directories(
    directories: dict[str, Path], tmp_path: Path, diff: Callable[..., dict[str, Any]]
) -> None:
    copy = Path(shutil.copytree(directories["onnx-q4"], tmp_path / "copy"))
    shutil.copy(f"{directories['onnx-q4']}.json", f"{copy}.json")
    settings = json.loads((copy / "genai_config.json").read_text())
    settings["search"]["temperature"] = 0.3
    (copy / "genai_config.json").write_text(json.dumps(settings))
    (copy / "chat_template.jinja").write_text("other")
    found = diff(directories["onnx-q4"], copy, "--no-logits")
    assert [change["name"] for change in found["metadata"]] == ["genai_config.json: search.temperature"]
    assert found["template"] == "different" and all(tensor["equal"] for tensor in found["tensors"])


def test_one_byte_of_an_onnx_directory(
    directories: dict[str, Path], tmp_path: Path, diff: Callable[..., dict[str, Any]]
) -> None:
    copy = Path(shutil.copytree(directories["onnx-int8"], tmp_path / "copy"))
    shutil.copy(f"{directories['onnx-int8']}.json", f"{copy}.json")
    content = bytearray((copy / "model.onnx.data").read_bytes())
    content[10] ^= 1
    (copy / "model.onnx.data").write_bytes(content)
    found = diff(directories["onnx-int8"], copy, "--no-logits")
    assert sum(not tensor["equal"] for tensor in found["tensors"]) == 1 and not found["same"]


def test_between_gguf_and_onnx_only_answers_are_compared(
    base: Path, directories: dict[str, Path], diff: Callable[..., dict[str, Any]]
) -> None:
    found = diff(base_file(base, "gguf-f16"), directories["onnx-int8"])
    assert found["tensors"] == [] and found["types"] == [] and found["template"] == "same"
    assert 0 < found["logits"]["kl"] < 0.01
    assert any("between GGUF and ONNX" in note for note in found["notes"])
