"""A float graph that another exporter wrote, such as Optimum's, into a folder for plain onnxruntime.

Its matrices become constants of MatMul nodes first, as the model builder writes them; then they are rounded as those
are. Weights are read from the graph's own file when they are rounded, one at a time.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edgeft import __version__
from edgeft.artifact import Artifact, Manifest, digest_of, size_of, write_manifest
from edgeft.errors import UnsupportedModel, require
from edgeft.models.text import own_template
from edgeft.paths import sha256_file
from edgeft.plugins import ConvertOptions, Source
from edgeft.progress import Progress

from .adapter import WEIGHTS
from .gguf_plan import stop_ids
from .onnx_graph import Graph
from .onnx_lazy import EXTRA, telemetry_off
from .onnx_plan import TARGETS, TYPE_NAMES, read_settings
from .onnx_quantize import quantize_graph
from .onnx_write import _INLINE, DATA, MODEL, atomic_directory, copy_text

KIND = "growing-cache"
"""model.type in genai_config.json: keys and values come back longer from every call; for plain onnxruntime alone."""


def quantize_file(
    file: Path, model: Path, source: Source, target: str, options: ConvertOptions, progress: Progress
) -> Artifact:
    """Write the folder `options.out` and its manifest.

    Args:
        file: the graph, in float32, with inputs `past_key_values.*` and outputs `present.*` and `logits`.
        model: the merged model's folder: configuration, tokenizer, template.
        options: `extra["settings"]` as for `onnx-q4`; "head-bits" and so on.

    Raises:
        UnsupportedModel: the graph has no such inputs.
        UsageError, WriteError, MissingDependency
    """
    telemetry_off()
    ir = require("onnx_ir", EXTRA)
    settings = read_settings(TARGETS[target], options.extra.get("settings") or {})
    loaded = ir.load(file)
    graph = prepare(loaded)
    counts = {name: _count(loaded.graph.initializers[name]) for name in _weights(loaded)}
    progress.start("Quantizing" if settings.bits < 32 else "Writing", sum(counts.values()), "weights")
    try:
        with atomic_directory(options.out) as folder:
            copy_text(model, folder)
            _write_json(folder / "genai_config.json", runtime_config(loaded, model))
            bits = quantize_graph(graph, settings, progress.advance) if settings.bits < 32 else {}
            loaded.graph.opset_imports["com.microsoft"] = 1
            ir.save(loaded, folder / MODEL, external_data=DATA, size_threshold_bytes=_INLINE)
            mix: dict[str, int] = {}
            for name, count in counts.items():
                kind = TYPE_NAMES[bits.get(name, 32)]
                mix[kind] = mix.get(kind, 0) + count
            manifest = _manifest(source, model, target, mix, folder)
    finally:
        progress.finish()
    write_manifest(options.out, manifest)
    return Artifact(options.out, manifest)


def prepare(model: Any) -> Graph:
    """Bring every constant matrix into the form MatMul(x, W), W (columns, rows); in place."""
    for node in list(model.graph):
        if node.op_type == "Gemm":
            _split_gemm(model.graph, node)
    for node in list(model.graph):
        if node.op_type == "MatMul":
            _unfold_transpose(model.graph, node)
            _share_table(model.graph, node)
    matrices = {node.inputs[1].name for node in model.graph if node.op_type == "MatMul" and _is_matrix(node.inputs[1])}
    tables = {node.inputs[0].name for node in model.graph if node.op_type == "Gather" and _is_matrix(node.inputs[0])}
    return Graph(model, frozenset(matrices | tables))


def _is_matrix(value: Any) -> bool:
    """A float32 constant with two axes, both longer than one."""
    ir = require("onnx_ir", EXTRA)
    constant = getattr(value, "const_value", None)
    if constant is None or constant.dtype != ir.DataType.FLOAT:
        return False
    shape = constant.shape.numpy()
    return len(shape) == 2 and min(shape) > 1


def _split_gemm(graph: Any, node: Any) -> None:
    """Gemm(x, W, b) with factors of one is MatMul and Add: what GPT-2's projections are exported as."""
    ir = require("onnx_ir", EXTRA)
    given = {name: attribute.value for name, attribute in node.attributes.items()}
    plain = given.get("alpha", 1.0) == given.get("beta", 1.0) == 1.0 and not given.get("transA", 0)
    if not plain or not _is_matrix(node.inputs[1]):
        return
    weight = node.inputs[1]
    if given.get("transB", 0):
        weight = _transposed(graph, weight)
    output, bias = node.outputs[0], node.inputs[2] if len(node.inputs) > 2 else None
    product = ir.node("MatMul", [node.inputs[0], weight], name=f"{node.name}/MatMul")
    graph.insert_before(node, product)
    last = product
    if bias is not None:
        last = ir.node("Add", [product.outputs[0], bias], name=f"{node.name}/Add")
        graph.insert_before(node, last)
    for number, one in enumerate(dict.fromkeys((product, last))):
        one.outputs[0].name = f"{node.name}/plain_{number}"
        one.outputs[0].type = output.type
    _replace(graph, output, last.outputs[0])
    graph.remove(node, safe=True)


