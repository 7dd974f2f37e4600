"""Every family: a file computes what transformers computes from the same weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import parity_cases as parity
import pytest
import tiny
import tiny_families
import torch
from edgeft.converters import ggml
from edgeft.converters.gguf_plan import make_plan
from edgeft.converters.safetensors_rows import Reader
from tiny_families import FamilyCase
from transformers import AutoModelForCausalLM

from edgeft import plugins
from edgeft.artifact import Artifact
from edgeft.errors import UnsupportedModel
from edgeft.models.nf4 import kept
from edgeft.plugins import ConvertOptions, LoadOptions, Source

TOKENS = np.random.default_rng(0).integers(3, 256, 80).tolist()
"""More than the windows (8) and the original contexts (64) of the tiny models."""


def transformers_log_probabilities(model: Path) -> np.ndarray:
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        logits = loaded(torch.tensor([TOKENS])).logits[0]
    return logits.log_softmax(-1).numpy()


def file_log_probabilities(file: Path) -> np.ndarray:
    with plugins.load("runtimes", "xllamacpp").load(Artifact(file), LoadOptions()) as session:
        return np.asarray(session.score(TOKENS))


def divergence(expected: np.ndarray, got: np.ndarray) -> float:
    """Mean Kullback-Leibler divergence per token, nats."""
    return float((np.exp(expected) * (expected - got)).sum(-1).mean())


@pytest.mark.parametrize("case", tiny_families.COMPUTED, ids=lambda case: case.label)
def test_a_file_computes_what_transformers_does(case: FamilyCase, tmp_path: Path) -> None:
    model = tiny_families.build(tmp_path / "model", case, spread=0.2)
    expected = transformers_log_probabilities(model)
    got = file_log_probabilities(parity.export(model, "gguf-f16", tmp_path / "model.gguf"))
    assert np.std(expected) > 0.3, "a model that says the same of every token would prove nothing"
    assert divergence(expected, got) < 1e-3
    assert (expected.argmax(-1) == got.argmax(-1)).mean() > 0.95


# --- With an adapter ----------------------------------------------------------


def rows(base: Path, adapter: Path | None = None, nf4: bool = False) -> dict[str, np.ndarray]:
    """Every tensor as it would be quantized, by its name in the file."""
    options = ConvertOptions(base.parent / "out.gguf")
    planned = make_plan(Source(base, adapter, nf4=nf4), "gguf-f16", "F16", options, ggml.load())
    found = {}
    with Reader() as reader:
        for item in planned.details.items:
            if not isinstance(item.source, np.ndarray):
                parts = item.source.parts
                count = item.rows // len(parts)
                pieces = [part.load(reader, ggml.load()).rows(0, count).copy() for part in parts]
                found[item.name] = np.concatenate(pieces).reshape(item.shape)
    return found


def small(family: str, variant: str = "") -> FamilyCase:
    return next(case for case in tiny_families.COMPUTED if (case.family, case.variant) == (family, variant))


ADAPTERS: dict[str, tuple[FamilyCase, dict[str, Any]]] = {
    "fused projections": (small("phi3"), {"target_modules": ["qkv_proj", "gate_up_proj", "o_proj"]}),
    "fused projections, DoRA": (small("phi3"), {"target_modules": ["qkv_proj"], "use_dora": True}),
    "norms of 1 + weight": (
        small("gemma3"),
        {"target_modules": "all-linear", "modules_to_save": ["input_layernorm", "q_norm", "norm"]},
    ),
    "gemma2": (small("gemma2"), {"target_modules": "all-linear"}),
    "granite": (small("granite"), {"target_modules": "all-linear", "use_rslora": True}),
    "olmo2": (small("olmo2"), {"target_modules": "all-linear"}),
    "smollm3": (small("smollm3"), {"target_modules": "all-linear", "use_dora": True}),
    "stablelm": (small("stablelm", "norms"), {"target_modules": "all-linear"}),
    "experts and router": (small("qwen3moe"), {"target_modules": "all-linear"}),
    "experts as parameters": (
        small("qwen3moe"),
        {"target_parameters": ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"], "target_modules": ["q_proj"]},
    ),
    "some of the experts' parameters": (
        small("qwen3moe"),
        {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj"], "use_rslora": True},
    ),
}


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_adapter_is_merged_as_peft_does(name: str, tmp_path: Path) -> None:
    case, settings = ADAPTERS[name]
    base = tiny_families.build(tmp_path / "base", case, spread=0.2)
    merged = tiny.write_adapter(base, tmp_path / "adapter", **settings).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    tiny_families.write_tokenizer(tmp_path / "merged", case.family, case.tokenizer)
    ours, theirs, plain = rows(base, tmp_path / "adapter"), rows(tmp_path / "merged"), rows(base)
    assert sorted(ours) == sorted(theirs)
    for tensor, expected in theirs.items():
        np.testing.assert_allclose(ours[tensor], expected, rtol=1e-5, atol=4e-6, err_msg=tensor)
    assert sum(not np.array_equal(ours[tensor], plain[tensor]) for tensor in ours) >= case.shape.layers


@pytest.mark.parametrize("adapted", [False, True])
def test_experts_saved_together_are_the_same(adapted: bool, tmp_path: Path) -> None:
    """transformers can save the experts of a layer as it holds them, in one parameter."""
    case = small("qwen3moe")
    base = tiny_families.build(tmp_path / "base", case, spread=0.2)
    together = tmp_path / "together"
    loaded = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    loaded.save_pretrained(together, save_original_format=False)
    tiny_families.write_tokenizer(together, case.family, case.tokenizer)
    tiny.write_adapter(base, tmp_path / "adapter", target_modules="all-linear")
    adapter = tmp_path / "adapter" if adapted else None
    one, other = rows(base, adapter), rows(together, adapter)
    assert one["blk.0.ffn_up_exps.weight"].shape == (4, 96, 96)
    for tensor, expected in one.items():
        np.testing.assert_array_equal(other[tensor], expected, err_msg=tensor)


# --- What QLoRA rounds --------------------------------------------------------


@pytest.mark.parametrize("case", tiny_families.ROUNDED, ids=lambda case: case.label)
def test_qlora_rounds_what_bitsandbytes_rounds(case: FamilyCase, tmp_path: Path) -> None:
    """The tensors that change are those of which transformers makes 4-bit layers."""
    from bitsandbytes.nn import Linear4bit
    from transformers import BitsAndBytesConfig

    base = tiny_families.build(tmp_path / "base", case, spread=0.2)
    plain, rounded = rows(base), rows(base, nf4=True)
    changed = sum(plain[name].size for name in plain if not np.array_equal(plain[name], rounded[name]))
    whole = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=kept(whole))
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=config, dtype=torch.float32)
    layers = [layer for layer in model.modules() if isinstance(layer, Linear4bit)]
    assert changed == sum(layer.in_features * layer.out_features for layer in layers) > 0


# --- What is refused ----------------------------------------------------------

REFUSED: dict[str, tuple[FamilyCase, dict[str, Any], str]] = {
    "scale": (
        small("gemma3"),
        {"query_pre_attn_scalar": 99},
        "query_pre_attn_scalar is 99, llama.cpp computes with 48",
    ),
    "softcap": (small("gemma2"), {"attn_logit_softcapping": None}, "attn_logit_softcapping is switched off"),
    "both directions": (small("gemma3"), {"use_bidirectional_attention": True}, "use_bidirectional_attention True"),
    "activation": (small("gemma2"), {"hidden_activation": "silu"}, "hidden_activation 'silu'"),
    "untied": (small("gemma2"), {"tie_word_embeddings": False}, "one for both in the gemma2 family"),
    "tied": (small("olmo2"), {"tie_word_embeddings": True}, "wants both in the olmo2 family"),
    "no rope": (small("smollm3"), {"no_rope_layers": [1] * 7}, "not every fourth"),
    "rope": (small("smollm3"), {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "'llama3' cannot"),
    "part of a head": (small("llama"), {"partial_rotary_factor": 0.5}, "only part of each head is rotated"),
    "window": (small("smollm3"), {"use_sliding_window": True, "sliding_window": 8}, "uses a sliding window"),
    "long factors": (
        small("phi3", "longrope"),
        {"rope_parameters": {"rope_type": "longrope", "long_factor": [1.0], "short_factor": [1.0]}},
        "long_factor must have 16 values",
    ),
    "dense layers": (small("qwen3moe"), {"mlp_only_layers": [0]}, "some layers have no experts"),
    "weights of experts": (small("qwen3moe"), {"norm_topk_prob": False}, "norm_topk_prob False"),
    "no factor": (small("granite"), {"residual_multiplier": 0}, "residual_multiplier is 0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_settings_that_llama_cpp_does_not_have_are_refused(name: str, tmp_path: Path) -> None:
    case, change, message = REFUSED[name]
    base = tiny_families.build(tmp_path / "base", case)
    file = base / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(UnsupportedModel, match=message):
        rows(base)


def test_the_text_model_is_taken_out_of_a_model_with_images(tmp_path: Path) -> None:
    """Gemma 3 of 4B and more: sizes one level down, names with a prefix, a vision tower."""
    from safetensors.torch import load_file, save_file

    base = tiny_families.build(tmp_path / "base", small("gemma3"))
    alone = rows(base)
    config = json.loads((base / "config.json").read_text())
    text = {key: value for key, value in config.items() if key not in ("architectures", "model_type", "head_dim")}
    whole = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "head_dim": 48}
    (base / "config.json").write_text(json.dumps({**whole, "text_config": {**text, "model_type": "gemma3_text"}}))
    file = base / "model.safetensors"
    loaded = load_file(file)
    renamed = {f"language_model.{name}": value for name, value in loaded.items()}
    save_file({**renamed, "vision_tower.weight": torch.ones(3)}, file)
    for tensor, expected in rows(base).items():
        np.testing.assert_array_equal(alone[tensor], expected, err_msg=tensor)
