"""What is stored in an ONNX directory, as a torch model in float32: quantization without onnxruntime's arithmetic."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from edgeft.errors import ModelError, UnsupportedModel, require
from edgeft.models.onnx_values import OnnxFile, OnnxTensor
from edgeft.verify.torch_reference import TorchReference

_LAYER = re.compile(r"model\.layers\.(\d+)\.(attn|mlp)\.(\w+)\.MatMul\.weight")
"""Names of onnxruntime-genai's model builder."""

_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def load_onnx_tensors(folder: Path, merged: TorchReference) -> TorchReference:
    """A copy of the merged model with the matrices that the graph multiplies with; all else the export keeps as it is.

    Raises:
        MissingDependency: onnx is not installed.
        UnsupportedModel: the graph's matrices are not where onnxruntime-genai's builder puts them.
        ModelError: a file is damaged.
    """
    torch = require("torch", "train")
    file = OnnxFile(folder)
    model = merged.plain_copy()
    linear = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Linear)}
    for tensor in file.tensors.values():
        for parameter, rows in _places(model, tensor):
            found = rows(torch.from_numpy(file.values(tensor)))
            if found.shape != parameter.shape:
                raise ModelError(f"{file.file}: {tensor.name} is not of the shape that the model has there")
            linear.discard(id(parameter))
            parameter.data = found
    if linear:
        raise UnsupportedModel(f"{file.file}: {len(linear)} matrices of the model were not found in the graph")
    return TorchReference(model.eval(), has_adapter=False)


def _places(model: Any, tensor: OnnxTensor) -> list[tuple[Any, Any]]:
    """(parameter, which rows of the tensor are its own) for every parameter a tensor stands for."""
    if tensor.name == "lm_head.MatMul.weight":
        return [(model.get_output_embeddings().weight, lambda found: found)]
    if tensor.name.endswith("embed_tokens.weight"):
        return [(model.get_input_embeddings().weight, lambda found: found)]
    if (found := _LAYER.fullmatch(tensor.name)) is None:
        return []
    layer, part, name = found.groups()
    try:
        owner = model.get_submodule(f"model.layers.{layer}.{'self_attn' if part == 'attn' else 'mlp'}")
    except AttributeError as error:
        raise UnsupportedModel(f"{type(model).__name__} has no place for {tensor.name}") from error
    names = [name] if hasattr(owner, name) else [one for one in _FUSED.get(name, ()) if hasattr(owner, one)]
    places, start = [], 0
    for weight in (getattr(owner, one).weight for one in names):
        stop = start + len(weight)
        places.append((weight, lambda rows, start=start, stop=stop: rows[start:stop].clone()))
        start = stop
    return places
