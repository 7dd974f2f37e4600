"""A cascade on one screen: its settings, its threshold, what it cost and why, and what would leave the device."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from textual import on, work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.message import Message
from textual.screen import Screen
from textual.widget import Widget
from textual.widgets import DataTable, Footer, Input, Label, Select, Static, TabbedContent, TabPane, TextArea
from textual.worker import get_current_worker
from textual_plotext import PlotextPlot

from edgeft.cascade.edit import Key, edited, keys, read_value, said
from edgeft.cascade.settings import MID_STREAM, POLICIES, PrivacySettings, Settings
from edgeft.cascade.tune import at_threshold, moved
from edgeft.errors import EdgeftError
from edgeft.paths import write_text
from edgeft.tui.actions import Action, How, command_line
from edgeft.tui.inputs import Area, Field

if TYPE_CHECKING:
    from edgeft.cascade.budget import Spent
    from edgeft.cascade.calibration import Calibration
    from edgeft.cascade.privacy import Guard

REFRESH_S = 2.0
"""Between looks at what is spent and answered."""
CHOICES: Mapping[str, Sequence[str]] = {
    "policy.kind": POLICIES,
    "policy.mid-stream": MID_STREAM,
    "bool": ("true", "false"),
}
"""Key or type -> what it may be."""


@dataclass(frozen=True)
class Loaded:
    """A cascade as it is on the disk."""

    text: str
    settings: Settings
    calibration: Calibration | None = None
    why: str = ""
    """Why there is no curve."""
    spent: Sequence[Spent] = ()
    records: Sequence[Mapping[str, Any]] = field(default=())


def load(file: Path) -> Loaded:
    """Raises: ConfigError, WriteError."""
    from edgeft.cascade.audit import AuditLog
    from edgeft.cascade.budget import spending
    from edgeft.cascade.calibration import read_calibration
    from edgeft.cascade.settings import read_settings

    settings = read_settings(file)
    calibration, why = None, "The settings name no calibration."
    if settings.policy.calibration:
        try:
            calibration = read_calibration(settings.beside(settings.policy.calibration))
            why = "" if calibration.curve else "The calibration is of an edgeft that kept no curve."
        except EdgeftError as error:
            why = error.message
    records: list[dict[str, Any]] = []
    if settings.audit.enabled and settings.audit_file.is_file():  # looking makes no file
        audit = AuditLog(settings.audit_file, settings.audit)
        try:
            records = audit.records(200)
        finally:
            audit.close()
    return Loaded(settings.path.read_text(encoding="utf-8"), settings, calibration, why, spending(settings), records)


class Pane(Vertical):
    """A part of the screen; says which command does the same."""

    class Changed(Message):
        """The command line of a part is another one."""

    file: Path = Path("cascade.toml")

    @property
    def commands(self) -> list[tuple[str, ...]]:
        raise NotImplementedError

    async def show(self, found: Loaded) -> None:
        raise NotImplementedError


class SettingsPane(Pane):
    """Every key of the file; what is typed is checked at once."""

    def __init__(self) -> None:
        super().__init__()
        self._loaded: Loaded | None = None
        self._keys: list[Key] = []
        self.problem = ""

    def compose(self) -> ComposeResult:
        yield VerticalScroll(id="keys")
        yield Static("", id="problem", classes="command", markup=False)

    @property
    def commands(self) -> list[tuple[str, ...]]:
        changed = [f"{name}={text}" for name, text in self.typed().items()]
        return [("cascade", "set", str(self.file), *changed)] if changed else []

    def typed(self) -> dict[str, str]:
        """The values that are not those of the file, as they were typed."""
        return self._other_than(self._keys)

    def _other_than(self, known: Sequence[Key]) -> dict[str, str]:
        found = {}
        for at, key in enumerate(known):
            widget = self.query_one(f"#key-{at}")
            assert isinstance(widget, (Input, Select))
            if _differs(key, str(widget.value)):
                found[key.name] = str(widget.value)
        return found

    async def show(self, found: Loaded) -> None:
        self._loaded = found
        new = keys(found.settings)
        same = [key.name for key in new] == [key.name for key in self._keys]
        if same and not self._other_than(new):
            self._keys = new  # as after writing: the fields say it already
        elif not (same and self.typed()):  # what somebody is typing stays
            self._keys = new
            await self._fill()
        self._check()

    async def _fill(self) -> None:
        area = self.query_one("#keys")
        await area.remove_children()
        rows: list[Widget] = []
        table = ""
        for at, key in enumerate(self._keys):
            before, table = table, key.name.rpartition(".")[0]
            if table != before:
                rows.append(Label(table, classes="table", markup=False))
            name = Label(key.name.rpartition(".")[2], classes="key", markup=False)
            rows.append(
                Horizontal(name, _field(at, key), Label(key.about, classes="said", markup=False), classes="row")
            )
        await area.mount_all(rows)

    @on(Input.Changed)
    @on(Select.Changed)
    def _check(self) -> None:
        try:
            self.result()
        except EdgeftError as error:
            self.problem = error.message
        else:
            self.problem = ""
        count = len(self.typed())
        text = self.problem or (f"{count} changed; Ctrl+S writes, comments stay" if count else "nothing changed")
        self.query_one("#problem", Static).update(text)
        self.post_message(self.Changed())

    def result(self) -> str:
        """The file as it would be. Raises: UsageError, ConfigError."""
        assert self._loaded
        values = {name: read_value(name, text) for name, text in self.typed().items()}
        return edited(self._loaded.text, values, self._loaded.settings.path)


def _differs(key: Key, text: str) -> bool:
    """Whether a text is another value: 0.50 is 0.5."""
    try:
        return bool(read_value(key.name, text) != key.value)
    except EdgeftError:
        return True


def _field(at: int, key: Key) -> Widget:
    value = said(key.value)
    choices = CHOICES.get(key.name) or CHOICES.get(key.kind)
    if choices:
        options = [(choice, choice) for choice in choices]
        return Select(options, value=value, allow_blank=False, compact=True, id=f"key-{at}")
    return Field(value, compact=True, id=f"key-{at}")


class ThresholdPane(Pane, can_focus=True):
    """The deferral curve that tuning kept, and a threshold that moves along it."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("left", "move(-1)", "Fewer"),
        Binding("right", "move(1)", "More"),
        Binding("pageup", "move(-10)", show=False),
        Binding("pagedown", "move(10)", show=False),
        Binding("t", "tune", "Tune"),
    ]

    def __init__(self) -> None:
        super().__init__()
        self._calibration: Calibration | None = None
        self._currency = ""
        self.at: int | None = None
        """The point of the curve that was moved to; None: the threshold as it is kept."""

    def compose(self) -> ComposeResult:
        yield PlotextPlot(id="curve")
        yield Static("", id="outcome", classes="command", markup=False)

    @property
    def threshold(self) -> float | None:
        """The one that was moved to."""
        if self.at is None or self._calibration is None:
            return None
        return self._calibration.curve[self.at][0]

    @property
    def commands(self) -> list[tuple[str, ...]]:
        to = [] if self.threshold is None else ["--to", repr(self.threshold)]
        return [("cascade", "threshold", str(self.file), *to)]

    async def show(self, found: Loaded) -> None:
        known = found.calibration if found.calibration and found.calibration.curve else None
        self._currency = found.settings.budget.currency
        if known != self._calibration or known is None:
            self._calibration, self.at = known, None
            self.query_one("#curve").display = known is not None
            self._draw()
        if known is None:
            text = f"{found.why}\nT fits the policy to answers to your data, and keeps the curve."
            self.query_one("#outcome", Static).update(text)

    def action_move(self, by: int) -> None:
        if self._calibration is None:
            return
        curve = self._calibration.curve
        here = curve.index(at_threshold(self._calibration, self._calibration.threshold)) if self.at is None else self.at
        self.at = min(max(here + by, 0), len(curve) - 1)
        self._draw()
        self.post_message(self.Changed())

    def action_tune(self) -> None:
        from edgeft.tui.app import EdgeftApp

        assert isinstance(self.app, EdgeftApp)
        self.app.do(Action("Fit a cascade to its model", ("cascade", "tune", str(self.file)), How.FORM))

    def _draw(self) -> None:
        if self._calibration is None:
            return
        now = self._calibration.threshold
        lines = [_outcome("kept", now, at_threshold(self._calibration, now), self._currency)]
        if self.threshold is not None:
            point = at_threshold(self._calibration, self.threshold)
            lines.insert(0, _outcome("here", self.threshold, point, self._currency))
        self.query_one("#outcome", Static).update("\n".join(lines))
        widget = self.query_one("#curve", PlotextPlot)
        plot, curve = widget.plt, self._calibration.curve
        plot.clear_data()
        plot.title("quality in % over the share that goes to the cloud, in %")
        plot.plot([100 * point[1] for point in curve], [100 * point[2] for point in curve], marker="braille")
        chosen = now if self.threshold is None else self.threshold
        _, share, quality, _ = at_threshold(self._calibration, chosen)
        plot.scatter([100 * share], [100 * quality], marker="O")
        widget.refresh()


