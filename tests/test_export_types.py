"""Every GGUF type and mixture, against llama.cpp's quantizer: same types, same bytes, with an importance matrix and
without one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from edgeft.converters import importance
from edgeft.converters.ggml import TYPES, load
from edgeft.converters.gguf import converter
from edgeft.converters.gguf_mixtures import BEST, MIXTURES, NEEDS_IMPORTANCE
from gguf import GGUFReader
from parity_types import quantize

from edgeft.errors import ModelError, UsageError
from edgeft.plugins import ConvertOptions, Source
from edgeft.progress import Silent

KINDS = {
    "wide": {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 5, "head_dim": 64},
    "shared": {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "head_dim": 32,
        "tie_word_embeddings": False,
    },
    "narrow": {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 8, "head_dim": 24},
    "odd": {"hidden_size": 48, "intermediate_size": 112, "num_hidden_layers": 3, "head_dim": 12},
}
_APART = ("gguf", "gguf-q4", "gguf-bf16", "gguf-tq1_0", "gguf-tq2_0")
TARGETS = [name for name in converter.targets if name not in _APART and "lora" not in name]


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    return tiny.write_model(folder / "model", dtype="bfloat16", **KINDS[request.param])


@pytest.fixture(scope="module")
def matrix(model: Path) -> Path:
    """Random importance of all layers; llama.cpp's tools have none for embedding and head."""
    generator = np.random.default_rng(0)
    uses = {}
    for tensor in GGUFReader(export(model, "gguf-bf16")).tensors:
        if tensor.name.startswith("blk.") and len(tensor.shape) == 2:
            sums = generator.random((1, int(tensor.shape[0])), np.float32) * 100
            uses[tensor.name] = importance.Use(sums, np.array([50], np.float32))
    file = model.parent / "imatrix.gguf"
    importance.write_importance(file, uses, ["random"], 1, 50)
    return file


def export(model: Path, target: str, **extra: Any) -> Path:
    out = model.parent / f"{target}.gguf"
    options = ConvertOptions(out, extra=extra)
    converter.convert(converter.plan(Source(model), target, options), Silent())
    return out


def different(ours: Path, theirs: Path) -> list[str]:
    left, right = ({tensor.name: tensor for tensor in GGUFReader(file).tensors} for file in (ours, theirs))
    assert list(left) == list(right)
    return [
        f"{name}: {left[name].tensor_type.name} for {other.tensor_type.name}"
        for name, other in right.items()
        if left[name].tensor_type != other.tensor_type or not np.array_equal(left[name].data, other.data)
    ]


def needs_importance(model: Path, target: str) -> bool:
    try:
        converter.plan(Source(model), target, ConvertOptions(model.parent / "x.gguf"))
    except UsageError as error:
        assert "importance" in error.message
        return True
    return False


@pytest.mark.reference
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_every_mixture_is_llama_quantizes(
    target: str, weighted: bool, model: Path, matrix: Path, tmp_path: Path
) -> None:
    if target == "gguf-f32" or (not weighted and needs_importance(model, target)):
        return
    if target.startswith(("gguf-iq1", "gguf-iq2")) and model.parent.name.startswith("wide"):
        return  # ggml takes seconds for each; "shared" has all of their rules
    known = matrix if weighted else None
    theirs = tmp_path / "theirs.gguf"
    quantize(export(model, "gguf-bf16"), theirs, target, known)
    assert different(export(model, target, imatrix=known), theirs) == []


@pytest.mark.reference
def test_overrides_are_llama_quantizes(model: Path, tmp_path: Path) -> None:
    overrides = {"blk.[0-2].ffn_down": "q6_K", "attn_v": "q8_0", "token_embd": "q5_0"}
    theirs = tmp_path / "theirs.gguf"
    quantize(export(model, "gguf-bf16"), theirs, "gguf-q4_k_m", None, overrides)
    assert different(export(model, "gguf-q4_k_m", types=tuple(overrides.items())), theirs) == []


