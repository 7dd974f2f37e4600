"""`transformers`: the reference. A Hugging Face directory, or a run: its base with its adapter, nothing exported.

Slow, and it needs torch: for comparing, not for a device. A run is computed as it was trained: over NF4 weights after
QLoRA. Everything else is computed in float32, whatever type it is stored in, which is the exact reading of the file.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from edgeft.artifact import Artifact
from edgeft.chat import ChatTemplate
from edgeft.errors import ModelError
from edgeft.models.text import read_object
from edgeft.plugins import AdapterScale, LoadOptions, Session, Support
from edgeft.run import Run, is_run

from .hf_text import HfText
from .onnx_session import DEFAULT_CONTEXT, OnnxSession, Shape
from .torch_engine import TorchEngine


@dataclass(frozen=True)
class TransformersRuntime:
    name: str = "transformers"
    lacks: Mapping[str, str] = field(default_factory=lambda: {"json": "transformers has no grammars"})

    def supports(self, artifact: Artifact) -> Support:
        folder = artifact.path
        if (folder / "genai_config.json").is_file() or not ((folder / "config.json").is_file() or is_run(folder)):
            return Support(False, f"{folder.name} is neither a Hugging Face directory nor a run")
        return self.ready()

    def ready(self) -> Support:
        for module in ("torch", "transformers", "peft", "tokenizers"):
            if importlib.util.find_spec(module) is None:
                return Support(False, f"{module} is not installed", "pip install 'edgeft[train]'")
        return Support(True)

    def load(self, artifact: Artifact, options: LoadOptions) -> Session:
        """`options.extra["weights"]`: nf4, float32, bfloat16 or float16; None is as the run was trained, or float32."""
        run = Run(artifact.path) if is_run(artifact.path) else None
        manifest = run.manifest() if run else None
        if manifest and manifest.method == "gguf":
            raise ModelError(f"{artifact.path} was trained over a GGUF's weights", "Export it and run the GGUF.")
        folder = run.model if run else artifact.path
        usual = "nf4" if manifest and manifest.method == "qlora" else "float32"
        text = HfText(folder)
        engine = TorchEngine(folder, options, weights=options.extra.get("weights") or usual)
        session = TransformersSession(engine, text, _shape(folder, engine.vocabulary, options), artifact.path, options)
        if manifest:
            session.trained_template = manifest.chat_template
        if run and run.adapter:
            session.own_adapter = AdapterScale(run.adapter)
            session.set_adapters([])
        return session


class TransformersSession(OnnxSession):
    """The same loop over torch's logits; adapters can be changed."""

    engine_name = "transformers"
    trained_template = ""
    own_adapter: AdapterScale | None = None
    """A run's: part of its model, so `set_adapters` leaves it in place."""

    def _template(self) -> ChatTemplate:
        own = super()._template()
        return replace(own, source=self.trained_template) if self.trained_template else own

    def set_adapters(self, adapters: Sequence[AdapterScale]) -> None:
        engine = self._alive()
        assert isinstance(engine, TorchEngine)
        self._reuse([], 0)
        engine.set_adapters([*([self.own_adapter] if self.own_adapter else []), *adapters])


def _shape(folder: Path, vocabulary: int, options: LoadOptions) -> Shape:
    config = read_object(folder / "config.json")
    longest = int(config.get("max_position_embeddings") or DEFAULT_CONTEXT)
    return Shape("", 0, 0, 0, vocabulary, min(options.context or DEFAULT_CONTEXT, longest))


runtime = TransformersRuntime()