def _outcome(name: str, threshold: float, point: Sequence[float], currency: str) -> str:
    share, quality, cost = point[1:]
    return (
        f"{name}: {threshold:.4g}, {share:.1%} to the cloud, quality {quality:.1%}, {cost:.6f} {currency} per request"
    )


class RoutesPane(Pane):
    """Spending against its limits, and who answered why."""

    def compose(self) -> ComposeResult:
        yield Static("", id="spent", classes="command", markup=False)
        yield DataTable[str](cursor_type="row", zebra_stripes=True)
        yield Static("", id="route", classes="command", markup=False)

    @property
    def commands(self) -> list[tuple[str, ...]]:
        return [("cascade", "log", str(self.file)), ("cascade", "budget", str(self.file))]

    def on_mount(self) -> None:
        self.query_one(DataTable).add_columns("at (UTC)", "author", "left", "cost", "end", "why")
        self._records: Sequence[Mapping[str, Any]] = ()

    async def show(self, found: Loaded) -> None:
        currency = found.settings.budget.currency
        self.query_one("#spent", Static).update("\n".join(_spent(each, currency) for each in found.spent))
        if found.records == self._records and found.records:
            return
        self._records = found.records
        table = self.query_one(DataTable)
        table.clear()
        for record in found.records:
            table.add_row(*_route(record))
        if not found.records:
            off = "" if found.settings.audit.enabled else " (audit.enabled is false)"
            self.query_one("#route", Static).update(f"Nothing was answered yet{off}.")

    @on(DataTable.RowHighlighted)
    def _whole(self, event: DataTable.RowHighlighted) -> None:
        if 0 <= event.cursor_row < len(self._records):
            record = self._records[event.cursor_row]
            replaced = ", ".join(f"{count} {kind}" for kind, count in record["redacted"].items())
            text = f"{record['reason'] or record['error']}; {record['total_ms']:.0f} ms"
            self.query_one("#route", Static).update(text + (f"; replaced: {replaced}" if replaced else ""))


