"""The GGUF converter: base + adapter straight into a quantized file, in one pass over the weights."""

from __future__ import annotations

from collections.abc import Mapping

from edgeft.artifact import Artifact
from edgeft.errors import MissingDependency, UsageError
from edgeft.plugins import ConvertOptions, Plan, Source, Support, Target
from edgeft.progress import Progress

_RUNTIMES = ("llama-cpp-python", "xllamacpp")

_MIXTURES: Mapping[str, tuple[str, str, float]] = {
    # target -> (mixture, description, nominal bits per weight)
    "gguf-q4": ("best", "The best real 4-bit mixture for the model's shapes.", 4.8),
    "gguf-q4_k_m": ("Q4_K_M", "llama.cpp's Q4_K_M.", 4.8),
    "gguf-q4_0": ("Q4_0", "llama.cpp's Q4_0: fastest to make and to run, least exact.", 4.6),
    "gguf-q8_0": ("Q8_0", "8 bits; hardly distinguishable from the original.", 8.5),
    "gguf-bf16": ("BF16", "Not quantized, bfloat16.", 16.0),
    "gguf-f16": ("F16", "Not quantized, float16.", 16.0),
}

_ADAPTERS: Mapping[str, tuple[str, str, float]] = {
    # target -> (type of both matrices, description, bits per weight of the adapter)
    "gguf-lora": ("F32", "The adapter alone, for an unmerged base GGUF.", 32.0),
    "gguf-lora-f16": ("F16", "The same in half the size, with activations rounded to float16.", 16.0),
}


class GgufConverter:
    targets: Mapping[str, Target] = {
        name: Target(name, description, bits, _RUNTIMES)
        for name, (_, description, bits) in {**_MIXTURES, **_ADAPTERS}.items()
    }

    def ready(self) -> Support:
        try:
            from .ggml import load

            load()
        except MissingDependency as error:
            return Support(False, error.message, error.hint)
        except ImportError as error:
            return Support(False, f"{error.name} is not installed", "pip install 'edgeft[export]'")
        return Support(True)

    def plan(self, source: Source, target: str, options: ConvertOptions) -> Plan:
        from .ggml import load
        from .gguf_plan import make_plan

        if target in _ADAPTERS:
            from . import gguf_lora

            return gguf_lora.make_plan(source, target, _ADAPTERS[target][0], options, load())
        if target not in _MIXTURES:
            raise UsageError(f"no GGUF target {target!r}", f"There are: {', '.join(self.targets)}.")
        return make_plan(source, target, _MIXTURES[target][0], options, load())

    def convert(self, plan: Plan, progress: Progress) -> Artifact:
        from .ggml import load

        if plan.target in _ADAPTERS:
            from . import gguf_lora

            return gguf_lora.convert(plan, load(), progress)
        from .gguf_convert import convert

        return convert(plan, load(), progress)


converter = GgufConverter()
