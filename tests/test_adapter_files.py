"""An adapter as a GGUF file computes what PEFT computes, on both bindings of llama.cpp, and on its own base only."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import reference
import tiny
from edgeft.converters import ggml
from numpy.typing import NDArray

from edgeft import plugins
from edgeft.artifact import Artifact, read_manifest
from edgeft.cli.main import main
from edgeft.errors import ModelError, UnsupportedModel
from edgeft.plugins import AdapterScale, ConvertOptions, LoadOptions, Plan, Session, Source
from edgeft.progress import Silent

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOKENS = [1, 50, 17, 200, 33, 33, 90, 255, 4]

Floats = NDArray[np.float32]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny models gain nothing from threads, and two thread pools that wait for each other lose much."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["xllamacpp", "llama-cpp-python"])
def load(request: pytest.FixtureRequest) -> Callable[[Path], Session]:
    runtime = plugins.load("runtimes", request.param)

    def opened(path: Path) -> Session:
        session: Session = runtime.load(Artifact(path), LoadOptions(context=64, threads=1, threads_batch=1))
        request.addfinalizer(session.close)
        return session

    return opened


def converter() -> Any:
    return plugins.load("converters", "gguf")


def base_file(base: Path, target: str = "gguf-f16") -> Path:
    """The base alone as a GGUF."""
    out = base.parent / f"{base.name}-{target}.gguf"
    converter().convert(converter().plan(Source(base), target, ConvertOptions(out)), Silent())
    return out


def f32_file(base: Path) -> Path:
    """The base with all its bits, so that nothing but the adapter can differ."""
    f16 = ggml.TYPES["F32"]
    from edgeft.converters import gguf_plan, gguf_types

    out = base.parent / f"{base.name}-f32.gguf"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf_types, "assign", lambda name, shapes, *_, **__: [gguf_types.Choice(f16) for _ in shapes])
        plan = gguf_plan.make_plan(Source(base), "gguf-f16", "F16", ConvertOptions(out), ggml.load())
    converter().convert(plan, Silent())
    return out


def plan(base: Path, adapter: Path, target: str = "gguf-lora") -> Plan:
    made: Plan = converter().plan(Source(base, adapter), target, ConvertOptions(adapter.with_suffix(".gguf")))
    return made


def adapter_file(base: Path, adapter: Path, target: str = "gguf-lora") -> Path:
    path: Path = converter().convert(plan(base, adapter, target), Silent()).path
    return path


def logprobs(model: Any) -> Floats:
    import torch

    with torch.no_grad():
        logits = model(torch.tensor([TOKENS])).logits[0].float()
    values: Floats = torch.log_softmax(logits, -1).numpy()
    return values


CASES: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": ALL_LINEAR},
    "some layers": {"target_modules": ["q_proj", "o_proj"], "layers_to_transform": [1]},
    "rank-stabilized": {"target_modules": ALL_LINEAR, "use_rslora": True},
    "patterns": {
        "target_modules": ALL_LINEAR,
        "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 8},
        "alpha_pattern": {"down_proj": 8000, r".*\.0\.self_attn\.k_proj": 500},
    },
    "rank-stabilized patterns": {
        "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {"q_proj": 9},
        "use_rslora": True,
    },
    "alpha 0 somewhere": {"target_modules": ["o_proj", "v_proj"], "alpha_pattern": {"v_proj": 0}},
    "alpha 0": {"target_modules": ["q_proj", "v_proj"], "lora_alpha": 0},
    "embedding and head": {"target_modules": ["embed_tokens", "lm_head", "v_proj"]},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_the_file_computes_what_peft_computes(
    case: str, kind: str, load: Callable[[Path], Session], tmp_path: Path
) -> None:
    base = tiny.write_loadable(tmp_path / "base", kind, tie_word_embeddings=False)
    # A large scale: a random adapter on a random model's attention does little.
    model = tiny.write_adapter(base, tmp_path / "adapter", **{"lora_alpha": 3000, **CASES[case]})
    session = load(f32_file(base))
    plain = session.score(TOKENS)
    session.set_adapters([AdapterScale(adapter_file(base, tmp_path / "adapter"))])
    adapted = session.score(TOKENS)
    effect = np.abs(adapted - plain).max()
    assert effect > 0.02 or case == "alpha 0"
    # llama.cpp keeps keys and values in 16 bits: what is left is far below what any adapter does.
    np.testing.assert_allclose(adapted, logprobs(model), atol=max(0.01 * effect, 1e-3))


def test_one_scale_for_all_leaves_b_as_it_is(tmp_path: Path) -> None:
    """Then the file is what llama.cpp's own converter writes, with an alpha that also makes rsLoRA right."""
    base = tiny.write_loadable(tmp_path / "base")
    tiny.write_adapter(base, tmp_path / "adapter", target_modules=["v_proj"], lora_alpha=6, use_rslora=True)
    reader = gguf.GGUFReader(adapter_file(base, tmp_path / "adapter"))
    # alpha / rank must be 6 / sqrt(4)
    assert float(reader.fields["adapter.lora.alpha"].contents()) == pytest.approx(12)
    assert not any("factor" in tensor.note for tensor in plan(base, tmp_path / "adapter").tensors)


