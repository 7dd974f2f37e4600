"""Merging on the way gives what PEFT's own merge gives, for every kind of adapter that can be exported."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from edgeft.converters import ggml
from edgeft.converters.gguf_plan import make_plan
from edgeft.converters.merge import MergedTensor
from edgeft.converters.safetensors_rows import Reader
from numpy.typing import NDArray

from edgeft.errors import ModelError, UnsupportedModel
from edgeft.plugins import ConvertOptions, Plan, Source

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

Weights = dict[str, NDArray[np.float32]]


def plan(base: Path, adapter: Path | None) -> Plan:
    options = ConvertOptions(base.parent / "out.gguf")
    return make_plan(Source(base, adapter), "gguf-f16", "F16", options, ggml.load())


def exported(base: Path, adapter: Path, slab: int = 32) -> Weights:
    """Every tensor as it would be quantized, by its name in the file."""
    weights = {}
    with Reader() as reader:
        for item in plan(base, adapter).details.items:
            assert isinstance(item.source, MergedTensor)
            loaded = item.source.load(reader, ggml.load())
            parts = [loaded.rows(at, min(at + slab, item.rows)).copy() for at in range(0, item.rows, slab)]
            weights[item.name] = np.concatenate(parts).reshape(item.shape)
    return weights


NAMES = {
    "embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output", "input_layernorm": "attn_norm",
    "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output", "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm", "post_attention_layernorm": "ffn_norm", "gate_proj": "ffn_gate", "up_proj": "ffn_up",
    "down_proj": "ffn_down",
}  # fmt: skip


def expected(model: Any, heads: tuple[int, int] = (4, 2), llama: bool = True) -> Weights:
    """The same from a merged torch model: renamed, and Llama's rotary rows interleaved."""
    weights = {}
    for name, value in model.state_dict().items():
        parts = name.split(".")
        gguf = f"{NAMES[parts[-2]]}.{parts[-1]}"
        array = value.float().numpy()
        if llama and parts[-2] in ("q_proj", "k_proj"):
            count = heads[0] if parts[-2] == "q_proj" else heads[1]
            rows = array.reshape(count, 2, -1, *array.shape[1:])
            array = np.stack([rows[:, 0], rows[:, 1]], axis=2).reshape(array.shape)
        weights[f"blk.{parts[2]}.{gguf}" if "layers" in parts else gguf] = array
    return weights


def assert_same(ours: Weights, theirs: Weights) -> None:
    assert sorted(ours) == sorted(theirs)
    for name, value in theirs.items():
        np.testing.assert_allclose(ours[name], value, rtol=1e-5, atol=2e-6, err_msg=name)


CASES: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": ALL_LINEAR},
    "some layers": {"target_modules": ["q_proj"], "layers_to_transform": [1]},
    "rank-stabilized": {"target_modules": ALL_LINEAR, "use_rslora": True},
    "dora": {"target_modules": ALL_LINEAR, "use_dora": True},
    "dora, rank-stabilized": {"target_modules": ["q_proj", "down_proj"], "use_dora": True, "use_rslora": True},
    "patterns": {
        "target_modules": ALL_LINEAR,
        "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 8},
        "alpha_pattern": {"down_proj": 32, r".*\.0\.self_attn\.k_proj": 1},
    },
    "rank-stabilized patterns": {"target_modules": ["q_proj"], "rank_pattern": {"q_proj": 9}, "use_rslora": True},
    "trained norms": {"target_modules": ["q_proj"], "modules_to_save": ["input_layernorm", "norm"]},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_merge_equals_peft(case: str, kind: str, tmp_path: Path) -> None:
    base = tiny.write_model(tmp_path / "base", kind)
    model = tiny.write_adapter(base, tmp_path / "adapter", **CASES[case])
    merged = model.merge_and_unload()
    theirs = {name: value for name, value in expected(merged, llama=kind == "llama").items() if name != "output.weight"}
    assert_same(exported(base, tmp_path / "adapter"), theirs)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_trained_biases(bias: str, kind: str, tmp_path: Path) -> None:
    extra = {"attention_bias": True} if kind == "llama" else {}
    base = tiny.write_model(tmp_path / "base", kind, tie_word_embeddings=False, **extra)
    model = tiny.write_adapter(base, tmp_path / "adapter", target_modules=["q_proj", "v_proj"], bias=bias)
    theirs = expected(model.merge_and_unload(), llama=kind == "llama")
    assert_same(exported(base, tmp_path / "adapter"), theirs)