def _spent(spent: Spent, currency: str) -> str:
    money = f" of {spent.money_limit:g}" if spent.money_limit else ""
    tokens = f" of {spent.tokens_limit:,}" if spent.tokens_limit else ""
    return f"this {spent.period}: {spent.money:.6f}{money} {currency}, {spent.tokens:,}{tokens} tokens"


def _route(record: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        time.strftime("%m-%d %H:%M:%S", time.gmtime(record["at"])),
        ", ".join(record["authors"]) or "nobody",
        "yes" if record["left_device"] else "no",
        f"{record['cost']:.6f}",
        record["finish"],
        record["reason"] or record["error"],
    )


class PrivacyPane(Pane):
    """Type a message; see what of it would be sent. Nothing is."""

    def __init__(self) -> None:
        super().__init__()
        self._rules: PrivacySettings | None = None
        self._guard: Guard | None = None

    def compose(self) -> ComposeResult:
        yield Label("A message to the cascade:", classes="title")
        yield Area("", id="text", tab_behavior="focus")
        yield Label("What would leave the device:", classes="title")
        yield Area("", id="leaves", read_only=True, tab_behavior="focus")
        yield Static("", id="verdict", classes="command", markup=False)

    @property
    def commands(self) -> list[tuple[str, ...]]:
        return [("cascade", "privacy", str(self.file))]

    async def show(self, found: Loaded) -> None:
        if self._rules != found.settings.privacy:
            self._rules, self._guard = found.settings.privacy, None
            self._typed()

    @on(TextArea.Changed, "#text")
    def _typed(self) -> None:
        if self._rules is not None:
            self._look(self._rules, self.query_one("#text", TextArea).text)

    @work(thread=True, exclusive=True)
    def _look(self, rules: PrivacySettings, text: str) -> None:
        from edgeft.cascade.privacy import Guard, leaving

        worker = get_current_worker()
        try:
            self._guard = self._guard or Guard(rules)
            found = leaving(self._guard, text)
        except EdgeftError as error:
            sent, verdict = "", f"{error.message} {error.hint or ''}"
        else:
            replaced = ", ".join(f"{count} {kind}" for kind, count in found.replaced.items()) or "nothing"
            stays = f"It stays on the device: {found.pinned}."
            sent, verdict = found.text, stays if found.pinned else f"replaced: {replaced}"
        if not worker.is_cancelled:
            self.app.call_from_thread(self._tell, sent, verdict)

    def _tell(self, sent: str, verdict: str) -> None:
        if self.is_attached:
            self.query_one("#leaves", TextArea).load_text(sent)
            self.query_one("#verdict", Static).update(verdict)


class CascadeScreen(Screen[None]):
    """`cascade.toml` and what belongs to it."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "app.pop_screen", "Back"),
        Binding("ctrl+s", "keep", "Write"),
        Binding("f3", "copy", "Copy command"),
        Binding("f8", "tab", "Next part"),
    ]
    HELP = """**Settings** is every key of the file, checked while you type; **Ctrl+S** writes it, comments stay.

