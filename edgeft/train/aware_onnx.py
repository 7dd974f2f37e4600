"""Training for an ONNX target: linear layers compute with MatMulNBits' values of W + s·B·A."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgeft import plugins
from edgeft.errors import UnsupportedModel
from edgeft.models.nbits import BLOCK, KINDS
from edgeft.plugins import ConvertOptions, Source
from edgeft.train.aware import Aware
from edgeft.train.aware_gguf import RoundedAdapters, first_rounded
from edgeft.train.config import TrainConfig


def make(config: TrainConfig, model: Any, base: Path, steps: int) -> Aware:
    """Raises: UnsupportedModel, ModelError."""
    assert config.target is not None
    return RoundedAdapters(
        config.target, tensor_types(base, config.target), first_rounded(config.quantize_after, steps)
    )


def tensor_types(base: Path, target: str) -> dict[str, str]:
    """Hugging Face name -> INT4 or INT8, of every quantized tensor.

    Raises:
        UnsupportedModel: rows that do not fill blocks: the exporter fills them up, and packed rows do not.
    """
    onnx = plugins.load("converters", "onnx")
    plan = onnx.plan(Source(base), target, ConvertOptions(Path("never-written")))
    kinds = {tensor.name: tensor.type.upper() for tensor in plan.tensors if tensor.type.upper() in KINDS}
    for tensor in plan.tensors:
        if tensor.name in kinds and tensor.shape[1] % BLOCK:
            raise UnsupportedModel(
                f"{base} cannot be trained for {target}: {tensor.name} has {tensor.shape[1]} columns, "
                f"which do not fill blocks of {BLOCK}"
            )
    return kinds