def test_bias_of_the_lora_matrices(tmp_path: Path) -> None:
    base = tiny.write_model(tmp_path / "base", "qwen2", tie_word_embeddings=False)
    model = tiny.write_adapter(base, tmp_path / "adapter", target_modules=["q_proj"], lora_bias=True)
    assert_same(exported(base, tmp_path / "adapter"), expected(model.merge_and_unload(), llama=False))


UNTIED: dict[str, dict[str, Any]] = {
    "trained embedding and head": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "trained head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "lora on embedding and head": {"target_modules": ["embed_tokens", "lm_head"]},
    "dora on the embedding": {"target_modules": ["embed_tokens"], "use_dora": True},
    "trainable tokens": {
        "target_modules": ["q_proj"],
        "trainable_token_indices": {"embed_tokens": [5, 2, 100], "lm_head": [7]},
    },
}


@pytest.mark.parametrize("case", UNTIED)
def test_embedding_and_head_of_their_own(case: str, tmp_path: Path) -> None:
    base = tiny.write_model(tmp_path / "base", tie_word_embeddings=False)
    model = tiny.write_adapter(base, tmp_path / "adapter", **UNTIED[case])
    assert_same(exported(base, tmp_path / "adapter"), expected(model.merge_and_unload()))


def graph_weights(model: Any) -> Weights:
    """Embedding and head as the training graph computes them, read off by sending unit vectors through."""
    import torch

    inner = model.base_model.model
    with torch.no_grad():
        embedding = inner.get_input_embeddings()(torch.arange(tiny.TOKENS))
        head = inner.lm_head(torch.eye(64))
    return {"token_embd.weight": embedding.numpy(), "output.weight": head.T.numpy()}


TIED: dict[str, tuple[dict[str, Any], bool]] = {
    # what is trained -> whether the file still has one tensor for both
    "nothing of them": ({"target_modules": ["q_proj"]}, True),
    "tokens": ({"target_modules": ["q_proj"], "trainable_token_indices": [5, 2, 100]}, True),
    "both as one": (
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        True,
    ),
    "the embedding": ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, False),
    "the head": ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, False),
    "lora on the embedding": ({"target_modules": ["embed_tokens"]}, False),
    "lora on both": ({"target_modules": ["embed_tokens", "lm_head"]}, False),
}


@pytest.mark.parametrize("case", TIED)
def test_a_tied_base_is_exported_as_it_was_trained(case: str, tmp_path: Path) -> None:
    """PEFT's merge adds an embedding's delta to the shared tensor, so also to the head, which training never did."""
    settings, tied = TIED[case]
    base = tiny.write_model(tmp_path / "base")
    theirs = graph_weights(tiny.write_adapter(base, tmp_path / "adapter", **settings))
    ours = exported(base, tmp_path / "adapter")
    assert ("output.weight" not in ours) == tied
    np.testing.assert_allclose(ours["token_embd.weight"], theirs["token_embd.weight"], rtol=1e-5, atol=2e-6)
    head = ours.get("output.weight", ours["token_embd.weight"])
    np.testing.assert_allclose(head, theirs["output.weight"], rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("tied", [True, False])
def test_added_tokens_make_the_embedding_longer(tied: bool, tmp_path: Path) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = tiny.write_model(tmp_path / "base", tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.resize_token_embeddings(tiny.TOKENS + 2, mean_resizing=False)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    adapted.save_pretrained(tmp_path / "adapter")
    ours = exported(base, tmp_path / "adapter")
    assert ours["token_embd.weight"].shape == (tiny.TOKENS + 2, 64)
    assert ("output.weight" not in ours) == tied
    theirs = expected(adapted.merge_and_unload())
    assert_same(ours, {name: value for name, value in theirs.items() if name in ours})


def test_slab_height_does_not_matter(tmp_path: Path) -> None:
    base = tiny.write_model(tmp_path / "base")
    tiny.write_adapter(base, tmp_path / "adapter", target_modules=ALL_LINEAR, use_dora=True)
    small, large = (exported(base, tmp_path / "adapter", slab=slab) for slab in (16, 4096))
    assert_same(small, large)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bit_bases_are_merged_in_float32(dtype: str, tmp_path: Path) -> None:
    base = tiny.write_model(tmp_path / "base", dtype=dtype)
    model = tiny.write_adapter(base, tmp_path / "adapter", target_modules=ALL_LINEAR)
    theirs = {name: value for name, value in expected(model.merge_and_unload()).items() if name != "output.weight"}
    assert_same(exported(base, tmp_path / "adapter"), theirs)


# --- What cannot be exported --------------------------------------------------


def test_an_adapter_that_changes_nothing_is_reported(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = tiny.write_model(tmp_path / "base")
    untrained = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=2, target_modules=["q_proj"]))
    untrained.save_pretrained(tmp_path / "adapter")
    assert any("changes nothing" in warning for warning in plan(base, tmp_path / "adapter").warnings)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type 'IA3'"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"init_lora_weights": "pissa_niter_4"}, "also changed the base"),
        ({"alora_invocation_tokens": [1]}, "activated LoRA"),
    ],
)
def test_methods_that_cannot_be_merged_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    base = tiny.write_model(tmp_path / "base")
    tiny.write_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    edit_json(tmp_path / "adapter" / "adapter_config.json", change)
    with pytest.raises(UnsupportedModel, match=message):
        plan(base, tmp_path / "adapter")


