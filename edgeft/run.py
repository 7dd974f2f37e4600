"""Run: one training, in a folder that a kill at any instant leaves resumable.

runs/<name>/
  config.toml      what was asked for
  metrics.jsonl    one object per logged step: the single source for every view
  events.jsonl     started, resumed, checkpoint, evaluation, samples, finished, failed
  finish           while there: training ends after this step and keeps what it has learned
  checkpoints/     what a resume needs
  adapter/         the result in PEFT's layout (or model/ after full fine-tuning)
  packed/          after training for a target: its weights as that file stores them
  manifest.json    written last: base, data, template, seed, versions, evaluation
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from edgeft.errors import ModelError
from edgeft.paths import parse_json, write_json, write_text

SCHEMA = 1


@dataclass(frozen=True)
class RunManifest:
    method: str
    """qlora, lora, full, or gguf: an adapter over a GGUF's own weights."""
    base: Mapping[str, Any]
    """`reference` as the user named it, `path` of the Hugging Face directory, `digest` (SHA-256 over its weights).
    For the method gguf: `gguf`, the file, with `digest` its SHA-256, and `path` the directory of its text side."""
    data: Mapping[str, Any]
    """`reference`, `path` and `digest`; see edgeft.data."""
    chat_template: str
    """The template that training rendered with; export writes this one into the file."""
    seed: int
    versions: Mapping[str, str]
    evaluation: Mapping[str, float] = field(default_factory=dict)
    """`nll_training_graph`: nats per completion token on the held-out split; `tokens`: how many were scored."""
    licence: str | None = None
    target: str | None = None
    """The export target that the run was trained for, if any."""
    schema: int = SCHEMA


@dataclass(frozen=True)
class Run:
    path: Path

    @property
    def adapter(self) -> Path | None:
        """The adapter directory, or None after full fine-tuning."""
        folder = self.path / "adapter"
        return folder if folder.is_dir() else None

    @property
    def model(self) -> Path:
        """The directory with the weights to export: the base, or the fully fine-tuned model."""
        full = self.path / "model"
        return full if full.is_dir() else Path(self.manifest().base["path"])

    @property
    def packed(self) -> Path:
        """The weights of a run that was trained for a target, as that file stores them (`edgeft.models.packed`)."""
        return self.path / "packed"

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def events_file(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def finished(self) -> bool:
        return (self.path / "manifest.json").is_file()

    def manifest(self) -> RunManifest:
        """Raises: ModelError when the run did not finish or its manifest cannot be read."""
        file = self.path / "manifest.json"
        if not file.is_file():
            raise ModelError(f"the run {self.path} is not finished", f"edgeft train --resume {self.path}")
        try:
            raw = parse_json(file.read_text(encoding="utf-8"))
            if raw["schema"] != SCHEMA:
                raise ModelError(f"{file} has schema {raw['schema']}; this edgeft reads schema {SCHEMA}")
            return RunManifest(**raw)
        except (ValueError, KeyError, TypeError) as error:
            raise ModelError(f"{file} cannot be read: {error}") from error

    def write_manifest(self, manifest: RunManifest) -> None:
        write_json(self.path / "manifest.json", asdict(manifest))

    @property
    def asked_to_finish(self) -> bool:
        """Whether training shall end after this step and keep what it has learned."""
        return (self.path / "finish").exists()

    def ask_to_finish(self) -> None:
        """Raises: WriteError."""
        write_text(self.path / "finish", "")

    def metrics(self) -> Iterator[dict[str, Any]]:
        """Logged steps in order; a line that a kill cut short is skipped."""
        return _lines(self.metrics_file)

    def samples(self) -> list[dict[str, Any]]:
        """Answers to held-out prompts while it was trained: `step`, and `samples` with `prompt`, `wanted`, `answer`.

        In the order of the steps; of a step that a resume computed again, the newest.
        """
        events = (line for line in _lines(self.events_file) if line.get("event") == "samples")
        found = {line["step"]: {"step": line["step"], "samples": line["samples"]} for line in events}
        return [found[step] for step in sorted(found)]


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    if not file.is_file():
        return
    with file.open(encoding="utf-8") as lines:
        for line in lines:
            try:
                yield parse_json(line)
            except ValueError:
                continue


def is_run(path: Path) -> bool:
    return (path / "config.toml").is_file() and ((path / "manifest.json").is_file() or (path / "checkpoints").is_dir())
