"""Runs in the toolchain `litert`: a Hugging Face folder into a float graph, and a graph into a .litertlm file.

Request "graph": {"do": "graph", "model": folder, "work": folder, "out": file, "context": tokens, "prefill": tokens}.
Request "pack": {"do": "pack", "graph": file, "work": folder, "out": file, "recipe": [rule] or null, "tokenizer": file,
"template": text or null, "start": token id or null, "stops": [token id], "context": tokens, "model_type": name}. The
result is {"types": {type: weights}, "bytes": weights' bytes}.
"""

import importlib.machinery
import json
import os
import sys
import types
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["JAX_PLATFORMS"] = "cpu"

Send = Callable[[dict[str, Any]], None]

STEPS = 22
"""Steps that the exporter announces while it makes a graph with two signatures."""

KINDS = {"qwen3": "qwen3", "qwen2": "qwen2p5", "gemma3_text": "gemma3"}
"""Model type -> LiteRT-LM's name of its way to write tool calls and thoughts; the others are generic."""

TYPES = {0: ("fp32", 32), 1: ("fp16", 16), 9: ("int8", 8), 17: ("int4", 4), 19: ("int2", 2)}
"""TensorType of the TFLite schema -> edgeft's name, bits."""


def main() -> None:
    request = json.load(sys.stdin)
    events = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # libraries print, those in C++ too

    def send(event: dict[str, Any]) -> None:
        events.write(json.dumps(event) + "\n")

    with redirect_stdout(sys.stderr):
        send({"result": (make_graph if request["do"] == "graph" else pack)(request, send)})


def make_graph(request: dict[str, Any], send: Send) -> dict[str, Any]:
    """Trace the model twice, for whole batches of a prompt and for one token, into one file that shares weights."""
    send({"start": "Making the LiteRT graph", "total": STEPS})
    with_tensorflow_schema()
    from litert_torch import progress
    from litert_torch.generative.export_hf.core import export_lib
    from litert_torch.generative.export_hf.core.exportable_module import ExportableModuleConfig

    without_tensorflow_schema()
    progress.console = Watcher(send)
    config = ExportableModuleConfig(
        model=request["model"],
        output_dir=request["work"],
        work_dir=request["work"],
        cache_length=request["context"],
        prefill_lengths=[request["prefill"]],
        quantization_recipe=None,
    )
    if config.cache_lengths is None:
        config.cache_lengths = [config.cache_length]
    source = export_lib.load_model(request["model"], config)
    config = export_lib.update_export_config(config, source)
    made = export_lib.export_text_prefill_decode_model(source, config, export_lib.ExportedModelArtifacts())
    os.replace(made.prefill_decode_model_path, request["out"])
    return {}


class Watcher:
    """In the place of the exporter's console: every step it announces is one step done."""

    def __init__(self, send: Send) -> None:
        self.send = send

    def print(self, text: object = "", *_: object, **__: object) -> None:
        if "[START]" in (line := str(text)):
            self.send({"advance": 1, "note": step(line)})


def step(line: str) -> str:
    """The innermost step of "[START] outer > inner", without markup and without a path, which would fill the line."""
    plain = line.replace("[bold default]", "").replace("[/bold default]", "")
    return plain.rpartition("] ")[2].rpartition(" > ")[2].partition(" to /")[0].strip()


SCHEMA = ("tensorflow", "tensorflow.lite", "tensorflow.lite.python")


def with_tensorflow_schema() -> None:
    """litert_torch takes the schema of TFLite from TensorFlow, which is otherwise not needed: ai-edge-litert has it."""
    from ai_edge_litert import schema_py_generated as schema

    for name in SCHEMA:
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        module.__path__ = []
        sys.modules[name] = module
        if "." in name:
            parent, _, own = name.rpartition(".")
            setattr(sys.modules[parent], own, module)
    sys.modules[SCHEMA[-1]].schema_py_generated = schema  # type: ignore[attr-defined]
    sys.modules[SCHEMA[-1] + ".schema_py_generated"] = schema


def without_tensorflow_schema() -> None:
    """Other libraries look for TensorFlow too, and would take the stand-in for it."""
    for name in (*SCHEMA, SCHEMA[-1] + ".schema_py_generated"):
        sys.modules.pop(name, None)


def pack(request: dict[str, Any], send: Send) -> dict[str, Any]:
    """Quantize the graph, and put it into one file with the tokenizer and what the engine must know."""
    send({"start": "Quantizing and packing", "total": 2})
    graph = quantized(Path(request["graph"]), request["recipe"], Path(request["work"]))
    send({"advance": 1, "note": "packing"})
    import litert_lm_builder as lm

    metadata = Path(request["work"]) / "llm_metadata.pb"
    metadata.write_bytes(described(request))
    builder = lm.LitertLmFileBuilder()
    builder.add_system_metadata(lm.Metadata(key="Authors", value="edgeft", dtype=lm.DType.STRING))
    builder.add_llm_metadata(str(metadata))
    builder.add_hf_tokenizer(request["tokenizer"])
    builder.add_tflite_model(str(graph), lm.TfLiteModelType.PREFILL_DECODE)
    with open(request["out"], "wb") as stream:
        builder.build(stream)
        stream.flush()
        os.fsync(stream.fileno())
    return counted(graph)


def quantized(graph: Path, recipe: list[dict[str, Any]] | None, work: Path) -> Path:
    if recipe is None:
        return graph
    from ai_edge_quantizer import quantizer

    out = work / "quantized.tflite"
    tool = quantizer.Quantizer(str(graph))
    tool.load_quantization_recipe(recipe)
    tool.quantize().export_model(str(out), overwrite=True)
    return out


def described(request: dict[str, Any]) -> bytes:
    """LlmMetadata: the template, and the ids that begin a prompt and end an answer."""
    from litert_lm_builder.runtime.proto import llm_metadata_pb2

    metadata = llm_metadata_pb2.LlmMetadata()
    if request["start"] is not None:
        metadata.start_token.token_ids.ids.append(request["start"])
    for token in request["stops"]:
        metadata.stop_tokens.add().token_ids.ids.append(token)
    if request["template"] is not None:
        metadata.jinja_prompt_template = request["template"]
    metadata.max_num_tokens = request["context"]
    getattr(metadata.llm_model_type, KINDS.get(request["model_type"], "generic_model")).SetInParent()
    return metadata.SerializeToString()  # type: ignore[no-any-return]


def counted(graph: Path) -> dict[str, Any]:
    """How many weights the file really has of each type: tensors with data of their own, each buffer once.

    Bytes are of weights, scales and zero points (float32 and int64), which every tensor has for itself.
    """
    from ai_edge_litert import schema_py_generated as schema

    model = schema.Model.GetRootAs(graph.read_bytes(), 0)
    seen: set[int] = set()
    mix: dict[str, int] = {}
    size = 0
    for subgraph in (model.Subgraphs(at) for at in range(model.SubgraphsLength())):
        for tensor in (subgraph.Tensors(at) for at in range(subgraph.TensorsLength())):
            if (scaled := tensor.Quantization()) is not None:
                size += 4 * scaled.ScaleLength() + 8 * scaled.ZeroPointLength()
            buffer = model.Buffers(tensor.Buffer())
            length = buffer.DataLength() or buffer.Size()
            kind = TYPES.get(tensor.Type())
            if kind is None or tensor.Buffer() in seen or length == 0:
                continue
            seen.add(tensor.Buffer())
            mix[kind[0]] = mix.get(kind[0], 0) + length * 8 // kind[1]
            size += length
    return {"types": mix, "bytes": size}


if __name__ == "__main__":
    main()