def _unfold_transpose(graph: Any, node: Any) -> None:
    """MatMul(x, Transpose(E)) of a table E that is also looked up: make W = Eᵀ the constant, and look up in Wᵀ."""
    producer = node.inputs[1].producer()
    if producer is None or producer.op_type != "Transpose" or not _is_matrix(producer.inputs[0]):
        return
    table, alone = producer.inputs[0], len(list(node.inputs[1].uses())) == 1
    weight = _transposed(graph, table)
    node.replace_input_with(1, weight)
    if alone:
        graph.remove(producer, safe=True)
    if any(user.op_type == "Gather" for user, _ in table.uses()):
        _look_up_in(graph, table, weight)
    elif not list(table.uses()):
        del graph.initializers[table.name]


def _share_table(graph: Any, node: Any) -> None:
    """A head that is a looked-up table, transposed when it was exported: keep one of the two, so that it ships once."""
    if not (node.outputs[0].is_graph_output() and _is_matrix(node.inputs[1])):
        return
    weight = node.inputs[1]
    shape = tuple(reversed(weight.const_value.shape.numpy()))
    for gather in list(graph):
        table = gather.inputs[0] if gather.op_type == "Gather" else None
        if table is None or not _is_matrix(table) or table.const_value.shape.numpy() != shape:
            continue
        if np.array_equal(table.const_value.numpy().T, weight.const_value.numpy()):
            _look_up_in(graph, table, weight)


def _look_up_in(graph: Any, table: Any, weight: Any) -> None:
    """Look up in the transpose of `weight` what was looked up in `table`."""
    ir = require("onnx_ir", EXTRA)
    back = ir.node("Transpose", [weight], {"perm": [1, 0]}, name=f"{table.name}/Transpose")
    back.outputs[0].name = f"{table.name}/transposed"
    users = [(user, at) for user, at in table.uses() if user.op_type == "Gather"]
    graph.insert_before(users[0][0], back)
    for user, at in users:
        user.replace_input_with(at, back.outputs[0])
    if not list(table.uses()):
        del graph.initializers[table.name]


def _transposed(graph: Any, value: Any) -> Any:
    """A constant that is another one transposed, made when it is needed."""
    ir = require("onnx_ir", EXTRA)
    name, constant = f"{value.name}.T", value.const_value
    if name in graph.initializers:
        return graph.initializers[name]
    shape = ir.Shape(tuple(reversed(constant.shape.numpy())))

    def make() -> Any:
        return ir.Tensor(constant.numpy().T.copy(), name=name)

    new = ir.Value(name=name, shape=shape, type=ir.TensorType(ir.DataType.FLOAT))
    new.const_value = ir.LazyTensor(make, dtype=ir.DataType.FLOAT, shape=shape, name=name)
    graph.register_initializer(new)
    return new


def _replace(graph: Any, old: Any, new: Any) -> None:
    for user, at in list(old.uses()):
        user.replace_input_with(at, new)
    for at, value in enumerate(graph.outputs):
        if value is old:
            new.name, new.shape, new.type = old.name, old.shape, old.type
            graph.outputs[at] = new


def runtime_config(model: Any, folder: Path) -> dict[str, Any]:
    """What a runtime has to know, as genai_config.json has it: of the graph's own inputs.

    Raises:
        UnsupportedModel: keys and values are not where they are expected.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    keys = [value for value in model.graph.inputs if value.name.endswith((".key", ".value"))]
    if not keys or not all(value.name.startswith("past_key_values.") and len(value.shape) == 4 for value in keys):
        raise UnsupportedModel("the graph does not take keys and values of four axes", "Export to GGUF: --to gguf-q4.")
    _, heads, _, head = keys[0].shape
    logits = next(value for value in model.graph.outputs if value.name == "logits")
    context = next(
        (config[name] for name in ("max_position_embeddings", "n_positions", "n_ctx") if name in config), 2048
    )
    return {
        "model": {
            "type": KIND,
            "context_length": int(context),
            "vocab_size": int(logits.shape[-1]) if isinstance(logits.shape[-1], int) else int(config["vocab_size"]),
            "decoder": {
                "filename": MODEL,
                "num_hidden_layers": len(keys) // 2,
                "num_key_value_heads": int(heads),
                "head_size": int(head),
            },
        }
    }


def _weights(model: Any) -> list[str]:
    """Float constants that count as parameters: all but scalars and small tables of shapes."""
    ir = require("onnx_ir", EXTRA)
    return [
        name
        for name, value in model.graph.initializers.items()
        if value.const_value is not None and value.const_value.dtype == ir.DataType.FLOAT and _count(value) > 1
    ]


def _count(value: Any) -> int:
    return math.prod(int(length) for length in value.const_value.shape.numpy())


def _manifest(source: Source, model: Path, target: str, mix: Mapping[str, int], folder: Path) -> Manifest:
    weights, size, template = sum(mix.values()), size_of(folder), own_template(folder)
    return Manifest(
        format="onnx",
        target=target,
        types=dict(mix),
        parameters=weights,
        bits_per_weight=8 * (folder / DATA).stat().st_size / weights,
        bytes=size,
        sha256=digest_of(folder),
        base={"reference": source.reference, "path": str(source.base)},
        adapter={"path": str(source.adapter), "digest": sha256_file(source.adapter / WEIGHTS)}
        if source.adapter
        else None,
        chat_template_sha256=None if template is None else hashlib.sha256(template.encode()).hexdigest(),
        stop_token_ids=stop_ids(source),
        notes=("graph exported by Optimum; keys and values are copied at every token",),
        edgeft_version=__version__,
    )


def _write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