def edit_json(file: Path, change: dict[str, Any]) -> None:
    import json

    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))


def edit_tensors(file: Path, change: Any) -> None:
    """Rewrite a safetensors file through a function of its tensors."""
    from safetensors.numpy import load_file, save_file

    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def test_an_adapter_of_a_wider_base_does_not_fit(tmp_path: Path) -> None:
    other = tiny.write_model(tmp_path / "other", hidden_size=128)
    tiny.write_adapter(other, tmp_path / "adapter", target_modules=["q_proj"])
    base = tiny.write_model(tmp_path / "base")
    with pytest.raises(ModelError, match=r"does not fit .*q_proj\.weight asks for \(64, 64\)"):
        plan(base, tmp_path / "adapter")


def test_an_adapter_of_a_deeper_base_does_not_fit(tmp_path: Path) -> None:
    other = tiny.write_model(tmp_path / "other", num_hidden_layers=3)
    tiny.write_adapter(other, tmp_path / "adapter", target_modules=["q_proj"])
    base = tiny.write_model(tmp_path / "base")
    with pytest.raises(ModelError, match=r"changes model\.layers\.2\.self_attn\.q_proj\.weight, which the base"):
        plan(base, tmp_path / "adapter")


def test_an_unknown_adapter_tensor_is_named(tmp_path: Path) -> None:
    base = tiny.write_model(tmp_path / "base")
    tiny.write_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    edit_tensors(file, lambda tensors: tensors.update({"base_model.model.model.lora_E": np.ones(3, np.float32)}))
    with pytest.raises(UnsupportedModel, match="lora_E"):
        plan(base, tmp_path / "adapter")


def test_half_a_pair_is_refused(tmp_path: Path) -> None:
    base = tiny.write_model(tmp_path / "base")
    tiny.write_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    edit_tensors(file, lambda tensors: tensors.pop(next(name for name in tensors if "lora_A" in name)))
    with pytest.raises(ModelError, match="only one of the two LoRA matrices"):
        plan(base, tmp_path / "adapter")


def test_a_nan_in_the_adapter_is_named(tmp_path: Path) -> None:
    base = tiny.write_model(tmp_path / "base")
    tiny.write_adapter(base, tmp_path / "adapter", target_modules=["v_proj"])

    def spoil(tensors: Weights) -> None:
        tensors["base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"][3, 1] = np.nan

    edit_tensors(tmp_path / "adapter" / "adapter_model.safetensors", spoil)
    with pytest.raises(ModelError, match=r"layers\.1\.self_attn\.v_proj\.lora_B\.weight is NaN or infinite in row 3"):
        exported(base, tmp_path / "adapter")


def test_a_pickled_adapter_is_refused(tmp_path: Path) -> None:
    base = tiny.write_model(tmp_path / "base")
    tiny.write_adapter(base, tmp_path / "adapter", target_modules=["v_proj"])
    (tmp_path / "adapter" / "adapter_model.safetensors").rename(tmp_path / "adapter" / "adapter_model.bin")
    with pytest.raises(UnsupportedModel, match="pickle"):
        plan(base, tmp_path / "adapter")


def test_a_rank_that_the_configuration_does_not_know_is_refused(tmp_path: Path) -> None:
    base = tiny.write_model(tmp_path / "base")
    tiny.write_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    edit_json(tmp_path / "adapter" / "adapter_config.json", {"r": 8})
    with pytest.raises(ModelError, match=r"q_proj\.weight have shapes \(4, 64\) and \(64, 4\), .* says rank 8"):
        plan(base, tmp_path / "adapter")


def test_a_head_trained_for_another_width_does_not_fit_a_tied_base(tmp_path: Path) -> None:
    other = tiny.write_model(tmp_path / "other", vocab_size=300)
    tiny.write_adapter(other, tmp_path / "adapter", target_modules=["lm_head"])
    base = tiny.write_model(tmp_path / "base")
    with pytest.raises(ModelError, match=r"does not fit"):
        plan(base, tmp_path / "adapter")
