"""Thousands of damaged files: every reader refuses them with a message, in bounded time and memory, or reads them."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import fuzz
import numpy as np
import pytest
import tiny
import tiny_gguf
from edgeft.converters import importance
from edgeft.converters.safetensors_rows import index, read_header

from edgeft import plugins
from edgeft.cli.main import main
from edgeft.errors import ModelError
from edgeft.models.gguf_import import text_side

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are Linux's")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One intact file for every reader, and what else it reads."""
    folder = tmp_path_factory.mktemp("intact")
    base = tiny.write_loadable(folder / "peft" / "base")
    tiny.write_adapter(base, folder / "peft" / "adapter", target_modules=["q_proj", "down_proj"])
    assert main(["export", str(base), "--to", "gguf-q8_0", "--out", str(folder / "model.gguf"), "--no-verify"]) == 0
    small, factors = tiny_gguf.write_random(folder / "random.gguf"), np.ones((64, 4), np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEFT_HOME", str(folder / "home"))
        side = text_side(folder / "model.gguf")
    return {
        "random": small,
        "model": folder / "model.gguf",
        "imatrix": write_matrix(folder / "imatrix.gguf"),
        "adapter": tiny_gguf.write_adapter(
            folder / "adapter.gguf", "blk.0.attn_q.weight", factors.T, factors, alpha=8.0
        ),
        "side": side,
        "base": base,
        "peft": folder / "peft" / "adapter",
    }


def write_matrix(file: Path) -> Path:
    chance = np.random.default_rng(0)

    def positive(*shape: int) -> np.ndarray:
        return chance.random(shape, np.float32) + np.float32(0.01)

    names = [f"blk.{layer}.{name}.weight" for layer in range(2) for name in ("attn_q", "ffn_up")]
    uses = {name: importance.Use(positive(1, 64), np.array([50], np.float32), positive(96)) for name in names}
    importance.write_importance(file, uses, ["text"], 1, 50, (positive(260), positive(64)))
    return file


def damage(reader: str, count: int, file: Path, other: Path | None = None, seed: int = 0) -> dict[str, Any]:
    """What the reader made of `count` damaged copies."""
    command = [sys.executable, str(Path(fuzz.__file__)), reader, str(count), str(seed), str(file), str(other or file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stderr[-2000:]
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert result["failures"] == []
    assert result["accepted"] + result["refused"] == count
    return result


@pytest.mark.parametrize(
    ("reader", "file", "other", "count"),
    [
        ("header", "random", None, 3000),
        ("describe", "random", None, 1500),
        ("imatrix", "imatrix", None, 3000),
        ("adapter", "adapter", "random", 3000),
        ("adapters-base", "random", "adapter", 1000),
        ("packed", "model", "side", 500),
        ("text-side", "model", None, 150),
        ("import", "model", None, 100),
    ],
)
def test_no_damaged_gguf_gets_through(
    reader: str, file: str, other: str | None, count: int, files: dict[str, Path]
) -> None:
    result = damage(reader, count, files[file], files[other] if other else None)
    assert result["refused"] > count / 2


def test_no_damaged_weights_get_through(files: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(files["base"], tmp_path / "base")
    damage("weights", 1000, files["base"] / "model.safetensors", tmp_path / "base")


def test_no_damaged_adapter_gets_through(files: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(files["peft"].parent, tmp_path / "peft")
    damage("peft", 1000, files["peft"] / "adapter_model.safetensors", tmp_path / "peft" / "adapter")


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "adapter_config.json"]
)
def test_no_damaged_settings_get_through(name: str, files: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(files["peft"].parent, tmp_path / "peft")
    folder = "adapter" if name.startswith("adapter") else "base"
    damage("settings", 400, files["peft"].parent / folder / name, tmp_path / "peft" / folder)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 6))
@pytest.mark.parametrize("reader", ["header", "imatrix", "adapter", "packed"])
def test_many_more_seeds(reader: str, seed: int, files: dict[str, Path]) -> None:
    file, other = {"packed": ("model", "side"), "adapter": ("adapter", "random")}.get(reader, ("random", "random"))
    damage(reader, 5000, files["imatrix"] if reader == "imatrix" else files[file], files[other], seed)


# --- A GGUF by hand -------------------------------------------------------------------


def gguf(*, keys: bytes = b"", count: int = 0, tensors: bytes = b"", tensor_count: int = 0, data: bytes = b"") -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", 3, tensor_count, count) + keys + tensors
    return head + bytes(-len(head) % 32) + data


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def entry(name: bytes, offset: int, shape: tuple[int, ...] = (8,), kind: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


GGUF = {
    "begins inside": gguf(tensors=entry(b"a", 0) + entry(b"b", 0), tensor_count=2, data=bytes(64)),
    "not at whole 32s": gguf(tensors=entry(b"a", 4), tensor_count=1, data=bytes(64)),
    "two tensors named 'a'": gguf(tensors=entry(b"a", 0) + entry(b"a", 32), tensor_count=2, data=bytes(64)),
    "two keys named 'k'": gguf(keys=2 * (text(b"k") + struct.pack("<IB", 7, 1)), count=2),
    "cut short": gguf(tensors=entry(b"a", (1 << 63) - 32), tensor_count=1, data=bytes(64)),
    "is empty": gguf(tensors=entry(b"a", 0, (0, 1 << 62)), tensor_count=1, data=bytes(64)),
    "cut short: tensor": gguf(tensors=entry(b"a", 0, (1 << 62, 1 << 62, 4)), tensor_count=1, data=bytes(64)),
    "has 70 bytes": gguf(tensors=entry(b"a" * 70, 0), tensor_count=1, data=bytes(64)),
    "a list of": gguf(keys=text(b"k") + struct.pack("<IIQ", 9, 8, 1 << 60), count=1),
    "an array of type 9": gguf(keys=text(b"k") + struct.pack("<IIQ", 9, 9, 1), count=1),
    "power of two": gguf(keys=text(b"general.alignment") + struct.pack("<II", 4, 48), count=1),
    "unknown type 99": gguf(tensors=entry(b"a", 0, kind=99), tensor_count=1, data=bytes(64)),
}


@pytest.mark.parametrize("reason", GGUF)
def test_what_is_wrong_is_named(reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "bad.gguf"
    file.write_bytes(GGUF[reason])
    assert main(["models", "show", str(file)]) == 1
    said = capsys.readouterr().err
    assert str(file) in said and reason in said and "Traceback" not in said


def test_a_large_file_of_nothing_is_refused_at_once(tmp_path: Path) -> None:
    """Sixty gigabytes (that take no space), whose header says they are one text, or a list of billions of texts."""
    file = tmp_path / "large.gguf"
    for keys in (text(b"k") + struct.pack("<IQ", 8, 1 << 35), text(b"k") + struct.pack("<IIQ", 9, 8, 1 << 32)):
        file.write_bytes(gguf(keys=keys, count=1))
        os.truncate(file, 60 << 30)
        result = subprocess.run(
            [sys.executable, "-c", LIMITED, str(file)], capture_output=True, text=True, timeout=60, check=True
        )
        assert result.stdout.startswith("refused"), result.stdout


LIMITED = """
import resource, sys
from pathlib import Path
from edgeft.errors import ModelError
from edgeft.models.gguf_header import read_header
resource.setrlimit(resource.RLIMIT_DATA, (256 << 20, 256 << 20))
try:
    read_header(Path(sys.argv[1]))
except ModelError as error:
    print("refused", error.message)
"""


def test_a_model_in_the_place_of_an_importance_matrix_is_not_read(tmp_path: Path) -> None:
    file = tiny_gguf.write_random(tmp_path / "model.gguf")
    with pytest.raises(ModelError, match="is not an importance matrix"):
        importance.read_importance(file)


# --- Before llama.cpp sees a file ---------------------------------------------------------


def number(value: int) -> bytes:
    return struct.pack("<II", 4, value)


def texts(values: list[str]) -> bytes:
    return struct.pack("<IIQ", 9, 8, len(values)) + b"".join(text(value.encode()) for value in values)


ENDS_LLAMA_CPP = {
    "it says it has 0 layers": ("llama.block_count", number(0)),
    "it says it has 513 layers": ("llama.block_count", number(513)),
    "more layers for prediction": ("llama.nextn_predict_layers", number(3)),
    "uses 0 of 8 experts": ("llama.expert_count", number(8)),
    "uses 2 of 0 experts": ("llama.expert_used_count", number(2)),
    "has 4294967295 experts": ("llama.expert_count", number((1 << 32) - 1)),
    "layer_norm_rms_epsilon is -1.0": ("llama.attention.layer_norm_rms_epsilon", struct.pack("<If", 6, -1.0)),
    "layer_norm_rms_epsilon is nan": ("llama.attention.layer_norm_rms_epsilon", struct.pack("<If", 6, float("nan"))),
    "rope.scaling.type is 'x'": ("llama.rope.scaling.type", struct.pack("<I", 8) + text(b"x")),
    "token 'a' is in its vocabulary twice": ("tokenizer.ggml.tokens", texts(["a"] * 261)),
    "no token for the byte": ("tokenizer.ggml.model", struct.pack("<I", 8) + text(b"llama")),
}
"""Each of these ends a process that calls llama.cpp, with SIGABRT."""


@pytest.mark.parametrize("runtime", ["xllamacpp", "llama-cpp-python"])
@pytest.mark.parametrize("reason", ENDS_LLAMA_CPP)
def test_what_would_end_llama_cpp_is_refused(
    reason: str, runtime: str, files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if plugins.load("runtimes", runtime).find_library() is None:
        pytest.skip(f"{runtime} is not installed")
    file = tmp_path / "bad.gguf"
    file.write_bytes(fuzz.with_key(files["random"].read_bytes(), *ENDS_LLAMA_CPP[reason]))
    assert main(["run", "--runtime", runtime, str(file), "hi"]) == 1
    said = capsys.readouterr().err
    assert str(file) in said and reason in said


LOAD = """
import sys
from pathlib import Path
from edgeft import plugins
from edgeft.artifact import Artifact
from edgeft.errors import EdgeftError
from edgeft.plugins import AdapterScale
runtime, kind, base = plugins.load("runtimes", sys.argv[1]), sys.argv[2], Path(sys.argv[3])
options = plugins.LoadOptions(context=64, threads=1, threads_batch=1)
for file in sorted(Path(sys.argv[4]).glob("*.gguf")):
    print(file.name, flush=True)
    try:
        with runtime.load(Artifact(file if kind == "model" else base), options) as session:
            if kind == "adapter":
                session.set_adapters([AdapterScale(file)])
            session.score(session.tokenize("hello 12 the", special=True))
    except EdgeftError:
        pass
print("all", flush=True)
"""


@pytest.mark.parametrize("runtime", ["xllamacpp", "llama-cpp-python"])
@pytest.mark.parametrize("kind", ["model", "adapter"])
def test_no_damaged_file_ends_llama_cpp(kind: str, runtime: str, files: dict[str, Path], tmp_path: Path) -> None:
    if plugins.load("runtimes", runtime).find_library() is None:
        pytest.skip(f"{runtime} is not installed")
    data = files["model" if kind == "model" else "adapter"].read_bytes()
    done = {}
    for at, damaged, what in fuzz.attempts(data, fuzz.damage_gguf, 600, seed=0):
        (tmp_path / f"{at:04}.gguf").write_bytes(damaged)
        done[f"{at:04}.gguf"] = what
    command = [sys.executable, "-c", LOAD, runtime, kind, str(files["random"]), str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, errors="replace")
    last = result.stdout.splitlines()[-1] if result.stdout else ""
    assert last == "all", f"{last}: {done.get(last)}: {result.returncode} {result.stderr[-2000:]}"


# --- Safetensors by hand ----------------------------------------------------------------


def safetensors(header: str, data: int = 64) -> bytes:
    return struct.pack("<Q", len(header)) + header.encode() + bytes(data)


def stored(dtype: str = "F32", shape: str = "[4]", offsets: str = "[0, 16]") -> str:
    return f'{{"dtype": "{dtype}", "shape": {shape}, "data_offsets": {offsets}}}'


SAFETENSORS = {
    "tensor b begins inside tensor a": f'{{"a": {stored()}, "b": {stored(offsets="[8, 24]")}}}',
    "'a' is there twice": f'{{"a": {stored()}, "a": {stored(offsets="[16, 32]")}}}',
    "tensor a ends at byte": f'{{"a": {stored(shape="[4000]", offsets="[0, 16000]")}}}',
    "has 16 bytes, not 20": f'{{"a": {stored(shape="[5]")}}}',
    "-4 where a whole number belongs": f'{{"a": {stored(shape="[-4, -1]")}}}',
    "-16 where a whole number belongs": f'{{"a": {stored(offsets="[-16, 0]")}}}',
    "makes no sense": f'{{"a": {stored(offsets="[16, 0]")}}}',
    "1e+300 where a whole number belongs": f'{{"a": {stored(shape="[1e300]")}}}',
    "nested too deeply": '{"a":' * 100_000,
    "cut short inside its header": "",
}


@pytest.mark.parametrize("reason", SAFETENSORS)
def test_what_is_wrong_with_weights_is_named(reason: str, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    raw = safetensors(SAFETENSORS[reason])
    file.write_bytes(raw if SAFETENSORS[reason] else struct.pack("<Q", 1 << 63) + raw)
    with pytest.raises(ModelError) as caught:
        read_header(file)
    assert str(file) in caught.value.message and reason in caught.value.message


@pytest.mark.parametrize("kind", ["I8", "F64", "F8_E4M3", "NONSENSE"])
def test_weights_of_another_type_are_named(
    kind: str, files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(files["base"], tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    raw = file.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    header["model.norm.weight"]["dtype"] = kind
    changed = json.dumps(header).encode()
    file.write_bytes(len(changed).to_bytes(8, "little") + changed + raw[8 + size :])
    assert main(["export", str(tmp_path / "base"), "--out", str(tmp_path / "x.gguf"), "--no-verify"]) == 1
    assert f"tensor model.norm.weight is stored as {kind}" in capsys.readouterr().err


@pytest.mark.parametrize("part", ["../elsewhere.safetensors", "/etc/passwd", "a/b.safetensors", "", 5])
def test_an_index_names_files_beside_it_only(part: Any, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": part}}))
    with pytest.raises(ModelError, match=r"index\.json"):
        index(tmp_path)


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    for name in ("model-1.safetensors", "model-2.safetensors"):
        (tmp_path / name).write_bytes(safetensors(f'{{"a": {stored()}}}'))
    with pytest.raises(ModelError, match="both have tensor a"):
        index(tmp_path)
