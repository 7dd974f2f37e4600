"""A QLoRA run is merged into the base it was trained on: bitsandbytes' NF4, computed without torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from edgeft.converters import nf4

from edgeft.cli.main import main
from edgeft.run import Run, RunManifest
from edgeft.train import TrainConfig, hardware
from edgeft.train.loading import load_base


def bitsandbytes_round_trip(weights: np.ndarray) -> np.ndarray:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    packed, state = quantize_4bit(torch.from_numpy(weights), quant_type="nf4", compress_statistics=True)
    return dequantize_4bit(packed, state).numpy()


@pytest.mark.parametrize("shape", [(96, 128), (1536, 576), (3, 64)])
@pytest.mark.parametrize("scale", [0.02, 3.0])
def test_the_round_trip_is_bitsandbytes(shape: tuple[int, int], scale: float) -> None:
    weights = (np.random.default_rng(0).standard_normal(shape) * scale).astype(np.float32)
    weights[0, :3] = 0, 30 * scale, -30 * scale
    got, expected = nf4.round_trip(weights, nf4.stored_scales(nf4.peaks(weights))), bitsandbytes_round_trip(weights)
    # bitsandbytes looks 8-bit scales up in a table, which between two levels at times takes the farther one.
    np.testing.assert_allclose(got, expected, rtol=0.03)
    assert np.isclose(got, expected, rtol=1e-5, atol=0).mean() > 0.98
    assert np.abs(got - weights).max() > 0.01 * scale


def test_zeros_stay_zeros() -> None:
    zeros = np.zeros((4, 64), np.float32)
    assert not nf4.round_trip(zeros, nf4.stored_scales(nf4.peaks(zeros))).any()


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_a_qlora_run_exports_what_was_trained(kind: str, tmp_path: Path) -> None:
    """The file's weights against base and adapter in torch, with bitsandbytes' rounding in between."""
    from gguf import GGUFReader

    from edgeft.verify.torch_reference import load_reference

    base = tiny.write_model(tmp_path / "base", kind, dtype="bfloat16", hidden_size=128)
    run = Run(tmp_path / "run")
    tiny.write_adapter(base, run.path / "adapter", target_modules=["q_proj", "down_proj"])
    (run.path / "config.toml").write_text("")
    where = {"reference": str(base), "path": str(base)}
    run.write_manifest(RunManifest("qlora", where, {}, "{{ messages }}", 0, {}))
    out = tmp_path / "x.gguf"
    assert main(["export", str(run.path), "--to", "gguf-f16", "--out", str(out), "--no-verify"]) == 0
    tensors = {tensor.name: tensor.data.astype(np.float32) for tensor in GGUFReader(out).tensors}
    model = load_reference(base, run.adapter, rounded=True)._model.get_base_model()
    layer = model.model.layers[1]
    pairs = {"ffn_down": layer.mlp.down_proj, "ffn_up": layer.mlp.up_proj, "attn_q": layer.self_attn.q_proj}
    for name, module in pairs.items():
        weight = getattr(module, "base_layer", module).weight.detach().numpy()
        stored = tensors[f"blk.1.{name}.weight"]
        if name == "attn_q" and kind == "llama":  # rows are in another order there
            stored, weight = np.sort(stored, axis=0), np.sort(weight, axis=0)
        np.testing.assert_allclose(stored, weight, rtol=2e-3, atol=1e-4)
    plain = load_reference(base, run.adapter)._model.get_base_model().model.layers[1].mlp.up_proj.weight
    assert np.abs(tensors["blk.1.ffn_up.weight"] - plain.detach().numpy()).max() > 1e-3


def test_layers_whose_rows_are_no_whole_blocks_are_trained_in_16_bits(tmp_path: Path) -> None:
    from bitsandbytes.nn import Linear4bit

    base = tiny.write_model(tmp_path / "base")
    model = load_base(base, TrainConfig(str(base), "", tmp_path), hardware.detect())
    rounded = {name.rpartition(".")[2] for name, layer in model.named_modules() if isinstance(layer, Linear4bit)}
    assert rounded == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"}  # down_proj is 96 wide
