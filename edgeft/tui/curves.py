"""The curves of a training while it runs, read from its `metrics.jsonl`; several runs at once compare."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from textual import work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Grid, VerticalScroll
from textual.screen import Screen
from textual.widgets import Footer, Static
from textual_plotext import PlotextPlot

from edgeft.errors import EdgeftError
from edgeft.run import Run
from edgeft.tui.actions import Action, How, command_line
from edgeft.tui.workflows import application

REFRESH_S = 2.0
POINTS = 500
"""Of a curve that are drawn: more than a terminal has dots."""
MARKERS = ("braille", "x", "o", "+")
"""Runs are told apart without colour."""


@dataclass(frozen=True)
class Plot:
    """One of the plots."""

    title: str
    metric: str
    scale: float = 1.0
    marker: str = ""


PLOTS = (
    Plot("loss", "loss"),
    Plot("validation", "val_loss", marker="o"),
    Plot("learning rate", "lr"),
    Plot("tokens/s", "tokens_per_s"),
    Plot("memory, GB", "memory_peak_bytes", 1e-9),
    Plot("minutes left", "left_s", 1 / 60),
)

Curves = Mapping[str, Sequence[tuple[int, float]]]


@dataclass(frozen=True)
class Seen:
    """What the files of a run say."""

    line: str
    """How far it is, in words."""
    curves: Curves
    samples: Sequence[Mapping[str, Any]]


class CurvesScreen(Screen[None]):
    """Six plots, redrawn while the runs grow."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,q", "app.pop_screen", "Back"),
        Binding("s", "samples", "Samples"),
        Binding("o", "compare", "Compare"),
        Binding("c", "copy", "Copy", show=False),
    ]
    HELP = """What a training measures: loss and validation in nats per learned token, learning rate, speed, memory, and
the minutes that are left. The plots follow the files, so they also show a training that runs elsewhere.

**o** draws another run into the same plots; the settings in which they differ stand above. **s** shows how answers to
held-out prompts changed, if the training writes them (`--samples 3`)."""

    def __init__(self, runs: Sequence[Run]) -> None:
        super().__init__()
        self.runs = list(runs)
        self.seen: list[Seen] = []
        self._sizes: list[tuple[int, int]] = []

    @property
    def command(self) -> tuple[str, ...]:
        return ("curves", *(_shown(run) for run in self.runs))

    def compose(self) -> ComposeResult:
        yield Static("", id="line", classes="command", markup=False)
        yield from self.above()
        yield Static("", id="how-far", classes="command", markup=False)
        with Grid(id="plots"):
            for plot in PLOTS:
                yield PlotextPlot(id=_identity(plot.title))
        with VerticalScroll(id="samples"):
            yield Static("", id="answers", markup=False)
        yield Footer(show_command_palette=False)

    def above(self) -> ComposeResult:
        """What stands over the plots."""
        yield from ()

    def on_mount(self) -> None:
        self.query_one("#samples").display = False
        self._look()
        self.set_interval(REFRESH_S, self._look)

    def _look(self) -> None:
        """Read the files again when they have grown."""
        self.query_one("#line", Static).update("$ " + command_line(self.command))
        sizes = [(_size(run.metrics_file), _size(run.events_file)) for run in self.runs]
        if sizes != self._sizes:
            self._sizes = sizes
            self._read(tuple(self.runs))

    @work(thread=True, exclusive=True, group="curves")
    def _read(self, runs: Sequence[Run]) -> None:
        found, above = [_seen(run) for run in runs], _differences(runs)
        self.app.call_from_thread(self._draw, found, above)

    def _draw(self, found: list[Seen], above: str) -> None:
        if not self.is_attached:
            return
        self.seen = found
        lines = [f"{_mark(at)}  {each.line}" for at, each in enumerate(found)]
        self.query_one("#how-far", Static).update(
            "\n".join([*(lines if len(found) > 1 else [found[0].line]), above]).strip()
        )
        for plot in PLOTS:
            widget = self.query_one(f"#{_identity(plot.title)}", PlotextPlot)
            _plot(widget.plt, plot, [each.curves for each in found])
            widget.refresh()
        self.query_one("#answers", Static).update("\n\n".join(map(_sample_text, found)))
        self.refresh_bindings()

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        return any(each.samples for each in self.seen) if action == "samples" else True

    def action_samples(self) -> None:
        panel = self.query_one("#samples")
        panel.display = not panel.display
        self.query_one("#plots").display = not panel.display

    @work(exclusive=True)
    async def action_compare(self) -> None:
        """Choose another run of this folder."""
        from asyncio import to_thread

        from edgeft.inventory import inventory
        from edgeft.tui.choose import Choose

        items = await to_thread(inventory, application(self).folder)
        names = [item.name for item in items if item.kind == "run" and item.name not in map(_shown, self.runs)]
        if not names:
            self.notify("There is no other run here.", severity="warning")
            return
        choices = [Action(name, (*self.command, name), How.CURVE) for name in names]
        chosen = await self.app.push_screen_wait(Choose("Compare with", choices))
        if chosen is not None:
            self.runs.append(Run(application(self).folder / chosen.command[-1]))
            self._look()

    def action_copy(self) -> None:
        self.app.copy_to_clipboard(command_line(self.command))
        self.notify("copied")