**Threshold** shows what tuning measured: **←** and **→** move along the deferral curve, **Ctrl+S** keeps the threshold.
A calibration holds for the very model it was made for; **t** makes one.

**Spending and routes** follows what was answered, by whom, why, and what it cost. **Privacy** says what of a message
would leave the device; nothing is sent. **F8** goes to the next part."""

    class Found(Message):
        """What the disk says now."""

        def __init__(self, found: Loaded | None, error: str) -> None:
            super().__init__()
            self.found, self.error = found, error

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.file = file
        self.loaded: Loaded | None = None

    def compose(self) -> ComposeResult:
        yield Static("", id="line", classes="command", markup=False)
        with TabbedContent():
            for identity, title, kind in PARTS:
                with TabPane(title, id=identity):
                    yield kind()
        yield Footer(show_command_palette=False)

    def on_mount(self) -> None:
        for pane in self.query(Pane):
            pane.file = self.file
        self.action_load()
        self.set_interval(REFRESH_S, self.action_load)

    @property
    def pane(self) -> Pane:
        """The part that is seen."""
        active = self.query_one(TabbedContent).active or PARTS[0][0]
        return self.query_one(f"#{active}", TabPane).query_one(Pane)

    @work(thread=True, exclusive=True)
    def action_load(self) -> None:
        worker = get_current_worker()
        try:
            found, error = load(self.file), ""
        except EdgeftError as problem:
            found, error = None, f"{problem.message}\n{problem.hint or ''}"
        if not worker.is_cancelled:
            self.post_message(self.Found(found, error))

    @on(Found)
    async def _show(self, event: Found) -> None:
        found = event.found
        if found is None:
            self.query_one("#line", Static).update(event.error)
            return
        if found != self.loaded:
            self.loaded = found
            for pane in self.query(Pane):
                await pane.show(found)
        self._say()

    @on(Pane.Changed)
    @on(TabbedContent.TabActivated)
    def _say(self) -> None:
        lines = [f"$ {command_line(command)}" for command in self.pane.commands]
        if self.loaded:
            self.query_one("#line", Static).update("\n".join(lines) or f"{self.file}: nothing changed")

    @on(TabbedContent.TabActivated)
    def _enter(self) -> None:
        pane = self.pane
        inside = [each for each in pane.query("*") if each.focusable]
        if pane.can_focus or inside:
            (pane if pane.can_focus else inside[0]).focus()

    def action_tab(self) -> None:
        tabs = self.query_one(TabbedContent)
        names = [identity for identity, _, _ in PARTS]
        tabs.active = names[(names.index(tabs.active) + 1) % len(names)]

    def action_keep(self) -> None:
        """Write the settings, or the threshold, whichever part is seen."""
        pane = self.pane
        if isinstance(pane, SettingsPane) and pane.commands:
            self._write(self._write_settings, pane.typed())
        elif isinstance(pane, ThresholdPane) and pane.threshold is not None:
            self._write(self._write_threshold, pane.threshold)
        else:
            self.notify("nothing changed", severity="warning")

    @work(thread=True)
    def _write(self, write: Callable[[Any], None], what: Any) -> None:
        try:
            write(what)
        except (EdgeftError, OSError) as error:
            self.app.call_from_thread(self.notify, str(error), severity="error", markup=False)
        else:
            self.app.call_from_thread(self.notify, "written")
            self.app.call_from_thread(self.action_load)

    def _write_settings(self, typed: Mapping[str, str]) -> None:
        values = {name: read_value(name, text) for name, text in typed.items()}
        path = self.file.absolute()
        # What somebody else changed meanwhile stays.
        write_text(path, edited(path.read_text(encoding="utf-8"), values, path))

    def _write_threshold(self, threshold: float) -> None:
        from edgeft.cascade.calibration import read_calibration
        from edgeft.cascade.settings import read_settings

        settings = read_settings(self.file)
        path = settings.beside(settings.policy.calibration)
        moved(read_calibration(path), threshold).write(path)

    def action_copy(self) -> None:
        if commands := self.pane.commands:
            self.app.copy_to_clipboard("\n".join(map(command_line, commands)))
            self.notify("copied")
        else:
            self.notify("nothing changed", severity="warning")


PARTS: tuple[tuple[str, str, type[Pane]], ...] = (
    ("settings", "Settings", SettingsPane),
    ("threshold", "Threshold", ThresholdPane),
    ("routes", "Spending and routes", RoutesPane),
    ("privacy", "Privacy", PrivacyPane),
)
