"""Which steps can be measured for an artifact, and what each of them scores with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgeft.artifact import size_of
from edgeft.errors import EdgeftError, UnsupportedModel
from edgeft.models.gguf_header import read_header
from edgeft.plugins import AdapterScale, Session, Source
from edgeft.run import Run
from edgeft.verify.divergence import Reference
from edgeft.verify.steps import LogProbs, Skipped, Step, StepName, in_runtime
from edgeft.verify.torch_reference import TorchReference

_FLOAT = 4


@dataclass(frozen=True)
class Parts:
    """What is compared."""

    source: Source
    artifact: Path
    """The file that `session` has loaded: the base, when the adapter lies beside it."""
    session: Session
    adapters: Sequence[AdapterScale] = ()
    run: Run | None = None
    runtime: str = ""
    """Its name, for the report."""
    quick: bool = False
    """Leave out the steps that need another copy of the model: half the time."""
    trained: Source | None = None
    """What `run` was trained on, where that is not what was exported: a GGUF whose weights were merged after all."""

    @property
    def bytes(self) -> int:
        return size_of(self.artifact) + sum(size_of(adapter.path) for adapter in self.adapters)


def build(parts: Parts, reference: TorchReference) -> tuple[list[Step], list[Skipped]]:
    """The steps in order, and those left out with the reason."""
    steps: list[Step] = []
    skipped: list[Skipped] = []

    def attempt(name: StepName, refusal: str | None, load: Callable[[], tuple[LogProbs, int | None]]) -> None:
        if refusal is None:
            try:
                found, size = load()
            except (EdgeftError, MemoryError) as error:
                refusal = error.message if isinstance(error, EdgeftError) else "there is not enough memory for it"
            else:
                steps.append(Step(name, found, size))
                return
        skipped.append(Skipped(name, refusal))

    attempt("trained", _no_graph(parts, reference), lambda: _trained(parts))
    size = 2 * reference.parameters if reference.merged else None
    steps.append(Step("merged" if reference.merged else "unmerged", reference.log_probs, size))
    attempt("tensors", _refusal(parts, reference), lambda: (_tensors(parts, reference).log_probs, parts.bytes))
    title = f"the file in {parts.runtime}" if parts.runtime else ""
    steps.append(Step("file", in_runtime(parts.session), parts.bytes, title))
    return steps, skipped


def _trained(parts: Parts) -> tuple[LogProbs, int | None]:
    from edgeft.verify.trained_graph import load_trained

    assert parts.run is not None
    graph = load_trained(parts.run, parts.trained or parts.source)
    return graph.log_probs, graph.bytes


def _tensors(parts: Parts, reference: TorchReference) -> Reference:
    if parts.artifact.suffix != ".gguf" and not (parts.artifact / "genai_config.json").is_file():
        raise UnsupportedModel(f"edgeft does not read the weights inside {parts.artifact.name}")
    if parts.artifact.is_dir():
        from edgeft.verify.onnx_tensors import load_onnx_tensors

        return load_onnx_tensors(parts.artifact, reference)
    from edgeft.verify.gguf_tensors import load_gguf_tensors

    read_header(parts.artifact)
    return load_gguf_tensors(parts.artifact, parts.source.base, parts.adapters)


def _no_graph(parts: Parts, reference: TorchReference) -> str | None:
    if parts.run is None:
        return "there is no run: what was trained is not known"
    if parts.source.packed is not None:
        return "the weights of the merged model are the very ones that were trained"
    return _refusal(parts, reference)


def _refusal(parts: Parts, reference: TorchReference) -> str | None:
    """Why another copy of the model, in float32, should not be loaded."""
    if parts.quick:
        return "--quick"
    needed, available = _FLOAT * reference.parameters, _available()
    if available is not None and needed > 0.8 * available:
        return f"another copy of the model takes {needed / 1e9:.1f} GB; {available / 1e9:.1f} GB are free"
    return None


def _available() -> int | None:
    """Bytes that programs can still get, where the kernel says so."""
    file = Path("/proc/meminfo")
    if not file.is_file():
        return None
    for line in file.read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None
