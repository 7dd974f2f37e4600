"""`--engine optimum`: the graph by Optimum, in its toolchain; everything after the graph by edgeft.

For architectures that onnxruntime-genai's builder does not know. The merged model is written to the disk in float32
and read again by Optimum, so it takes the time, memory and disk that the one-pass route saves.
"""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgeft import plugins, toolchain
from edgeft.artifact import Artifact, write_manifest
from edgeft.errors import UsageError, WriteError
from edgeft.export import Origin
from edgeft.paths import parse_json, write_json
from edgeft.plugins import ConvertOptions
from edgeft.progress import Progress
from edgeft.three_passes import merge

NAME = "optimum"


def check(origin: Origin, target: str) -> None:
    """Raises: UsageError for what this route cannot do, MissingDependency when its toolchain is not installed."""
    if origin.source.packed is not None or origin.source.gguf is not None:
        raise UsageError(f"{origin.name} was trained for a GGUF file", "Leave out --engine.")
    if not target.startswith("onnx-"):
        raise UsageError(f"--engine optimum makes ONNX folders, not {target}", "Use --to onnx-q4, for instance.")
    toolchain.python_of(toolchain.find_toolchain(NAME))


def run(origin: Origin, target: str, out: Path, settings: Mapping[str, str], progress: Progress) -> Artifact:
    """Merge, export the graph, quantize it.

    Raises:
        UnsupportedModel: Optimum does not know the architecture either.
        PluginError, WriteError, MissingDependency
    """
    check(origin, target)
    converter: Any = plugins.load("converters", "onnx")
    options = ConvertOptions(out, extra={"settings": settings})
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as name:
            model = model_folder(origin, Path(name) / "model")
            graph = Path(name) / "graph"
            request = {"model": str(model), "out": str(graph)}
            result = toolchain.call(toolchain.find_toolchain(NAME), request, progress)
            artifact: Artifact = converter.from_graph(
                graph / result["file"], model, origin.source, target, options, progress
            )
    except OSError as error:
        raise WriteError.from_os_error(error, out) from error
    assert artifact.manifest is not None
    manifest = dataclasses.replace(
        artifact.manifest,
        base={**artifact.manifest.base, "digest": origin.base_digest},
        run=str(origin.run.path) if origin.run else None,
        system=origin.run.manifest().data.get("system") if origin.run else None,
        licence=origin.licence,
    )
    write_manifest(out, manifest)
    return Artifact(out, manifest)


def model_folder(origin: Origin, folder: Path) -> Path:
    """The merged model as the toolchain's transformers reads it; without an adapter the weights are links."""
    source = origin.source
    if source.adapter is not None or source.nf4:
        merge(origin, folder, rounded=False)
    else:
        folder.mkdir(parents=True)
        for file in source.base.iterdir():
            if file.is_file():
                shutil.copy(file, folder) if file.suffix in (".json", ".jinja", ".model") else (
                    folder / file.name
                ).symlink_to(file.absolute())
        if source.chat_template is not None:
            (folder / "chat_template.jinja").write_text(source.chat_template, encoding="utf-8")
    file = folder / "config.json"
    write_json(file, older_config(parse_json(file.read_text(encoding="utf-8"))))
    return folder


def older_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration of transformers 5 in the words of transformers 4, which would pass over the new ones in silence.

    `rope_parameters` holds what used to be `rope_theta` and `rope_scaling`; `dtype` was `torch_dtype`.
    """
    older = {name: value for name, value in config.items() if name not in ("rope_parameters", "dtype")}
    rope = dict(config.get("rope_parameters") or {})
    if any(isinstance(value, Mapping) for value in rope.values()):
        raise UsageError(
            "Optimum's transformers has no words for different rotary embeddings per layer", "--to gguf-q4"
        )
    if (theta := rope.pop("rope_theta", None)) is not None:
        older["rope_theta"] = theta
    if (share := rope.pop("partial_rotary_factor", None)) is not None:
        older["partial_rotary_factor"] = share
    if rope.get("rope_type", "default") != "default":
        older["rope_scaling"] = rope
    if (dtype := config.get("dtype")) is not None:
        older["torch_dtype"] = dtype
    return older
