"""The ExecuTorch converter: base + adapter into a folder with a .pte program for XNNPACK, made in its toolchain.

Beside the program lie the tokenizer, as an app needs it, and the chat template.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from edgeft import toolchain
from edgeft.artifact import Artifact, write_manifest
from edgeft.errors import UsageError, WriteError
from edgeft.paths import parse_json, write_json
from edgeft.plugins import ConvertOptions, Plan, Source, Support, Target
from edgeft.progress import Progress

from . import kept_exports
from .executorch_plan import RECIPES, Details, make_plan
from .gguf_convert import check_space
from .gguf_plan import stop_ids
from .onnx_write import atomic_directory
from .reading import reading
from .staged_model import check_source, describe, stage, write_text_side

TOOLCHAIN = "executorch"
PROGRAM = "model.pte"
_ABOUT = "weights.json"
"""Beside a kept program: what the toolchain said of its weights."""


class ExecutorchConverter:
    targets: Mapping[str, Target] = {
        name: Target(name, recipe.description, recipe.bits_per_weight, ("executorch",), True, "-executorch")
        for name, recipe in RECIPES.items()
    }

    def ready(self) -> Support:
        return kept_exports.toolchain_support(TOOLCHAIN)

    def plan(self, source: Source, target: str, options: ConvertOptions) -> Plan:
        if target not in RECIPES:
            raise UsageError(f"no ExecuTorch target {target!r}", f"There are: {', '.join(RECIPES)}.")
        check_source(source, target)
        with reading(source):
            return make_plan(source, target, options)

    def convert(self, plan: Plan, progress: Progress) -> Artifact:
        """Raises besides: MissingDependency without the toolchain, PluginError when it fails."""
        out, details = plan.options.out, plan.details
        assert isinstance(details, Details)
        toolchain.python_of(toolchain.find_toolchain(TOOLCHAIN))  # before a folder is made
        check_space(out, plan.bytes)
        with atomic_directory(out) as folder:
            write_text_side(plan.source, details.weights, folder)
            kept = _program(plan, folder, progress)
            shutil.copyfile(kept / PROGRAM, folder / PROGRAM)
            result = parse_json((kept / _ABOUT).read_bytes())
            manifest = describe(plan, "pte", folder, result)
        try:
            write_manifest(out, manifest)
        except WriteError:
            shutil.rmtree(out)  # a command that failed leaves no result
            raise
        return Artifact(out, manifest)


def _program(plan: Plan, folder: Path, progress: Progress) -> Path:
    """A folder with the program, made now or kept from an earlier export of the same weights and settings."""
    used, recipe = toolchain.find_toolchain(TOOLCHAIN), plan.details.recipe
    settings = {
        "context": recipe.context,
        "bits": recipe.bits,
        "group": recipe.group,
        "eight": list(recipe.eight),
        "stops": list(stop_ids(plan.source)),
        "bos": plan.details.weights.config.get("bos_token_id"),
    }
    key = kept_exports.key(plan, used, folder / "config.json", settings)
    found = kept_exports.find(used, key)
    if found is not None:
        return found
    with tempfile.TemporaryDirectory(prefix=f".{plan.options.out.name}.", dir=plan.options.out.parent) as name:
        model, made = Path(name) / "staged", Path(name) / "made"
        made.mkdir()
        stage(plan.source, plan.details.weights, model, plan.options.round, progress)
        request = {"model": str(model), "out": str(made / PROGRAM), **settings}
        write_json(made / _ABOUT, dict(toolchain.call(used, request, progress)))
        return kept_exports.keep(used, key, made)


converter = ExecutorchConverter()
