"""The ONNX converter: base + adapter into a directory for onnxruntime, one tensor in memory at a time."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path

from edgeft.artifact import Artifact
from edgeft.errors import MissingDependency, UsageError
from edgeft.plugins import ConvertOptions, Plan, Source, Support, Target
from edgeft.progress import Progress

_RUNTIMES = ("onnxruntime-genai", "onnxruntime")
_NEEDS = ("onnxruntime_genai", "onnxruntime", "onnx", "onnx_ir", "torch", "transformers", "safetensors", "xllamacpp")

_TARGETS: Mapping[str, tuple[str, float]] = {
    "onnx-q4": ("4 bits, head and embedding 8: MatMulNBits for onnxruntime.", 6.0),
    "onnx-int8": ("8 bits; hardly distinguishable from the original.", 9.3),
    "onnx-fp32": ("Not quantized, float32.", 32.0),
}


class OnnxConverter:
    targets: Mapping[str, Target] = {
        name: Target(name, description, bits, _RUNTIMES, directory=True)
        for name, (description, bits) in _TARGETS.items()
    }

    def ready(self) -> Support:
        missing = [name for name in _NEEDS if importlib.util.find_spec(name) is None]
        if missing:
            return Support(False, f"{', '.join(missing)} not installed", "pip install 'edgeft[onnx-export]'")
        return Support(True)

    def plan(self, source: Source, target: str, options: ConvertOptions) -> Plan:
        from .onnx_plan import make_plan
        from .reading import reading

        if target not in _TARGETS:
            raise UsageError(f"no ONNX target {target!r}", f"There are: {', '.join(_TARGETS)}.")
        with reading(source):
            return make_plan(source, target, options)

    def convert(self, plan: Plan, progress: Progress) -> Artifact:
        if not (support := self.ready()).ok:  # before a folder is made
            raise MissingDependency(support.reason, support.install)
        from .ggml import load
        from .onnx_write import convert

        return convert(plan, load(), progress)

    def from_graph(
        self, file: Path, model: Path, source: Source, target: str, options: ConvertOptions, progress: Progress
    ) -> Artifact:
        """Quantize a float graph of another exporter's. See `onnx_graph_file.quantize_file`."""
        if not (support := self.ready()).ok:
            raise MissingDependency(support.reason, support.install)
        from .onnx_graph_file import quantize_file

        return quantize_file(file, model, source, target, options, progress)


converter = OnnxConverter()