def _seen(run: Run) -> Seen:
    from edgeft.train import compare

    try:
        return Seen(_how_far(run), compare.curves(run), run.samples())
    except EdgeftError as error:
        return Seen(f"{run.path.name}: {error.message}", {}, ())


def _mark(at: int) -> str:
    """What the curve of a run is drawn with."""
    return "⠿" if at % len(MARKERS) == 0 else MARKERS[at % len(MARKERS)]


def _how_far(run: Run) -> str:
    from edgeft.train.compare import summary

    found = summary(run)
    if not found.step:
        return f"{run.path.name}: no step yet"
    parts: list[tuple[str, float | None, Callable[[float], str]]] = [
        ("loss", found.loss, "{:.4f}".format),
        ("best validation", found.val_loss, "{:.4f}".format),
        ("held out", found.held_out, "{:.4f}".format),
        ("", found.tokens_per_s, "{:.0f} tokens/s".format),
        ("", found.memory_bytes, lambda value: f"{value / 1e9:.2f} GB"),
        ("", found.left_s, lambda value: f"{_clock(value)} left"),
    ]
    told = [f"{name} {form(value)}".strip() for name, value, form in parts if value is not None]
    return f"{run.path.name}: step {found.step}, " + " · ".join(told)


def _clock(seconds: float) -> str:
    return "{}:{:02d}".format(*divmod(round(seconds), 60))


def _differences(runs: Sequence[Run]) -> str:
    if len(runs) < 2:
        return ""
    from edgeft.train.compare import differences

    try:
        found = differences(runs)
    except EdgeftError as error:
        return error.message
    told = [f"{key.replace('_', '-')} {' / '.join(map(str, values))}" for key, values in found.items()]
    return "different: " + (", ".join(told) or "nothing that was asked for")


def _plot(plot: Any, what: Plot, runs: Sequence[Curves]) -> None:
    plot.clear_data()
    plot.title(what.title)
    plot.yfrequency(4)
    if steps := [step for curves in runs for step, _ in curves.get(what.metric, ())]:
        ticks = sorted({min(steps), (min(steps) + max(steps)) // 2, max(steps)})
        plot.xticks(ticks, list(map(str, ticks)))
    for at, curves in enumerate(runs):
        if points := curves.get(what.metric, ()):
            chosen = points[:: max(1, len(points) // POINTS)]
            marker = MARKERS[at % len(MARKERS)] if len(runs) > 1 else what.marker or MARKERS[0]
            plot.plot([step for step, _ in chosen], [value * what.scale for _, value in chosen], marker=marker)


def _sample_text(seen: Seen) -> str:
    """Prompt by prompt, how the answer changed."""
    from edgeft.train.compare import one_line

    if not seen.samples:
        return ""
    lines = [seen.line]
    for at, last in enumerate(seen.samples[-1]["samples"]):
        lines += ["", one_line(last["prompt"]), f"  wanted      {one_line(last['wanted'])}"]
        told = [(each["step"], each["samples"][at]["answer"]) for each in seen.samples if at < len(each["samples"])]
        lines += [f"  step {step:<6} {one_line(answer)}" for step, answer in reversed(told)]
    return "\n".join(lines)


def _shown(run: Run) -> str:
    from edgeft.inventory import shown

    return shown(run.path.absolute())


def _identity(title: str) -> str:
    return "plot-" + "".join(letter if letter.isalpha() else "-" for letter in title)


def _size(file: Any) -> int:
    return file.stat().st_size if file.is_file() else 0
