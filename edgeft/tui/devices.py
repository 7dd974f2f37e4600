"""Which devices a model fits, how fast it will be on each, and every figure behind that."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from textual import on, work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal
from textual.screen import Screen
from textual.widgets import DataTable, Footer, Input, Label, Select, Static
from textual.worker import get_current_worker

from edgeft.errors import EdgeftError
from edgeft.tui.actions import command_line
from edgeft.tui.inputs import Field

if TYPE_CHECKING:
    from edgeft.device import DeviceProfile
    from edgeft.forecast.best import Choice

CACHES = ("f16", "q8_0", "q4_0")
KNOWN = ("device", "RAM GB", "usable GB", "GB/s", "GOPS", "what it is")
FITTING = ("device", "fits", "needs MB", "of MB", "decode t/s", "prompt t/s", "largest ctx", "file")


@dataclass(frozen=True)
class Question:
    """What is asked of every device."""

    model: str = ""
    """Empty: only what is known of the devices."""
    context: int | None = None
    kv_type: str = "f16"
    best: bool = False
    """Of a checkpoint, the best file for each device instead of the same for all."""

    def command(self, device: str = "") -> tuple[str, ...]:
        if not self.model:
            return ("devices", "show", device) if device else ("devices", "list")
        words = ["devices", "fit", self.model]
        words += ["--device", device] if device else []
        words += ["--ctx", str(self.context)] if self.context else []
        words += ["--kv", self.kv_type] if self.kv_type != "f16" else []
        return (*words, *["--best"] * self.best)


@dataclass(frozen=True)
class Row:
    """A device and what was forecast for it."""

    device: DeviceProfile
    choice: Choice | None
    why: str
    """How to load it, or what would fit instead."""


def rows(question: Question) -> list[Row]:
    """The answer for every device, the ones that fit first.

    Raises:
        EdgeftError: no such model, or a damaged profile.
    """
    from edgeft.device import load_profile, names
    from edgeft.forecast.best import FLUENT, Choice, best, choices
    from edgeft.forecast.facts import as_exported
    from edgeft.forecast.find import find_facts
    from edgeft.forecast.fit import DEFAULT_TARGET, exported, forecast, nearest

    devices = [load_profile(name) for name in names()]
    if not question.model:
        return [Row(device, None, device.system) for device in devices]
    facts = find_facts(question.model)
    found = []
    for device in devices:
        if question.best:
            choice = best(choices(facts, device, question.context, question.kv_type))
            made = facts if facts.format == "gguf" else as_exported(facts, choice.target)
        else:
            made = exported(facts, None)
            one = forecast(made, device, question.context, question.kv_type)
            target = "as it is" if facts.format == "gguf" else DEFAULT_TARGET
            choice = Choice(target, 8 * made.bytes / made.parameters, one, one.decode.low >= FLUENT)
        fits = choice.forecast.fits
        why = _settings(choice) if fits else nearest(choice.forecast, made, devices) or "Take a smaller model."
        found.append(Row(device, choice, why))
    return sorted(found, key=lambda row: not (row.choice and row.choice.forecast.fits))


def _settings(choice: Choice) -> str:
    found = choice.forecast
    on = {True: "on", False: "off"}
    parts = [
        f"{found.runtime}, {found.device.decode_threads.value:.0f} threads, context {found.settings.context}",
        f"mmap {on[found.settings.mmap]}, repacking {on[bool(found.memory.repacked)]}",
        f"{found.decode_full} tokens/s when the context is full",
    ]
    return "; ".join([*parts, *found.notes])


class DevicesScreen(Screen[None]):
    """The table of `edgeft devices fit`, or of `edgeft devices list` without a model."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "app.pop_screen", "Back"),
        Binding("f2", "best", "Best file"),
        Binding("f3", "copy", "Copy"),
        Binding("f4", "probe", "Probe here"),
        Binding("f5", "load", "Again"),
    ]
    HELP = """What a model needs on every device, from its header alone, and how fast it will be: two numbers are the
ends of the band. The line below the table says how to load it on the device under the cursor, or what would fit.

**Enter** on a row shows the device, every figure with its source; in the fields above it asks anew. **F2** takes, for
each device, the best file that export can make of a checkpoint. **F4** measures this machine, which is then the device
`local`; it takes half a minute, as a job."""

    def __init__(self, start: Callable[[Sequence[str]], None], question: Question | None = None) -> None:
        """
        Args:
            start: begins a command as a job.
        """
        super().__init__()
        self._start = start
        self.question = question or Question()
        self.rows: list[Row] = []

    def compose(self) -> ComposeResult:
        yield Static("", id="line", classes="command", markup=False)
        with Horizontal(classes="ask"):
            yield Label("model")
            yield Field(self.question.model, id="model", compact=True, placeholder="file, run or name")
            yield Label("context")
            context = str(self.question.context or "")
            yield Field(context, id="context", compact=True, type="integer", placeholder="usual")
            yield Label("cache")
            yield Select(
                [(name, name) for name in CACHES], value=self.question.kv_type, allow_blank=False, id="kv", compact=True
            )
        yield DataTable[str](cursor_type="row", zebra_stripes=True)
        yield Static("", id="why", classes="command", markup=False)
        yield Footer(show_command_palette=False)

    def on_mount(self) -> None:
        self._asked()
        (self.query_one(DataTable) if self.question.model else self.query_one("#model")).focus()

    def on_screen_resume(self) -> None:
        self.action_load()  # a probe may have ended

    @on(Input.Submitted)
    def _to_table(self) -> None:
        self._read()
        self.query_one(DataTable).focus()

    @on(Select.Changed)
    def _read(self) -> None:
        context = self.query_one("#context", Input).value
        self.question = Question(
            self.query_one("#model", Input).value.strip(),
            int(context) if context.isdigit() and int(context) else None,
            str(self.query_one("#kv", Select).value),
            self.question.best,
        )
        self._asked()

    def action_best(self) -> None:
        self.question = Question(
            self.question.model, self.question.context, self.question.kv_type, not self.question.best
        )
        self._asked()

    def _asked(self) -> None:
        self.query_one("#line", Static).update("$ " + command_line(self.question.command()))
        self.query_one("#why", Static).update("…")
        self.action_load()

    @work(thread=True, exclusive=True)
    def action_load(self) -> None:
        worker = get_current_worker()
        try:
            found, error = rows(self.question), ""
        except EdgeftError as problem:
            found, error = [], f"{problem.message} {problem.hint or ''}"
        if not worker.is_cancelled:
            self.app.call_from_thread(self._show, found, error)

    def _show(self, found: list[Row], error: str) -> None:
        if not self.is_attached:
            return
        table = self.query_one(DataTable)
        before = self.selected
        self.rows = found
        table.clear(columns=True)
        table.add_columns(*(FITTING if self.question.model else KNOWN))
        for row in found:
            table.add_row(*_cells(row))
        same = [at for at, row in enumerate(found) if before and row.device.name == before.device.name]
        table.move_cursor(row=same[0] if same else 0)
        self.query_one("#why", Static).update(error or self._why())

    @property
    def selected(self) -> Row | None:
        at = self.query_one(DataTable).cursor_row
        return self.rows[at] if 0 <= at < len(self.rows) else None

    def _why(self) -> str:
        row = self.selected
        return f"{row.device.title}: {row.why}" if row else ""

    @on(DataTable.RowHighlighted)
    def _show_why(self) -> None:
        if self.rows:
            self.query_one("#why", Static).update(self._why())

    @on(DataTable.RowSelected)
    def _details(self) -> None:
        if row := self.selected:
            self.app.push_screen(DeviceScreen(row, self.question))

    def action_probe(self) -> None:
        self._start(("devices", "probe"))

    def action_copy(self) -> None:
        self.app.copy_to_clipboard(command_line(self.question.command()))
        self.notify("copied")


