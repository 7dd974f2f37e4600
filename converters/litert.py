"""The LiteRT-LM converter: base + adapter into one .litertlm file, by LiteRT's own exporter in its toolchain.

The graph is made once per model and context, and kept: another number of bits then takes seconds.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgeft import toolchain
from edgeft.artifact import Artifact, manifest_path, write_manifest
from edgeft.errors import UnsupportedModel, UsageError, WriteError
from edgeft.paths import sync_directory
from edgeft.plugins import ConvertOptions, Plan, Source, Support, Target
from edgeft.progress import Progress

from . import kept_exports
from .gguf_convert import check_space
from .gguf_plan import stop_ids
from .litert_recipe import RECIPES, Details, Recipe, make_plan, recipe_rules
from .litert_template import for_engine
from .onnx_write import template_of
from .reading import reading
from .staged_model import check_source, describe, stage

TOOLCHAIN = "litert"
PREFILL = 128
"""Tokens of a prompt per call. LiteRT-LM fills the last call up and leaves what is too much unseen."""

_TRIED = ("llama", "qwen2", "qwen3", "gemma3_text", "phi3", "mistral")
_RUNTIMES = ("litert-lm", "litert")


class LitertConverter:
    targets: Mapping[str, Target] = {
        name: Target(name, recipe.description, recipe.bits_per_weight, _RUNTIMES, suffix=".litertlm")
        for name, recipe in RECIPES.items()
    }

    def ready(self) -> Support:
        return kept_exports.toolchain_support(TOOLCHAIN)

    def plan(self, source: Source, target: str, options: ConvertOptions) -> Plan:
        if target not in RECIPES:
            raise UsageError(f"no LiteRT target {target!r}", f"There are: {', '.join(RECIPES)}.")
        check_source(source, target)
        with reading(source):
            plan = make_plan(source, target, options)
        kind = plan.details.weights.config.get("model_type")
        if kind not in _TRIED:
            raise UnsupportedModel(
                f"LiteRT export of {kind} models has not been tried; known are {', '.join(_TRIED)}",
                "Export to GGUF: --to gguf-q4.",
            )
        return plan

    def convert(self, plan: Plan, progress: Progress) -> Artifact:
        """Raises besides: MissingDependency without the toolchain, PluginError when it fails."""
        out = plan.options.out
        used = toolchain.find_toolchain(TOOLCHAIN)
        toolchain.python_of(used)  # before a folder is made
        check_space(out, plan.bytes)
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=f".{out.name}.", suffix=".tmp", dir=out.parent) as name:
                return _convert(plan, used, Path(name), progress)
        except OSError as error:
            raise WriteError.from_os_error(error, out) from error


def _convert(plan: Plan, used: toolchain.Toolchain, work: Path, progress: Progress) -> Artifact:
    details, out = plan.details, plan.options.out
    assert isinstance(details, Details)
    model = work / "model"
    stage(plan.source, details.weights, model, plan.options.round, progress, text_only=True)
    graph = _graph(plan, used, model, work, progress)
    made = work / out.name
    result = toolchain.call(used, _packing(plan, details.recipe, model, graph, made), progress)
    manifest = describe(plan, "litertlm", made, result)
    # An older manifest must not stand beside the new file, whenever the power fails.
    manifest_path(out).unlink(missing_ok=True)
    made.replace(out)
    sync_directory(out.parent)
    write_manifest(out, manifest)
    return Artifact(out, manifest)


def _graph(plan: Plan, used: toolchain.Toolchain, model: Path, work: Path, progress: Progress) -> Path:
    """The float graph, made now or kept from an earlier export of the same weights."""
    recipe = plan.details.recipe
    settings = {"context": recipe.context, "prefill": PREFILL}
    key = kept_exports.key(plan, used, model / "config.json", settings)
    found = kept_exports.find(used, key)
    if found is not None:
        return found
    stage(plan.source, plan.details.weights, model, plan.options.round, progress)
    graph = work / "graph.tflite"
    request = {"do": "graph", "model": str(model), "work": str(work), "out": str(graph), **settings}
    toolchain.call(used, request, progress)
    for file in model.glob("*.safetensors"):  # a link, or as large as the graph
        file.unlink()
    return kept_exports.keep(used, key, graph)


def _packing(plan: Plan, recipe: Recipe, model: Path, graph: Path, out: Path) -> dict[str, Any]:
    template = template_of(plan.source)
    tokenizer = out.parent / "tokenizer.json"
    shutil.copyfile(model / "tokenizer.json", tokenizer)
    return {
        "do": "pack",
        "graph": str(graph),
        "work": str(out.parent),
        "out": str(out),
        "recipe": recipe_rules(recipe),
        "tokenizer": str(tokenizer),
        "template": None if template is None else for_engine(template, model),
        "start": None,
        "stops": list(stop_ids(plan.source)),
        "context": recipe.context,
        "model_type": str(plan.details.weights.config.get("model_type")),
    }


converter = LitertConverter()