def test_what_one_alpha_cannot_say_is_in_the_plan(tmp_path: Path) -> None:
    base = tiny.write_loadable(tmp_path / "base")
    tiny.write_adapter(base, tmp_path / "adapter", target_modules=["v_proj", "o_proj"], alpha_pattern={"o_proj": 18})
    noted = {tensor.name for tensor in plan(base, tmp_path / "adapter").tensors if tensor.note}
    assert noted in (
        {f"blk.{layer}.attn_output.weight.lora_b" for layer in range(2)},
        {f"blk.{layer}.attn_v.weight.lora_b" for layer in range(2)},
    )


def test_half_the_size_is_nearly_as_exact(load: Callable[[Path], Session], tmp_path: Path) -> None:
    base = tiny.write_loadable(tmp_path / "base")
    model = tiny.write_adapter(base, tmp_path / "adapter", target_modules=ALL_LINEAR)
    file = adapter_file(base, tmp_path / "adapter", "gguf-lora-f16")
    session = load(f32_file(base))
    session.set_adapters([AdapterScale(file)])
    np.testing.assert_allclose(session.score(TOKENS), logprobs(model), atol=5e-3)
    manifest = read_manifest(file)
    assert manifest is not None and (manifest.format, set(manifest.types)) == ("adapter", {"F16"})


def test_several_at_once_each_with_its_scale(load: Callable[[Path], Session], tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = tiny.write_loadable(tmp_path / "base")
    for name, layers in (("one", ["v_proj", "o_proj"]), ("two", ["o_proj", "up_proj"])):
        tiny.write_adapter(base, tmp_path / name, seed=len(layers[1]), target_modules=layers, lora_alpha=200)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(tmp_path / "one"), "one")
    model.load_adapter(str(tmp_path / "two"), "two")
    model.add_weighted_adapter(["one", "two"], [0.5, -1.5], "both", combination_type="cat")
    model.set_adapter("both")
    files = [adapter_file(base, tmp_path / name) for name in ("one", "two")]
    session = load(f32_file(base))
    session.set_adapters([AdapterScale(files[0], 0.5), AdapterScale(files[1], -1.5)])
    together = session.score(TOKENS)
    np.testing.assert_allclose(together, logprobs(model), atol=3e-3)
    session.set_adapters([AdapterScale(files[1], -1.0), AdapterScale(files[0], 0.5), AdapterScale(files[1], -0.5)])
    np.testing.assert_allclose(session.score(TOKENS), together, atol=1e-4)


