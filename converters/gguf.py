"""The GGUF converter: base + adapter straight into a quantized file, in one pass over the weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeft.artifact import Artifact
from edgeft.errors import MissingDependency, UsageError
from edgeft.plugins import ConvertOptions, Plan, Source, Support, Target
from edgeft.progress import Progress

if TYPE_CHECKING:
    from .merged import Merged

_RUNTIMES = ("llama-cpp-python", "xllamacpp")

_MIXTURES: Mapping[str, tuple[str, str, float]] = {
    # target -> (mixture, description, bits per weight of a Llama of 8B)
    "gguf": ("fit", "Types chosen tensor by tensor for a size: with --fit or --bpw.", 0.0),
    "gguf-q4": ("best", "The best real 4-bit mixture for the model's shapes.", 4.8),
    "gguf-q4_k_m": ("Q4_K_M", "llama.cpp's Q4_K_M.", 4.8),
    "gguf-q4_k_s": ("Q4_K_S", "Q4_K_M without the extra bits.", 4.6),
    "gguf-q4_0": ("Q4_0", "Fastest to make and to run, least exact.", 4.6),
    "gguf-q4_1": ("Q4_1", "Q4_0 with an offset per block.", 5.1),
    "gguf-iq4_nl": ("IQ4_NL", "4 bits at uneven levels, blocks of 32.", 4.6),
    "gguf-iq4_xs": ("IQ4_XS", "4 bits at uneven levels, blocks of 256.", 4.4),
    "gguf-mxfp4": ("MXFP4", "Experts in MXFP4, all else in Q8_0.", 8.5),
    "gguf-q5_0": ("Q5_0", "5 bits, blocks of 32.", 5.6),
    "gguf-q5_1": ("Q5_1", "Q5_0 with an offset per block.", 6.0),
    "gguf-q5_k_s": ("Q5_K_S", "Q5_K_M without the extra bits.", 5.6),
    "gguf-q5_k_m": ("Q5_K_M", "5 bits, 6 where it matters most.", 5.7),
    "gguf-q6_k": ("Q6_K", "6 bits.", 6.6),
    "gguf-q8_0": ("Q8_0", "8 bits; hardly distinguishable from the original.", 8.5),
    "gguf-q3_k_s": ("Q3_K_S", "3 bits.", 3.6),
    "gguf-q3_k_m": ("Q3_K_M", "3 bits, up to 5 where it matters most.", 4.0),
    "gguf-q3_k_l": ("Q3_K_L", "3 bits, 5 in more places.", 4.3),
    "gguf-q2_k": ("Q2_K", "2 bits, 3 where it matters most.", 3.2),
    "gguf-q2_k_s": ("Q2_K_S", "2 bits; with an importance matrix.", 3.0),
    "gguf-iq3_m": ("IQ3_M", "3 bits of a codebook.", 3.8),
    "gguf-iq3_s": ("IQ3_S", "3 bits of a codebook.", 3.7),
    "gguf-iq3_xs": ("IQ3_XS", "3 bits of a codebook; with an importance matrix.", 3.5),
    "gguf-iq3_xxs": ("IQ3_XXS", "3 bits of a codebook; with an importance matrix.", 3.3),
    "gguf-iq2_m": ("IQ2_M", "2 bits of a codebook; with an importance matrix.", 2.9),
    "gguf-iq2_s": ("IQ2_S", "2 bits of a codebook; with an importance matrix.", 2.7),
    "gguf-iq2_xs": ("IQ2_XS", "2 bits of a codebook; with an importance matrix.", 2.6),
    "gguf-iq2_xxs": ("IQ2_XXS", "2 bits of a codebook; with an importance matrix.", 2.4),
    "gguf-iq1_m": ("IQ1_M", "Under 2 bits; with an importance matrix.", 2.2),
    "gguf-iq1_s": ("IQ1_S", "Under 2 bits; with an importance matrix.", 2.0),
    "gguf-tq1_0": ("TQ1_0", "For weights that are ternary already: 1.7 bits.", 1.9),
    "gguf-tq2_0": ("TQ2_0", "For weights that are ternary already: 2.1 bits, faster.", 2.3),
    "gguf-bf16": ("BF16", "Not quantized, bfloat16.", 16.0),
    "gguf-f16": ("F16", "Not quantized, float16.", 16.0),
    "gguf-f32": ("F32", "Not quantized, float32.", 32.0),
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
        from .reading import reading

        with reading(source):
            if target in _ADAPTERS:
                from . import gguf_lora

                return gguf_lora.make_plan(source, target, _ADAPTERS[target][0], options, load())
            if target not in _MIXTURES:
                raise UsageError(f"no GGUF target {target!r}", f"There are: {', '.join(self.targets)}.")
            return make_plan(source, target, _MIXTURES[target][0], options, load())

    def merged(self, source: Source) -> Merged:
        """Base and adapter as an export has them, tensor by tensor. Raises: ModelError, UnsupportedModel."""
        from .ggml import load
        from .merged import Merged

        return Merged(source, load())

    def write_importance(self, file: Path, found: Any, datasets: Sequence[str], context: int) -> None:
        """Keep what `edgeft.importance.measure` found. Raises: WriteError."""
        import numpy as np

        from .importance import Use, write_importance

        uses = {
            name: Use(layer.inputs, layer.tokens.astype(np.float32), layer.gradients / found.learned)
            for name, layer in found.layers.items()
        }
        shares = found.embedding_rows / found.embedding_rows.sum()
        embedding = shares, found.embedding_gradients / found.learned
        write_importance(file, uses, datasets, found.texts, context, embedding)

    def convert(self, plan: Plan, progress: Progress) -> Artifact:
        from .ggml import load

        if plan.target in _ADAPTERS:
            from . import gguf_lora

            return gguf_lora.convert(plan, load(), progress)
        from .gguf_convert import convert

        return convert(plan, load(), progress)


converter = GgufConverter()
