"""The curves of a training while it runs, read from its `metrics.jsonl`; several runs at once compare."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Grid
from textual.screen import Screen
from textual.widgets import Footer, Label
from textual_plotext import PlotextPlot

from edgeft.jobs import Job
from edgeft.run import Run

REFRESH_S = 2.0
PLOTS = (
    ("loss", (("loss", "training"), ("val_loss", "validation"))),
    ("learning rate", (("learning_rate", ""),)),
    ("tokens/s", (("tokens_per_s", ""),)),
    ("memory, GB", (("memory_gb", ""),)),
)
"""Title -> (metric, label)."""


def run_of(job: Job) -> Run | None:
    """The run that a job trains, as far as its command or its output tells."""
    words = job.command
    if words[0] != "train":
        return None
    for option in ("--out", "--resume"):
        if option in words[:-1]:
            return Run(job.directory / words[words.index(option) + 1])
    folders = sorted((job.directory / "runs").glob("*/config.toml"), key=lambda file: file.stat().st_mtime)
    return Run(folders[-1].parent) if folders else None


def series(run: Run, key: str) -> tuple[list[int], list[float]]:
    """Steps and values of a metric."""
    found = [(line["step"], float(line[key])) for line in run.metrics() if isinstance(line.get(key), (int, float))]
    return [step for step, _ in found], [value for _, value in found]


class CurvesScreen(Screen[None]):
    """Four plots, redrawn while the run grows."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,q", "app.pop_screen", "Back")]
    HELP = "Loss, learning rate, speed and memory of a run. They follow the file, so they also show a run elsewhere."

    def __init__(self, runs: Sequence[Run]) -> None:
        super().__init__()
        self.runs = list(runs)
        self._sizes: list[int] = []

    def compose(self) -> ComposeResult:
        yield Label(", ".join(str(run.path) for run in self.runs), markup=False)
        with Grid(id="plots"):
            for title, _ in PLOTS:
                yield PlotextPlot(id=_identity(title))
        yield Footer(show_command_palette=False)

    def on_mount(self) -> None:
        self._draw()
        self.set_interval(REFRESH_S, self._draw)

    def _draw(self) -> None:
        sizes = [_size(run.metrics_file) for run in self.runs]
        if sizes == self._sizes:
            return
        self._sizes = sizes
        for title, metrics in PLOTS:
            widget = self.query_one(f"#{_identity(title)}", PlotextPlot)
            self._plot(widget.plt, title, metrics)
            widget.refresh()

    def _plot(self, plot: Any, title: str, metrics: Sequence[tuple[str, str]]) -> None:
        plot.clear_data()
        plot.title(title)
        for run in self.runs:
            for key, label in metrics:
                steps, values = series(run, key)
                if values:
                    name = " ".join(filter(None, (label, run.path.name if len(self.runs) > 1 else ""))) or None
                    plot.plot(steps, values, label=name, marker="braille")


def _identity(title: str) -> str:
    return "plot-" + "".join(letter if letter.isalpha() else "-" for letter in title)


def _size(file: Path) -> int:
    return file.stat().st_size if file.is_file() else 0