def _cells(row: Row) -> tuple[str, ...]:
    device, usable = row.device, row.device.usable
    if row.choice is None:
        prefill = device.prefill_repacked or device.prefill
        figures = (f"{device.memory.value / 1e9:.1f}", f"{usable / 1e9:.1f}", f"{device.bandwidth.value:g}")
        return device.name, *figures, f"{prefill.value:g}", device.title
    found = row.choice.forecast
    return (
        device.name,
        "yes" if found.fits else "no",
        f"{found.memory.total / 1e6:,.0f}",
        f"{usable / 1e6:,.0f}",
        str(found.decode) if found.fits else "",
        str(found.prefill) if found.fits else "",
        f"{found.largest_context:,}",
        f"{row.choice.target}, {row.choice.bits_per_weight:.1f} bits" if found.fits else "",
    )


class DeviceScreen(Screen[None]):
    """One device: the memory that the model takes on it, then every figure with its source."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,q", "app.pop_screen", "Back"),
        Binding("f3", "copy", "Copy command"),
    ]
    HELP = """Every figure, how it was found and where it is from; a forecast's band is as wide as its weakest figure
allows. **←** and **→** show long sources."""

    def __init__(self, row: Row, question: Question) -> None:
        super().__init__()
        self.row, self.question = row, question

    @property
    def command(self) -> tuple[str, ...]:
        return self.question.command(self.row.device.name)

    def compose(self) -> ComposeResult:
        yield Static(f"$ {command_line(self.command)}", classes="command", markup=False)
        yield Static(f"{self.row.device.title}: {self.row.why}", markup=False, classes="about")
        yield DataTable[str](cursor_type="row", zebra_stripes=True)
        yield Footer(show_command_palette=False)

    def on_mount(self) -> None:
        table = self.query_one(DataTable)
        table.add_columns("figure", "value", "basis", "source")
        for cells in _figures(self.row):
            table.add_row(*cells)
        table.focus()

    def action_copy(self) -> None:
        self.app.copy_to_clipboard(command_line(self.command))
        self.notify("copied")


def _figures(row: Row) -> Iterator[tuple[str, str, str, str]]:
    from dataclasses import asdict

    from edgeft.device import UNITS, Figure

    if row.choice:
        found = row.choice.forecast
        for part, size in {**asdict(found.memory), "total": found.memory.total}.items():
            yield f"memory: {part}", f"{size / 1e6:,.1f} MB", "forecast", found.model
    device = row.device
    for key in device.as_dict():
        value = getattr(device, key)
        if isinstance(value, Figure):
            yield key, f"{value.value:,.12g} {UNITS.get(key, '')}".rstrip(), value.basis, value.source
        elif key == "isa":
            yield key, f"{len(value)} extensions", "", " ".join(value)
        elif isinstance(value, str) and value and key != "title":
            yield key, value, "", ""
    for kernel in device.kernels:
        yield f"{kernel.type}: decode", f"{kernel.decode.value:g} GB/s", kernel.decode.basis, kernel.decode.source
        yield f"{kernel.type}: prompt", f"{kernel.prefill.value:g} GOPS", kernel.prefill.basis, kernel.prefill.source
