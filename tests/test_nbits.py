"""MatMulNBits' rounding in numpy: onnxruntime's own codes, and training for the file that has them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from edgeft.converters.onnx_quantize import Settings, quantize

from edgeft import export as exporting
from edgeft.errors import ModelError, UnsupportedModel, UsageError
from edgeft.models import nbits
from edgeft.models.nbits_grid import NBitsGrid
from edgeft.progress import Silent
from edgeft.train import train
from edgeft.verify.codes import check_codes
from tests import test_train_runs, tiny
from tests.test_quantization_aware import aware

data = test_train_runs.data

SETTINGS = Settings(bits=4, head_bits=8, embedding_bits=8)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_loadable(tmp_path_factory.mktemp("model") / "base")


def adversarial() -> np.ndarray[Any, np.dtype[np.float32]]:
    """Rows of three blocks on which a careless formula goes wrong."""
    generator = np.random.default_rng(0)
    rows = [np.zeros(96), np.full(96, 0.3), np.full(96, -0.3), np.full(96, -0.0), np.arange(96) - 48.0]
    rows += [np.tile([-7.5, 7.5], 48), np.tile([0.5, 15.5, 15.0], 32), np.tile([-1e-38, 1e-38, 1e-3], 32)]
    rows += [np.tile([1e30, -2e30, 3.0], 32), np.tile(np.arange(16) + 0.5, 6), np.tile([-1.0, 14.0, 6.5, 7.5], 24)]
    random = generator.standard_normal((600, 96)) * 10.0 ** generator.integers(-4, 3, (600, 1))
    return np.concatenate([np.array(rows), random]).astype(np.float32)


@pytest.mark.parametrize("bits", [4, 8])
def test_codes_scales_and_zero_points_are_those_of_onnxruntime(bits: int) -> None:
    weights = adversarial()
    expected = quantize(weights, bits, SETTINGS)
    layout = nbits.Layout(bits, 96)
    packed = nbits.pack(weights, bits)
    codes, scales, zeros = nbits.split(packed, layout)
    np.testing.assert_array_equal(scales, expected.scales)
    np.testing.assert_array_equal(zeros, expected.zeros)
    np.testing.assert_array_equal(codes, expected.codes)
    np.testing.assert_array_equal(nbits.unpack(packed, layout), nbits.values(weights, bits))
    assert nbits.layout_of(f"INT{bits}", packed.shape[1]) == layout


@pytest.mark.parametrize("blocks", range(1, 40))
@pytest.mark.parametrize("kind", ["INT4", "INT8"])
def test_the_layout_follows_from_the_bytes_of_a_row(kind: str, blocks: int) -> None:
    layout = nbits.Layout(nbits.KINDS[kind], 32 * blocks)
    assert nbits.layout_of(kind, layout.bytes) == layout
    with pytest.raises(ModelError, match="are not a row of"):
        nbits.layout_of(kind, layout.bytes + 1)


def test_the_grid_computes_with_what_it_packs() -> None:
    grid, weights = NBitsGrid("INT4"), torch.from_numpy(adversarial())
    exact, narrow = torch.empty_like(weights), torch.empty(weights.shape, dtype=torch.bfloat16)
    grid.values(weights, exact)
    grid.values(weights, narrow)
    assert torch.equal(exact, grid.unpack(grid.pack(weights), 96))
    assert torch.equal(narrow, exact.bfloat16())
    with pytest.raises(UnsupportedModel, match="do not fill blocks"):
        grid.check("weight", 48)
    with pytest.raises(ModelError, match="not finite"):
        grid.pack(torch.full((1, 32), torch.inf))


def test_the_onnx_file_holds_the_very_codes_of_the_trained_graph(base: Path, data: Path, tmp_path: Path) -> None:
    run = train(aware(base, data, tmp_path / "run", target="onnx-q4")).run
    losses = [line["loss"] for line in run.metrics() if "loss" in line]
    assert losses[-1] < losses[0]
    prepared = exporting.prepare(str(run.path), out=tmp_path / "file")
    assert prepared.plan.target == "onnx-q4" == run.manifest().target
    exporting.export(prepared, Silent())
    (finding,) = check_codes(prepared.origin.source, tmp_path / "file")
    assert finding.ok
    assert finding.value == 1.0
    exporting.export(exporting.prepare(str(base), "onnx-q4", out=tmp_path / "other"), Silent())
    (finding,) = check_codes(prepared.origin.source, tmp_path / "other")
    assert not finding.ok


def test_other_settings_than_those_of_training_are_refused(base: Path, data: Path, tmp_path: Path) -> None:
    run = train(aware(base, data, tmp_path / "run", target="onnx-q4", epochs=1)).run
    with pytest.raises(UsageError, match="by default"):
        exporting.prepare(str(run.path), out=tmp_path / "file", extra={"settings": {"block": "64"}})