def test_types_that_need_importance_are_named(model: Path) -> None:
    if model.parent.name.startswith(("narrow", "odd")):
        return
    weighted = {target for target in TARGETS if needs_importance(model, target)}
    names = {MIXTURES[target.removeprefix("gguf-").upper()].type for target in weighted}
    assert names - {"IQ3_S", "Q2_K"} == NEEDS_IMPORTANCE
    assert "gguf-q2_k" not in weighted


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (("attn_v", "q9_0"), "no tensor type 'q9_0'"),
        (("nothing", "q8_0"), "no tensor's name"),
        (("(", "q8_0"), "not a"),
    ],
)
def test_a_bad_override_says_what_is_wrong(override: tuple[str, str], said: str, model: Path) -> None:
    with pytest.raises(UsageError, match=said):
        export(model, "gguf-q4_0", types=(override,))


def test_another_models_importance_is_refused(model: Path, tmp_path: Path) -> None:
    use = importance.Use(np.ones((1, 32), np.float32), np.ones(1, np.float32))
    importance.write_importance(tmp_path / "other.gguf", {"blk.0.attn_q.weight": use}, [], 1, 1)
    with pytest.raises(ModelError, match="importance matrix has"):
        export(model, "gguf-q4_0", imatrix=tmp_path / "other.gguf")
    with pytest.raises(ModelError, match="not an importance matrix"):
        export(model, "gguf-q4_0", imatrix=export(model, "gguf-bf16"))


def test_importance_survives_the_file(tmp_path: Path) -> None:
    uses = {
        "blk.0.ffn_down_exps.weight": importance.Use(
            np.arange(12, dtype=np.float32).reshape(3, 4), np.array([2, 0, 4], np.float32)
        )
    }
    importance.write_importance(tmp_path / "x.gguf", uses, ["text"], 3, 128)
    found = importance.read_importance(tmp_path / "x.gguf")["blk.0.ffn_down_exps.weight"]
    np.testing.assert_array_equal(found, [[0, 0.5, 1, 1.5], [1, 1, 1, 1], [2, 2.25, 2.5, 2.75]])


def test_ordinary_weights_are_not_stored_as_ternary(model: Path) -> None:
    if model.parent.name.startswith("odd"):
        return  # its rows fill no block of a ternary type, so they are stored in F16
    with pytest.raises(ModelError, match="not ternary"):
        export(model, "gguf-tq2_0")
    assert export(model, "gguf-tq2_0", force=True).is_file()


@pytest.mark.parametrize("target", ["gguf-tq1_0", "gguf-tq2_0"])
def test_ternary_weights_come_back_exactly(target: str, tmp_path: Path) -> None:
    import torch
    import transformers
    from gguf import dequantize

    folder = tiny.write_model(tmp_path / "model", dtype="float32", **KINDS["wide"])
    ternary = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for layer in ternary.modules():
            if isinstance(layer, torch.nn.Linear) and layer is not ternary.lm_head:
                layer.weight.copy_(torch.randint(-1, 2, layer.weight.shape) * float(np.float16(0.0371)))
    ternary.save_pretrained(folder)
    stored = {tensor.name: tensor for tensor in GGUFReader(export(folder, target)).tensors}
    down = stored["blk.3.ffn_down.weight"]
    assert down.tensor_type.name == target.removeprefix("gguf-").upper()
    np.testing.assert_array_equal(
        dequantize(down.data, down.tensor_type), ternary.model.layers[3].mlp.down_proj.weight.detach().numpy()
    )


def test_edgefts_own_mixture_is_in_no_list() -> None:
    assert BEST not in {target.removeprefix("gguf-").upper() for target in converter.targets}


@pytest.mark.parametrize("kind", [kind for kind in TYPES if kind != "F32"])
def test_what_is_read_back_is_what_the_gguf_package_reads(kind: str) -> None:
    from gguf import GGMLQuantizationType, dequantize

    weights = np.random.default_rng(0).standard_normal((3, 512), np.float32)
    ggml = load()
    stored = ggml.quantize(TYPES[kind], weights, np.ones(512, np.float32))
    np.testing.assert_allclose(
        ggml.dequantize(TYPES[kind], stored, 512), dequantize(stored, GGMLQuantizationType[kind]), rtol=1e-6, atol=1e-7
    )
