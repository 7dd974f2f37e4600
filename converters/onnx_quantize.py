"""Weights of a float graph into blocks of 4 or 8 bits, one tensor at a time: MatMulNBits and GatherBlockQuantized.

The rounding is onnxruntime's own (`MatMulNBitsQuantizer`, given one small matrix after the other), so the numbers are
those of its tools. Operators: onnxruntime `docs/ContribOperators.md`, com.microsoft.MatMulNBits and
com.microsoft.GatherBlockQuantized.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from edgeft.errors import require

from .onnx_graph import Graph
from .onnx_lazy import EXTRA, telemetry_off

if TYPE_CHECKING:
    from numpy.typing import NDArray

Method = Literal["rtn", "k_quant", "hqq"]

_SLAB = 1 << 20
"""Weights rounded at once: k_quant holds about ten copies of them."""

_DOMAIN = "com.microsoft"


@dataclass(frozen=True)
class Settings:
    """How to quantize."""

    bits: int
    head_bits: int
    """4, 8, or 32 for float32: the head, and with it an embedding that shares its weights."""
    embedding_bits: int
    """4, 8 or 32: an embedding that does not share the head's weights."""
    block: int = 32
    """Weights of a row that share a scale."""
    symmetric: bool = False
    """Without a zero point per block."""
    method: Method = "rtn"
    accuracy_level: int = 4
    """0 to 4; 4 rounds activations to 8 bits, which is what the fast kernels of CPUs compute with."""


@dataclass(frozen=True)
class Blocks:
    """A quantized matrix: codes (rows, blocks, bytes per block), scales (rows, blocks), zero points (rows, bytes)."""

    codes: NDArray[np.uint8]
    scales: NDArray[np.float32]
    zeros: NDArray[Any] | None


Rounded = Callable[[Any, int, bool], Blocks]
"""(initializer, bits, whether its columns are rows of the weights) -> its blocks."""


def quantize_graph(
    graph: Graph, settings: Settings, advance: Callable[[int, str], None], rounded: Rounded | None = None
) -> dict[str, int]:
    """Replace every constant matrix of `graph`, in place.

    Args:
        advance: told how many weights of which tensor are done.
        rounded: gives the blocks of a matrix; by default they are quantized here.

    Returns:
        Initializer name -> bits of the weights in it.
    """
    found: dict[str, int] = {}
    rounded = rounded or functools.partial(_quantized, settings)
    for node in list(graph.model.graph):
        if node.op_type != "MatMul" or node.inputs[1].name not in graph.weights:
            continue
        name = node.inputs[1].name
        bits = settings.head_bits if _is_head(node) else settings.bits
        if bits < 32:
            count = node.inputs[1].shape.numpy()
            found[name] = bits
            _replace_matmul(graph.model.graph, node, bits, settings, rounded)
            advance(int(np.prod(count)), name)
    for node in list(graph.model.graph):
        if node.op_type == "Gather" and node.inputs[0].name in graph.weights and settings.embedding_bits < 32:
            name = node.inputs[0].name
            columns, count = int(node.inputs[0].shape[1]), int(np.prod(node.inputs[0].shape.numpy()))
            if columns % settings.block == 0:
                found[name] = settings.embedding_bits
                blocks = rounded(node.inputs[0], settings.embedding_bits, False)
                _replace_gather(graph.model.graph, node, name, blocks, settings.embedding_bits, settings)
                advance(count, name)
    return found


def _is_head(node: Any) -> bool:
    return bool(node.outputs[0].is_graph_output())


def _quantized(settings: Settings, value: Any, bits: int, turned: bool) -> Blocks:
    weights = value.const_value.numpy()
    return quantize(weights.T if turned else weights, bits, settings, table=not turned)


def _replace_matmul(graph: Any, node: Any, bits: int, settings: Settings, rounded: Rounded) -> None:
    weight = node.inputs[1]
    columns, rows = (int(size) for size in weight.shape)
    blocks = rounded(weight, bits, True)
    embedding = _shared_embedding(weight)
    values = _register(graph, weight.name, blocks, bits)
    node.op_type, node.domain = "MatMulNBits", _DOMAIN
    node.resize_inputs(1 + len(values))
    for at, value in enumerate(values):
        node.replace_input_with(1 + at, value)
    level = {"accuracy_level": settings.accuracy_level}
    _attributes(node, K=columns, N=rows, bits=bits, block_size=settings.block, **level)
    if embedding is not None:
        transpose, gather = embedding
        _share(graph, gather, values, (rows, columns), bits, settings)
        graph.remove(transpose, safe=True)
    del graph.initializers[weight.name]


