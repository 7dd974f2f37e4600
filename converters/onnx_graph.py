"""The graph of a model in float32, made by onnxruntime-genai's model builder from shapes alone.

The builder wants a model that transformers has loaded. It gets one without weights, whose parameters are recipes
(`onnx_lazy`): each is merged when the file is written or the tensor quantized, and forgotten after that. So one
tensor is in memory at a time, where the builder itself would hold the model two or three times in float32.
"""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeft.errors import ModelError, PluginError, UnsupportedModel, require
from edgeft.models.quiet import quiet_libraries

from .onnx_lazy import EXTRA, is_lazy, lazy, telemetry_off
from .onnx_weights import WeightReader, Weights

_PATCHED = ("load_weights", "make_initializer", "save_model", "save_processing")
"""Methods of the builder's `Model` that are replaced while it runs (onnxruntime-genai 0.18)."""


@dataclass(frozen=True)
class Graph:
    model: Any
    """An `onnx_ir.Model`; weights are lazy."""
    weights: frozenset[str]
    """Initializers that come from the model's weights; the others are constants and rotary tables."""


def build(folder: Path, weights: Weights, reader: WeightReader) -> Graph:
    """Make the graph, and genai_config.json in `folder`.

    Args:
        folder: has the merged model's config.json and tokenizer.

    Raises:
        MissingDependency: a package is not installed.
        UnsupportedModel: the builder does not know the architecture.
        PluginError: the builder is not a version edgeft knows, or failed.
    """
    with _builder_module() as builder:
        missing = [name for name in _PATCHED if not hasattr(builder.Model, name)]
        if missing:
            raise PluginError(
                f"onnxruntime-genai's model builder is not a version this edgeft knows: it has no {missing[0]}",
                "Install the version that constraints.txt names, or a newer edgeft.",
            )
        caught = _Caught()
        said = io.StringIO()
        patches = _patches(builder.Model, caught, folder, weights, reader)
        with quiet_libraries(), _replaced(builder.Model, patches), contextlib.redirect_stdout(said):
            _run(builder, folder, str((weights.config.get("architectures") or ["none"])[0]), said)
    return Graph(caught.model, frozenset(caught.names))


def _run(builder: Any, folder: Path, architecture: str, said: io.StringIO) -> None:
    try:
        extra = builder.parse_extra_options(None, str(folder), str(folder), "fp32", "cpu", str(folder), [_OFFLINE])
        builder.create_model(None, str(folder), str(folder), "fp32", "cpu", str(folder / ".cache"), **extra)
    except NotImplementedError as error:
        raise UnsupportedModel(
            f"onnxruntime-genai's model builder does not know {architecture}: {error}",
            "Export to GGUF instead: --to gguf-q4.",
        ) from error
    except ModelError:
        raise
    except Exception as error:  # a stranger's code on a stranger's model
        last = said.getvalue().strip().splitlines()[-1:] or [""]
        raise PluginError(
            f"onnxruntime-genai's model builder failed: {type(error).__name__}: {error} {last[0]}".rstrip()
        ) from error


_OFFLINE = "hf_token=false"


class _Caught:
    """What the replaced methods find."""

    def __init__(self) -> None:
        self.model: Any = None
        self.names: set[str] = set()


def _patches(
    base: Any, caught: _Caught, folder: Path, weights: Weights, reader: WeightReader
) -> Mapping[str, Callable[..., Any]]:
    plain = base.make_initializer

    def load_weights(self: Any, _path: str) -> Any:
        return skeleton(folder, weights, reader)

    def make_initializer(self: Any, tensor: Any, /, name: str, **options: Any) -> None:
        if not is_lazy(tensor):
            plain(self, tensor, name, **options)
            return
        caught.names.add(name)
        value = self.make_value(name, *_shape_of(tensor))
        value.const_value = _lazy_tensor(tensor, name)
        self.model.graph.register_initializer(value)

    def save_model(self: Any, _folder: str) -> None:
        self.model.graph.sort()
        caught.model = self.model

    def save_processing(self: Any, *_: Any) -> None:
        """The tokenizer's files are copied as they are; transformers would write them anew."""

    return dict(zip(_PATCHED, (load_weights, make_initializer, save_model, save_processing), strict=True))


def _shape_of(tensor: Any) -> tuple[Any, Any]:
    ir = require("onnx_ir", EXTRA)
    return ir.DataType.FLOAT, ir.Shape(tuple(tensor.shape))


def _lazy_tensor(tensor: Any, name: str) -> Any:
    ir = require("onnx_ir", EXTRA)
    dtype, shape = _shape_of(tensor)

    def make() -> Any:
        return ir.Tensor(tensor.make().numpy(), name=name)

    return ir.LazyTensor(make, dtype=dtype, shape=shape, name=name)


def skeleton(folder: Path, weights: Weights, reader: WeightReader) -> Any:
    """The model as transformers would load it, its parameters recipes. Raises: ModelError."""
    torch = require("torch", EXTRA)
    transformers = require("transformers", EXTRA)
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for module in model.modules():
        for short, parameter in list(module._parameters.items()):
            if parameter is not None:
                del module._parameters[short]
                setattr(module, short, _recipe(names[id(parameter)], parameter, weights, reader))
    return model


def _recipe(name: str, parameter: Any, weights: Weights, reader: WeightReader) -> Any:
    torch = require("torch", EXTRA)
    tensor = weights.tensors.get(name)
    if tensor is None or tuple(tensor.shape) != tuple(parameter.shape):
        found = "not there" if tensor is None else f"of shape {tuple(tensor.shape)}"
        raise ModelError(f"tensor {name} is {found}; the model needs shape {tuple(parameter.shape)}")
    return lazy(parameter.data, lambda: torch.from_numpy(reader.read(name)))


@contextlib.contextmanager
def _builder_module() -> Iterator[Any]:
    """The builder, importable while it is used: it finds its own parts through `sys.path`."""
    telemetry_off()
    for name in ("onnx_ir", "torch", "transformers", "onnxruntime"):
        require(name, EXTRA)
    models = require("onnxruntime_genai.models", EXTRA)
    inside = str(Path(str(models.__file__)).parent)
    sys.path.append(inside)
    try:
        yield require("onnxruntime_genai.models.builder", EXTRA)
    finally:
        while inside in sys.path:
            sys.path.remove(inside)


@contextlib.contextmanager
def _replaced(owner: Any, methods: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    before = {name: getattr(owner, name) for name in methods}
    for name, method in methods.items():
        setattr(owner, name, method)
    try:
        yield
    finally:
        for name, method in before.items():
            setattr(owner, name, method)
