"""What an export would write, target by target, before it starts: types, sizes, fallbacks, devices."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, ClassVar

import click
from textual import on, work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal
from textual.screen import Screen
from textual.widgets import DataTable, Footer, Input, Label, Static, TabbedContent, TabPane

from edgeft.tui.actions import Action, How, command_line
from edgeft.tui.forms import arguments, find_command, values_of
from edgeft.tui.inputs import Field
from edgeft.tui.output import run_command
from edgeft.tui.workflows import application

TARGETS = ("", "target", "bits", "MB", "falls back", "what it is")
TYPES = ("n", "tensor", "shape", "type", "MB", "why")
DEVICES = ("device", "fits", "needs MB", "of MB", "decode t/s", "prompt t/s", "largest ctx")
PANES = ("types", "devices", "notes")
SETTLE_S = 0.3
"""How long the cursor rests on a target before its plan is made."""


class ExportScreen(Screen[None]):
    """Targets above; of the one under the cursor the plan below."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "app.pop_screen", "Back"),
        Binding("space", "mark", "Mark"),
        Binding("ctrl+s", "start", "Start"),
        Binding("f8", "pane", "Types/devices"),
        Binding("f2", "form", "All options"),
        Binding("f3", "copy", "Copy"),
        Binding("f5", "plan", "Plan again", show=False),
    ]
    HELP = """The plan of an export is made from headers alone; nothing is written before **Ctrl+S**.

**↑** and **↓** go through the targets: below stand the types that the tensors would really get, with the reason where
that is not what the target's name says. **F8** shows the devices instead: where the file fits, and how fast it will
be. **Space** marks several targets, which are then exported one after the other. **F2** has every option of the
command: an adapter, a size to fit, an importance matrix."""

    def __init__(self, commands: click.Group, command: Sequence[str]) -> None:
        super().__init__()
        self._commands = commands
        self._click, _, words = find_command(commands, command)
        self._values = values_of(self._click, words)
        self._targets: list[dict[str, Any]] = []
        self._marked: set[str] = set()
        self.plans: dict[str, dict[str, Any]] = {}
        self.fits: dict[str, list[dict[str, Any]]] = {}

    def compose(self) -> ComposeResult:
        yield Static("", id="line", classes="command", markup=False)
        with Horizontal(classes="ask"):
            yield Label("run or model")
            yield Field(str(self._values.get("model", "")), id="model", compact=True)
        yield DataTable[str](cursor_type="row", id="targets")
        yield Static("", id="sum", classes="command", markup=False)
        with TabbedContent(*PANES):
            for name in PANES:
                with TabPane(name, id=name):
                    if name == "notes":
                        yield Static("", id="said", markup=False)
                    else:
                        yield DataTable[str](cursor_type="row", id=f"{name}-table", zebra_stripes=True)
        yield Footer(show_command_palette=False)

    def on_mount(self) -> None:
        for name, columns in (("targets", TARGETS), ("types-table", TYPES), ("devices-table", DEVICES)):
            table = self._table(name)
            for column in columns:
                table.add_column(column, key=column)
        self._say()
        self._load()
        self.set_focus(self._table("targets") if self.model else self.query_one("#model"))

    @property
    def model(self) -> str:
        return self.query_one("#model", Input).value.strip()

    @property
    def target(self) -> str:
        at = self._table("targets").cursor_row
        wanted = str(self._values.get("target") or "")  # until the list is there
        return str(self._targets[at]["target"]) if 0 <= at < len(self._targets) else wanted

    @property
    def chosen(self) -> list[tuple[str, ...]]:
        """The commands to start: of the marked targets, or of the one under the cursor."""
        names = [each["target"] for each in self._targets if each["target"] in self._marked]
        return [self.words(name) for name in names or [self.target] if name]

    def words(self, target: str) -> tuple[str, ...]:
        values = {**self._values, "model": self.model, "target": target}
        if len(self._marked) > 1:
            values["out"] = ""  # one name is not enough for several files
        return ("export", *arguments(values, self._click))

    def _table(self, name: str) -> DataTable[str]:
        return self.query_one(f"#{name}", DataTable)

    @work(exclusive=True, group="targets")
    async def _load(self) -> None:
        code, out, remarks = await run_command(("export", "--list", "--json"))
        if code:
            self.query_one("#sum", Static).update(remarks)
            return
        self._targets = json.loads(out)
        table = self._table("targets")
        for each in self._targets:
            bits = f"{each['bits_per_weight']:g}" if each["bits_per_weight"] else ""
            table.add_row(
                "", each["target"], f"({bits})" if bits else "", "", "", each["description"], key=each["target"]
            )
        wanted = self._values.get("target") or "gguf-q4"
        names = [each["target"] for each in self._targets]
        table.move_cursor(row=names.index(wanted) if wanted in names else 0, scroll=True)
        self.action_plan()

    @on(Input.Submitted, "#model")
    def _another(self) -> None:
        self.plans.clear()
        self.fits.clear()
        self._table("targets").focus()
        self.action_plan()

    @on(DataTable.RowHighlighted, "#targets")
    def _moved(self) -> None:
        self._say()
        self._show()
        if self.target and self.target not in self.plans and self.model:
            self._plan(self.target, SETTLE_S)

    def action_plan(self) -> None:
        if self._targets and self.model:
            self.plans.pop(self.target, None)
            self._plan(self.target, 0)
        self._say()

    @work(exclusive=True, group="plan")
    async def _plan(self, target: str, wait_s: float) -> None:
        """The plan, then the devices, of one target; ended when the cursor goes on."""
        from asyncio import sleep

        await sleep(wait_s)
        self.query_one("#sum", Static).update(f"{target}: …")
        code, out, remarks = await run_command((*self.words(target), "--dry-run", "--json"))
        plan = json.loads(out) if not code and out.startswith("{") else {"failed": (remarks or out).strip()}
        self.plans[target] = plan
        self._fill_target(target, plan)
        self._show()
        if "failed" not in plan and target not in self.fits:
            code, out, remarks = await run_command(("devices", "fit", self.model, "--to", target, "--json"))
            self.fits[target] = [] if code else sorted(json.loads(out), key=lambda one: not one["fits"])
            self._show()

    def _fill_target(self, target: str, plan: dict[str, Any]) -> None:
        table = self._table("targets")
        if "failed" in plan:
            table.update_cell(target, "falls back", "not possible")
            return
        table.update_cell(target, "bits", f"{plan['bits_per_weight']:.2f}")
        table.update_cell(target, "MB", f"{plan['bytes'] / 1e6:.1f}", update_width=True)
        table.update_cell(target, "falls back", _fallbacks(plan), update_width=True)

    def _show(self) -> None:
        plan = self.plans.get(self.target)
        for name in ("types-table", "devices-table"):
            self._table(name).clear()
        if plan is None:
            return
        if "failed" in plan:
            self.query_one("#sum", Static).update(plan["failed"])
            return
        for group in plan["groups"]:
            shape = "x".join(map(str, group["shape"]))
            cells = (group["count"], group["name"], shape, group["type"], f"{group['bytes'] / 1e6:.1f}", group["note"])
            self._table("types-table").add_row(*map(str, cells))
        for one in self.fits.get(self.target, ()):
            self._table("devices-table").add_row(*_fit_cells(one))
        self.query_one("#sum", Static).update(_sum(plan, self.fits.get(self.target)))
        self.query_one("#said", Static).update("\n".join(plan["warnings"]) or "nothing to say")

    def _say(self) -> None:
        lines = [command_line(words) for words in self.chosen] or [command_line(("export", self.model or "RUN"))]
        self.query_one("#line", Static).update("\n".join(f"$ {line}" for line in lines))

    def action_mark(self) -> None:
        if not self._targets:
            return
        self._marked ^= {self.target}
        self._table("targets").update_cell(self.target, "", "✓" if self.target in self._marked else "")
        self._say()

    def action_pane(self) -> None:
        tabs = self.query_one(TabbedContent)
        tabs.active = PANES[(PANES.index(tabs.active) + 1) % len(PANES)]

    def action_start(self) -> None:
        if not self.model or not self.chosen:
            self.notify("Name a run or a model first.", severity="warning")
            return
        application(self).start_all(self.chosen)

    def action_form(self) -> None:
        words = self.words(self.target) if self.target else ("export", *([self.model] if self.model else []))
        application(self).do(Action("Export", words, How.FORM))

    def action_copy(self) -> None:
        self.app.copy_to_clipboard("\n".join(command_line(words) for words in self.chosen))
        self.notify("copied")


def _fallbacks(plan: dict[str, Any]) -> str:
    return f"{plan['fallbacks']} of {len(plan['tensors'])}" if plan["fallbacks"] else "nothing"


def _sum(plan: dict[str, Any], fits: list[dict[str, Any]] | None) -> str:
    types = ", ".join(f"{kind} {size / 1e6:.1f} MB" for kind, size in plan["bytes_by_type"].items())
    text = f"{plan['out']}: {plan['bytes'] / 1e6:.1f} MB, {plan['bits_per_weight']:.2f} bits per weight ({types})"
    if fits:
        text += f"; fits {sum(one['fits'] for one in fits)} of {len(fits)} devices"
    return text


def _fit_cells(one: dict[str, Any]) -> tuple[str, ...]:
    def band(speed: dict[str, float]) -> str:
        return f"{speed['low']:,.0f}-{speed['high']:,.0f}" if one["fits"] else ""

    return (
        one["device"],
        "yes" if one["fits"] else "no",
        f"{one['memory']['total'] / 1e6:,.0f}",
        f"{one['memory']['usable'] / 1e6:,.0f}",
        band(one["decode_tps"]),
        band(one["prefill_tps"]),
        f"{one['largest_context']:,}",
    )