def _shared_embedding(weight: Any) -> tuple[Any, Any] | None:
    """The nodes that look rows up in the head's weights: Transpose, then Gather."""
    for transpose in weight.consumers():
        if transpose.op_type == "Transpose":
            for gather in transpose.outputs[0].consumers():
                if gather.op_type == "Gather":
                    return transpose, gather
    return None


def _share(graph: Any, gather: Any, values: list[Any], shape: tuple[int, int], bits: int, settings: Settings) -> None:
    """Look rows up in the head's quantized weights: (rows, blocks, bytes) seen as (rows, bytes)."""
    ir = require("onnx_ir", EXTRA)
    rows, columns = shape
    blocks = -(-columns // settings.block)
    flat = ir.Value(name="embed_tokens.shape", shape=ir.Shape([2]), type=ir.TensorType(ir.DataType.INT64))
    flat.const_value = ir.tensor(np.array([rows, blocks * settings.block * bits // 8]), name=flat.name)
    graph.register_initializer(flat)
    reshape = ir.node("Reshape", [values[0], flat], name="/model/embed_tokens/Reshape")
    reshape.outputs[0].name = "/model/embed_tokens/Reshape/output_0"
    graph.insert_before(gather, reshape)
    _to_block_gather(gather, [reshape.outputs[0], *values[1:]], bits, settings)
    if blocks * settings.block != columns:
        _cut_padding(graph, gather, columns)


def _cut_padding(graph: Any, gather: Any, columns: int) -> None:
    """The quantizer fills the last block of a row up; what was looked up of that is cut off."""
    ir = require("onnx_ir", EXTRA)
    bounds = []
    for name, number in (("starts", 0), ("ends", columns), ("axes", -1)):
        value = ir.Value(name=f"embed_tokens.{name}", shape=ir.Shape([1]), type=ir.TensorType(ir.DataType.INT64))
        value.const_value = ir.tensor(np.array([number]), name=value.name)
        graph.register_initializer(value)
        bounds.append(value)
    full = gather.outputs[0]
    users = list(full.uses())
    cut = ir.node("Slice", [full, *bounds], name="/model/embed_tokens/Slice")
    cut.outputs[0].name = "/model/embed_tokens/Slice/output_0"
    cut.outputs[0].type = full.type
    full.shape = None
    graph.insert_after(gather, cut)
    for user, at in users:
        user.replace_input_with(at, cut.outputs[0])


def _replace_gather(graph: Any, node: Any, name: str, blocks: Blocks, bits: int, settings: Settings) -> None:
    flat = Blocks(blocks.codes.reshape(len(blocks.codes), -1), blocks.scales, blocks.zeros)
    _to_block_gather(node, _register(graph, name, flat, bits), bits, settings)
    del graph.initializers[name]


def _to_block_gather(node: Any, values: list[Any], bits: int, settings: Settings) -> None:
    node.op_type, node.domain = "GatherBlockQuantized", _DOMAIN
    node.resize_inputs(1 + len(values))
    node.replace_input_with(0, values[0])
    for at, value in enumerate(values[1:]):
        node.replace_input_with(2 + at, value)
    node.attributes.clear()
    _attributes(node, bits=bits, block_size=settings.block, gather_axis=0, quantize_axis=1)


def _register(graph: Any, name: str, blocks: Blocks, bits: int) -> list[Any]:
    """Initializers of a quantized matrix, in the order both operators take them."""
    ir = require("onnx_ir", EXTRA)
    parts = [(f"{name}_Q{bits}", blocks.codes), (f"{name}_scales", blocks.scales), (f"{name}_zeros", blocks.zeros)]
    values = []
    for part, array in parts:
        if array is None:
            continue
        tensor = ir.Tensor(np.ascontiguousarray(array), name=part)
        value = ir.Value(name=part, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        graph.register_initializer(value)
        values.append(value)
    return values


def _attributes(node: Any, **values: int) -> None:
    ir = require("onnx_ir", EXTRA)
    for name, value in values.items():
        node.attributes[name] = ir.AttrInt64(name, value)


def quantize(weights: NDArray[np.float32], bits: int, settings: Settings, *, table: bool = False) -> Blocks:
    """Round a matrix (rows, columns) in blocks along its rows.

    Args:
        table: for a lookup, which takes no zero points of HQQ's kind.
    """
    method = "k_quant" if settings.method == "hqq" and (table or bits != 4) else settings.method
    step = max(1, _SLAB // weights.shape[1])
    parts = [_rounded(weights[start : start + step], bits, method, settings) for start in range(0, len(weights), step)]
    zeros = [part.zeros for part in parts if part.zeros is not None]
    return Blocks(
        np.concatenate([part.codes for part in parts]),
        np.concatenate([part.scales for part in parts]),
        np.concatenate(zeros) if zeros else None,
    )


def _rounded(weights: NDArray[np.float32], bits: int, method: Method, settings: Settings) -> Blocks:
    telemetry_off()
    helper, numpy_helper = require("onnx.helper", EXTRA), require("onnx.numpy_helper", EXTRA)
    tools = require("onnxruntime.quantization.matmul_nbits_quantizer", EXTRA)
    rows, blocks = len(weights), -(-weights.shape[1] // settings.block)
    if method == "k_quant" and bits == 4:
        weights = _padded(weights, settings.block)
    with _quiet(tools):
        quantizer = tools.MatMulNBitsQuantizer(
            _one_node(np.ascontiguousarray(weights.T)),
            bits=bits,
            block_size=settings.block,
            is_symmetric=settings.symmetric,
            algo_config=_algorithm(tools, bits, method, settings),
        )
        quantizer.process()
    graph = quantizer.model.model.graph
    node = next(node for node in graph.node if node.op_type == "MatMulNBits")
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    given = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    assert given["bits"] == bits and given["block_size"] == settings.block
    parts = [stored[name] for name in node.input[1:] if name]
    zeros = parts[2].reshape(rows, -1) if len(parts) > 2 else None
    # The zero points of two blocks share a byte, so none of them is lost with the padding.
    return Blocks(parts[0][:, :blocks], parts[1].reshape(rows, -1)[:, :blocks], zeros)


def _padded(weights: NDArray[np.float32], block: int) -> NDArray[np.float32]:
    """Zeros up to an even number of blocks per row: onnxruntime 1.32's k_quant ends in an error for odd ones."""
    return np.pad(weights, ((0, 0), (0, -weights.shape[1] % (2 * block))))


def _algorithm(tools: Any, bits: int, method: Method, settings: Settings) -> Any:
    if method == "k_quant":
        return tools.KQuantWeightOnlyQuantConfig(customized_weight_config={"matmul": {"bits": bits}})
    if method == "hqq":
        return tools.HQQWeightOnlyQuantConfig(block_size=settings.block, bits=bits)
    return None  # onnxruntime's own round-to-nearest


def _one_node(weights: NDArray[np.float32]) -> Any:
    helper, numpy_helper = require("onnx.helper", EXTRA), require("onnx.numpy_helper", EXTRA)
    real = require("onnx", EXTRA).TensorProto.FLOAT
    columns, rows = weights.shape
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="matmul")],
        "one",
        [helper.make_tensor_value_info("x", real, [1, columns])],
        [helper.make_tensor_value_info("y", real, [1, rows])],
        [numpy_helper.from_array(weights, "w")],
    )
    return helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 21)])


@contextlib.contextmanager
def _quiet(tools: Any) -> Iterator[None]:
    """onnxruntime's quantizer logs and prints for every matrix."""
    loggers = [tools.logger, logging.getLogger("neural_compressor")]
    before = [logger.disabled for logger in loggers]
    for logger in loggers:
        logger.disabled = True
    try:
        with contextlib.redirect_stdout(io.StringIO()), np.errstate(all="ignore"):
            yield
    finally:
        for logger, disabled in zip(loggers, before, strict=True):
            logger.disabled = disabled
