"""`edgeft export`: what it writes, what it says, and what it refuses."""

import fcntl
import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from edgeft.converters import gguf_types
from edgeft.converters.ggml import TYPES, Ggml
from edgeft.converters.gguf_mixtures import Model, more_bits
from edgeft.converters.gguf_types import Shape

from edgeft.artifact import manifest_path, read_manifest
from edgeft.cli.main import main
from edgeft.errors import MissingDependency, ModelError
from edgeft.models.ggml_library import ggml_library
from edgeft.run import Run, RunManifest

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers"),
]


@pytest.fixture(scope="session")
def shared_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model(tmp_path_factory.mktemp("shared") / "base", dtype="bfloat16")


@pytest.fixture
def base(shared_base: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    import shutil

    return Path(shutil.copytree(shared_base, tmp_path / "base"))


def export(*arguments: object) -> int:
    return main(["export", *map(str, arguments), "--no-verify"])


def metadata(file: Path, key: str) -> Any:
    from gguf import GGUFReader

    field = GGUFReader(file).get_field(key)
    return field.contents() if field else None


# --- What it writes -----------------------------------------------------------


def test_the_manifest_says_what_the_file_is(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "m.gguf"
    assert export(base, "--to", "gguf-q8_0", "--out", out, "--json") == 0
    shown, manifest = json.loads(capsys.readouterr().out), read_manifest(out)
    assert manifest is not None
    assert manifest.sha256 == shown["sha256"] == hashlib.sha256(out.read_bytes()).hexdigest()
    assert manifest.bytes == out.stat().st_size
    assert set(manifest.types) == {"F32", "Q8_0"}
    assert sum(manifest.types.values()) == manifest.parameters
    assert 8.5 < manifest.bits_per_weight < 8.6
    assert 258 in manifest.stop_token_ids
    assert manifest.base["reference"] == str(base)
    assert manifest.adapter is None


def test_the_default_name_is_the_models_and_the_targets(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert export(base, "--to", "gguf-q4_0") == 0
    assert (tmp_path / "base-q4_0.gguf").is_file()


def test_a_run_brings_base_adapter_and_template(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgeft.models import weights_digest

    run = write_run(tmp_path / "runs" / "demo", base, weights_digest(base))
    monkeypatch.chdir(tmp_path)
    assert export(run.path) == 0
    manifest = read_manifest(tmp_path / "demo-q4.gguf")
    assert manifest is not None
    assert (manifest.run, manifest.licence) == (str(run.path), "Apache-2.0")
    assert manifest.base["digest"] == weights_digest(base)
    assert manifest.adapter is not None
    assert manifest.adapter["path"] == str(run.path / "adapter")
    assert metadata(tmp_path / "demo-q4.gguf", "tokenizer.chat_template") == "trained with this"


def write_run(folder: Path, base: Path, digest: str) -> Run:
    tiny.write_adapter(base, folder / "adapter", target_modules=["q_proj"])
    (folder / "config.toml").write_text("")
    run = Run(folder)
    run.write_manifest(
        RunManifest(
            method="qlora",
            base={"reference": str(base), "path": str(base), "digest": digest},
            data={},
            chat_template="trained with this",
            seed=0,
            versions={},
            licence="Apache-2.0",
        )
    )
    return run


def test_a_base_that_changed_since_training_is_refused(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "demo", base, "0" * 64)
    assert export(run.path, "--out", tmp_path / "x.gguf") == 1
    assert "has changed since" in capsys.readouterr().err
    assert not (tmp_path / "x.gguf").exists()


def test_an_adapter_finds_its_base(base: Path, tmp_path: Path) -> None:
    tiny.write_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    files = [tmp_path / "a.gguf", tmp_path / "b.gguf"]
    assert export(tmp_path / "adapter", "--to", "gguf-q8_0", "--out", files[0]) == 0
    assert export(base, "--adapter", tmp_path / "adapter", "--to", "gguf-q8_0", "--out", files[1]) == 0
    assert files[0].read_bytes() == files[1].read_bytes()


def test_threads_and_shards_do_not_change_a_byte(base: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(base, dtype="auto").save_pretrained(tmp_path / "parts", max_shard_size="30KB")
    for file in base.iterdir():
        if file.name not in ("model.safetensors", "model.safetensors.index.json"):
            (tmp_path / "parts" / file.name).write_bytes(file.read_bytes())
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 2
    # llama.cpp's name of a model is its folder's.
    (tmp_path / "again").mkdir()
    (tmp_path / "parts").rename(tmp_path / "again" / "base")
    for name, source, threads in (("a", base, 1), ("b", base, 4), ("c", tmp_path / "again" / "base", 2)):
        assert export(source, "--threads", threads, "--out", tmp_path / f"{name}.gguf") == 0
    assert (
        (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes() == (tmp_path / "c.gguf").read_bytes()
    )


def test_rounding_to_bf16_is_merging_into_a_bf16_checkpoint(base: Path, tmp_path: Path) -> None:
    import reference
    import torch

    model = tiny.write_adapter(base, tmp_path / "adapter", target_modules=["v_proj"])
    merged = model.merge_and_unload().model.layers[1].self_attn.v_proj.weight.to(torch.bfloat16)
    arguments = ("--adapter", tmp_path / "adapter", "--to", "gguf-bf16", "--out", tmp_path / "m.gguf")
    assert export(base, *arguments, "--round", "bf16") == 0
    found = reference.read_gguf(tmp_path / "m.gguf").tensors["blk.1.attn_v.weight"]
    different = np.frombuffer(found.data, np.int16) != merged.view(torch.int16).numpy().reshape(-1)
    assert different.mean() < 0.001


def test_a_dry_run_writes_nothing(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "x.gguf"
    assert export(base, "--to", "gguf-q4_k_m", "--out", out, "--dry-run") == 0
    shown = capsys.readouterr()
    assert re.search(r"blk\.\*\.ffn_gate\.weight +96x64 +Q5_0 .*64 columns do not fill blocks of 256", shown.out)
    assert "Q4_K_M is a label" in shown.err
    assert export(base, "--to", "gguf-q4_k_m", "--out", out, "--dry-run", "--json") == 0
    planned = json.loads(capsys.readouterr().out)
    assert not out.exists()
    assert export(base, "--to", "gguf-q4_k_m", "--out", out) == 0
    assert out.stat().st_size == planned["bytes"]
    assert planned["seconds"] > 0


def test_a_head_that_config_ties_is_left_out(base: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(base / "model.safetensors")
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"] + 1}, base / "model.safetensors")
    assert export(base, "--out", tmp_path / "x.gguf") == 0
    manifest = read_manifest(tmp_path / "x.gguf")
    assert manifest is not None
    assert any("lm_head.weight is left out" in note for note in manifest.notes)


def test_neither_torch_nor_transformers_is_imported(base: Path, tmp_path: Path) -> None:
    tiny.write_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    code = f"""
import sys
from edgeft.cli.main import main
arguments = ["export", {str(base)!r}, "--adapter", {str(tmp_path / "adapter")!r}, "--no-verify"]
assert main([*arguments, "--out", {str(tmp_path / "x.gguf")!r}]) == 0
heavy = {{"torch", "transformers", "peft", "tokenizers", "llama_cpp", "xllamacpp"}} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_tokens_that_an_adapter_added_come_with_its_tokenizer(base: Path, tmp_path: Path) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.resize_token_embeddings(tiny.TOKENS + 1, mean_resizing=False)
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "adapter" / name).write_bytes((base / name).read_bytes())
    file = tmp_path / "adapter" / "tokenizer.json"
    document = json.loads(file.read_text())
    document["added_tokens"].append({**document["added_tokens"][-1], "id": tiny.TOKENS, "content": "<tool>"})
    file.write_text(json.dumps(document))
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": [258, 259]}))
    assert export(base, "--adapter", tmp_path / "adapter", "--out", tmp_path / "x.gguf") == 0
    manifest = read_manifest(tmp_path / "x.gguf")
    assert manifest is not None
    assert {258, 259} <= set(manifest.stop_token_ids)
    assert metadata(tmp_path / "x.gguf", "tokenizer.ggml.tokens")[tiny.TOKENS] == "<tool>"
    assert 259 in (metadata(tmp_path / "x.gguf", f"tokenizer.ggml.{role}_token_id") for role in ("eos", "eot", "eom"))


# --- Type rules ---------------------------------------------------------------


@pytest.mark.parametrize(("layers", "more"), [(16, 8), (22, 10), (24, 12), (28, 14), (32, 16), (36, 18)])
def test_half_of_the_layers_get_more_bits(layers: int, more: int) -> None:
    assert sum(more_bits(layer, layers) for layer in range(layers)) == more


def shapes(hidden: int, *, tied: bool = True) -> list[Shape]:
    names = ["token_embd.weight", "blk.0.attn_v.weight", "blk.0.ffn_up.weight", "blk.0.attn_norm.weight"]
    found = [Shape(name, (512,) if "norm" in name else (512, hidden)) for name in names]
    return found if tied else [Shape("output.weight", (512, hidden)), *found]


@pytest.mark.parametrize(
    ("mixture", "hidden", "types"),
    [
        ("Q4_K_M", 512, ["Q6_K", "Q6_K", "Q4_K", "F32"]),
        ("Q4_K_M", 96, ["Q8_0", "Q8_0", "Q5_0", "F32"]),
        ("Q4_K_M", 48, ["F16", "F16", "F16", "F32"]),
        ("Q4_0", 512, ["Q6_K", "Q4_0", "Q4_0", "F32"]),
        ("Q4_0", 96, ["Q8_0", "Q4_0", "Q4_0", "F32"]),
        ("Q8_0", 512, ["Q8_0", "Q8_0", "Q8_0", "F32"]),
    ],
)
def test_types_of_llama_quantize(mixture: str, hidden: int, types: list[str]) -> None:
    assert [choice.type.name for choice in gguf_types.assign(mixture, shapes(hidden), Model(1, 1))] == types


def test_an_untied_head_takes_the_bits_from_the_embedding() -> None:
    chosen = [choice.type.name for choice in gguf_types.assign("Q4_K_M", shapes(512, tied=False), Model(1, 1))]
    assert chosen[:2] == ["Q6_K", "Q4_K"]


# --- The quantizer's library --------------------------------------------------


def test_the_installed_library_is_the_one_expected() -> None:
    assert Ggml(ggml_library()).path.is_file()


def test_another_library_is_refused() -> None:
    import math

    with pytest.raises(MissingDependency, match="lacks ggml_quantize_chunk"):
        Ggml(Path(math.__file__))


def test_a_missing_library_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgeft.models.ggml_library._LIBRARIES", (("no_such_binding", "", ("*.so",)),))
    with pytest.raises(MissingDependency) as caught:
        ggml_library()
    assert caught.value.hint == "pip install 'edgeft[export]'"


@pytest.mark.parametrize("kind", TYPES)
def test_quantized_values_are_close(kind: str) -> None:
    from gguf import GGMLQuantizationType, dequantize

    weights = np.random.default_rng(0).standard_normal((4, 512)).astype(np.float32)
    stored = Ggml(ggml_library()).quantize(TYPES[kind], weights, np.ones(512, np.float32))
    assert stored.shape == (4, TYPES[kind].row_bytes(512))
    dtype = {"F32": np.float32, "F16": np.float16}.get(kind)
    back = stored.view(dtype).astype(np.float32) if dtype else dequantize(stored, GGMLQuantizationType[kind])
    bits = {"F32": 23, "F16": 10, "BF16": 7}.get(kind, TYPES[kind].bits - 1.5)
    assert np.abs(back - weights).mean() < 2**-bits


def test_rows_that_do_not_fill_blocks_never_reach_ggml() -> None:
    with pytest.raises(ModelError, match="48 columns"):
        Ggml(ggml_library()).quantize(TYPES["Q4_0"], np.zeros((2, 48), np.float32))


# --- Bad input ----------------------------------------------------------------


def refused(capsys: pytest.CaptureFixture[str], out: Path, *arguments: object) -> str:
    """Exports, expects failure without a trace on disk, and returns what was said."""
    code = export(*arguments, "--out", out)
    assert code in (1, 2)
    assert not out.exists()
    assert not manifest_path(out).exists()
    assert list(out.parent.glob(".*.tmp")) == []
    return capsys.readouterr().err


def test_truncated_weights(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = base / "model.safetensors"
    os.truncate(file, file.stat().st_size - 10)
    assert re.search(r"model\.safetensors is cut short: tensor model\.\S+ ends", refused(capsys, tmp_path / "x", base))


@pytest.mark.parametrize("size", [0, 4, 100])
def test_weights_cut_inside_their_header(
    size: int, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.truncate(base / "model.safetensors", size)
    assert "model.safetensors" in refused(capsys, tmp_path / "x", base)


def test_a_missing_shard(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index = {"weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors"}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model-00002-of-00002.safetensors is missing" in refused(capsys, tmp_path / "x", base)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite(
    value: float, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.1.self_attn.q_proj.weight"][37, 5] = value
    save_file(tensors, base / "model.safetensors")
    said = refused(capsys, tmp_path / "x", base)
    assert "tensor model.layers.1.self_attn.q_proj.weight is NaN or infinite in row 37" in said


def test_a_weight_too_large_for_the_type(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = 1e20
    save_file(tensors, base / "model.safetensors")
    for target in ("gguf-q4_0", "gguf-f16"):
        said = refused(capsys, tmp_path / "x", base, "--to", target)
        assert re.search(r"blk\.0\.ffn_up\.weight, rows 0 to \d+: values too large", said)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel cannot be exported.*These can: LlamaForCausalLM"),
        ({"hidden_size": 128}, r"model\.embed_tokens\.weight has shape \(260, 64\), config.json says \(260, 128\)"),
        ({"num_hidden_layers": 3}, "lacks tensor model.layers.2"),
        ({"num_hidden_layers": 1}, "has no tensor model.layers.1"),
        ({"quantization_config": {"bits": 4}}, "the base is quantized"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"tie_word_embeddings": False}, "lm_head.weight"),
    ],
)
def test_models_that_cannot_be_exported(
    change: dict[str, Any], message: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = base / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    assert re.search(message, refused(capsys, tmp_path / "x", base), re.DOTALL)


def test_a_missing_tokenizer(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (base / "tokenizer.json").unlink()
    assert "tokenizer" in refused(capsys, tmp_path / "x", base)


def test_a_checkpoint_of_integers(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(96, 64, dtype=torch.int8)
    save_file(tensors, base / "model.safetensors")
    assert "up_proj.weight is stored as I8" in refused(capsys, tmp_path / "x", base)


def test_usage_errors(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        ((base, "--to", "zip"), "no export target 'zip'"),
        ((base, "--to", "gguf-q3"), "Near it: gguf-q3_k_s"),
        ((tmp_path / "nothing",), "no"),
    ):
        assert export(*arguments, "--out", tmp_path / "x") == 2
        assert message in capsys.readouterr().err
    assert export(base, "--out", tmp_path) == 2


def test_no_room_on_the_disk(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 1000, 1000))
    assert "needs" in refused(capsys, tmp_path / "x.gguf", base)


def test_a_write_that_fails_half_way_leaves_nothing(base: Path, tmp_path: Path) -> None:
    code = f"""
import resource, sys
from edgeft.cli.main import main
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
sys.exit(main(["export", {str(base)!r}, "--no-verify", "--out", {str(tmp_path / "x.gguf")!r}]))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "cannot write" in result.stderr
    assert "Traceback" not in result.stderr
    assert [file.name for file in tmp_path.iterdir() if "x.gguf" in file.name] == []


def test_a_folder_that_cannot_be_written(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("in the way")
    assert export(base, "--out", tmp_path / "file" / "x.gguf") == 1
    assert "cannot write" in capsys.readouterr().err
    assert export(base, "--out", "/proc/x.gguf") == 1
    assert "cannot write" in capsys.readouterr().err


# --- What a kill leaves -------------------------------------------------------


def test_leftovers_of_a_killed_export_are_removed(base: Path, tmp_path: Path) -> None:
    dead, alive = tmp_path / ".x.gguf.abc.tmp", tmp_path / ".x.gguf.def.tmp"
    dead.write_bytes(b"half")
    with alive.open("wb") as running:
        fcntl.flock(running, fcntl.LOCK_EX)
        assert export(base, "--out", tmp_path / "x.gguf") == 0
        assert (dead.exists(), alive.exists()) == (False, True)


def test_an_old_manifest_does_not_outlive_its_file(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.gguf"
    for target in ("gguf-q8_0", "gguf-q4_0"):
        assert export(base, "--to", target, "--out", out) == 0
        manifest = read_manifest(out)
        assert manifest is not None
        assert manifest.target == target


# --- gguf-q4 ------------------------------------------------------------------


def types_in(file: Path) -> set[str]:
    manifest = read_manifest(file)
    assert manifest is not None
    return set(manifest.types)


def test_q4_is_q4_k_m_where_blocks_of_256_fit(tmp_path: Path) -> None:
    base = tiny.write_model(tmp_path / "wide", dtype="bfloat16", hidden_size=256, intermediate_size=512, head_dim=64)
    for target in ("gguf-q4", "gguf-q4_k_m"):
        assert export(base, "--to", target, "--out", tmp_path / f"{target}.gguf") == 0
    assert (tmp_path / "gguf-q4.gguf").read_bytes() == (tmp_path / "gguf-q4_k_m.gguf").read_bytes()


def test_q4_of_narrow_rows_is_smaller_than_q4_k_m(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for target in ("gguf-q4", "gguf-q4_k_m"):
        assert export(base, "--to", target, "--out", tmp_path / f"{target}.gguf") == 0
    assert "which would really take 6." in capsys.readouterr().err
    assert (tmp_path / "gguf-q4.gguf").stat().st_size < (tmp_path / "gguf-q4_k_m.gguf").stat().st_size
    assert types_in(tmp_path / "gguf-q4.gguf") <= {"F32", "Q4_K", "Q5_0", "Q5_1", "Q6_K"}


def test_q4_stays_off_the_grid_of_weights_that_were_in_a_q4_1_file(base: Path, tmp_path: Path) -> None:
    import torch
    from gguf import GGMLQuantizationType, dequantize, quantize
    from safetensors.torch import load_file, save_file

    q4_1 = GGMLQuantizationType.Q4_1
    tensors = load_file(base / "model.safetensors")
    for name, value in tensors.items():
        if "proj" in name:
            tensors[name] = torch.from_numpy(dequantize(quantize(value.float().numpy(), q4_1), q4_1)).bfloat16()
    save_file(tensors, base / "model.safetensors")
    assert export(base, "--out", tmp_path / "x.gguf") == 0
    # On that grid a small merged delta would be rounded away.
    assert "Q4_1" not in types_in(tmp_path / "x.gguf")