# --- What such a file cannot hold ---------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_modules": ["q_proj"], "use_dora": True}, "magnitudes of DoRA"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["norm"]}, "stored as a whole"),
        ({"target_modules": ["q_proj"], "trainable_token_indices": [5, 2]}, "trained token rows"),
        ({"target_modules": ["embed_tokens"]}, "embedding and head of the base are one tensor"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "stored as a whole"),
    ],
)
def test_what_only_a_merge_can_hold_is_refused(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    base = tiny.write_loadable(tmp_path / "base")
    tiny.write_adapter(base, tmp_path / "adapter", **settings)
    with pytest.raises(UnsupportedModel, match=message) as caught:
        plan(base, tmp_path / "adapter")
    assert "--to gguf-q4" in caught.value.hint or "gguf targets" in caught.value.hint


def test_added_tokens_are_refused(tmp_path: Path) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = tiny.write_loadable(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.resize_token_embeddings(tiny.TOKENS + 4, mean_resizing=False)
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    with pytest.raises(UnsupportedModel, match="added tokens"):
        plan(base, tmp_path / "adapter")


def test_a_model_without_an_adapter_has_no_file_to_write(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = tiny.write_loadable(tmp_path / "base")
    assert main(["export", str(base), "--to", "gguf-lora"]) == 1
    assert "has no adapter to write" in capsys.readouterr().err


# --- The right base -----------------------------------------------------------


def test_every_file_of_its_base_is_accepted(load: Callable[[Path], Session], tmp_path: Path) -> None:
    base = tiny.write_loadable(tmp_path / "base", dtype="bfloat16")
    tiny.write_adapter(base, tmp_path / "adapter", target_modules=["v_proj"])
    file = adapter_file(base, tmp_path / "adapter")
    for target in ("gguf-f16", "gguf-q8_0", "gguf-q4_0"):
        load(base_file(base, target)).set_adapters([AdapterScale(file)])


def test_another_base_of_the_same_shape_is_refused(load: Callable[[Path], Session], tmp_path: Path) -> None:
    base = tiny.write_loadable(tmp_path / "base")
    other = tiny.write_loadable(tmp_path / "other", seed=5)
    tiny.write_adapter(base, tmp_path / "adapter", target_modules=["v_proj"])
    file = adapter_file(base, tmp_path / "adapter")
    session = load(base_file(other))
    before = session.score(TOKENS)
    with pytest.raises(ModelError, match=r"adapter\.gguf does not belong to .*other-gguf-f16\.gguf: the norms"):
        session.set_adapters([AdapterScale(file)])
    np.testing.assert_array_equal(session.score(TOKENS), before)


def test_a_file_that_has_an_adapter_already_is_refused(load: Callable[[Path], Session], tmp_path: Path) -> None:
    base = tiny.write_loadable(tmp_path / "base")
    tiny.write_adapter(base, tmp_path / "adapter", target_modules=["v_proj"])
    merged = tmp_path / "merged.gguf"
    source = Source(base, tmp_path / "adapter")
    converter().convert(converter().plan(source, "gguf-f16", ConvertOptions(merged)), Silent())
    with pytest.raises(ModelError, match="already has an adapter merged"):
        load(merged).set_adapters([AdapterScale(adapter_file(base, tmp_path / "adapter"))])


def test_a_model_is_no_adapter(load: Callable[[Path], Session], tmp_path: Path) -> None:
    file = base_file(tiny.write_loadable(tmp_path / "base"))
    with pytest.raises(ModelError, match="is a model, not an adapter"):
        load(file).set_adapters([AdapterScale(file)])


def test_an_embedding_that_is_also_the_head_is_refused_before_llama_cpp_aborts(
    load: Callable[[Path], Session], tmp_path: Path
) -> None:
    untied = tiny.write_loadable(tmp_path / "untied", tie_word_embeddings=False)
    tiny.write_adapter(untied, tmp_path / "adapter", target_modules=["embed_tokens"])
    file = adapter_file(untied, tmp_path / "adapter")
    with pytest.raises(ModelError, match="is also the head"):
        load(base_file(tiny.write_loadable(tmp_path / "tied"))).set_adapters([AdapterScale(file)])


# --- On the command line ------------------------------------------------------


def test_run_takes_adapters_with_scales(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = tiny.write_loadable(tmp_path / "base")
    tiny.write_adapter(base, tmp_path / "adapter", target_modules=ALL_LINEAR, lora_alpha=3000)
    model, file = base_file(base), adapter_file(base, tmp_path / "adapter")
    answers = []
    for scale in ("", "=0", "=1"):
        extra = [] if not scale else ["--adapter", f"{file}{scale}"]
        assert main(["run", str(model), "hello", "--max-tokens", "8", "--temperature", "0", *extra]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] != answers[2]


def test_an_adapter_alone_is_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = tiny.write_loadable(tmp_path / "base")
    tiny.write_adapter(base, tmp_path / "adapter", target_modules=["v_proj"])
    file = adapter_file(base, tmp_path / "adapter")
    assert main(["run", str(file), "hello"]) == 2
    assert f"Give its base, and --adapter {file}" in capsys.readouterr().err


def test_a_scale_is_a_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "a.gguf"
    file.write_bytes(b"GGUF")
    assert main(["run", "none.gguf", "hello", "--adapter", f"{file}=nan"]) == 2
    assert "scale cannot be nan" in capsys.readouterr().err


def test_eval_measures_the_base_with_its_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import json

    base = tiny.write_loadable(tmp_path / "base")
    tiny.write_adapter(base, tmp_path / "adapter", target_modules=ALL_LINEAR, lora_alpha=3000)
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    data = tmp_path / "data"
    data.mkdir()
    (data / "test.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    model, file = base_file(base), adapter_file(base, tmp_path / "adapter")
    found = []
    for extra in ([], ["--adapter", f"{file}=0.5"]):
        assert main(["eval", str(model), "--data", str(data), "--metrics", "nll", "--json", *extra]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[1]["adapters"] == {str(file): 0.5}
    assert found[0]["nll"] != found[1]["nll"]


# --- llama.cpp's own converter ------------------------------------------------


@pytest.mark.reference
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_a_plain_adapter_is_what_llama_cpp_converts(kind: str, cache: Path, tmp_path: Path) -> None:
    base = tiny.write_loadable(tmp_path / "base", kind)
    tiny.write_adapter(base, tmp_path / "adapter", target_modules=ALL_LINEAR)
    ours, theirs = adapter_file(base, tmp_path / "adapter"), tmp_path / "theirs.gguf"
    script = reference.converter_source(cache) / "convert_lora_to_gguf.py"
    command = [sys.executable, script, tmp_path / "adapter", "--base", base, "--outtype", "f32", "--outfile", theirs]
    subprocess.run(command, check=True, capture_output=True)
    readers = [gguf.GGUFReader(file) for file in (ours, theirs)]
    values = [{tensor.name: tensor.data for tensor in reader.tensors} for reader in readers]
    assert values[0].keys() == values[1].keys()
    for name, value in values[1].items():
        np.testing.assert_array_equal(values[0][name], value, err_msg=name)
    for key in ("general.architecture", "general.type", "adapter.type", "adapter.lora.alpha"):
        assert readers[0].fields[key].contents() == readers[1].fields[key].contents()
