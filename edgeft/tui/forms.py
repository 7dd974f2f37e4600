"""A form for any command, made from its own options: what the command line can say, the form can say."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import click
from textual import on, work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, VerticalScroll
from textual.screen import Screen
from textual.suggester import SuggestFromList
from textual.widgets import Button, Checkbox, Collapsible, Footer, Input, Label, Select, Static, TextArea

from edgeft.tui.actions import command_line
from edgeft.tui.inputs import Area, Field
from edgeft.tui.output import run_command
from edgeft.tui.workflows import application

MAIN: Mapping[tuple[str, ...], tuple[str, ...]] = {
    ("train",): ("model", "data", "method", "device_profile", "target", "epochs", "samples", "rank", "out"),
    ("export",): ("model", "target", "device", "fit", "out"),
    ("eval",): ("model", "data", "metrics"),
    ("package",): ("model", "device", "format_", "out"),
    ("verify",): ("model", "artifact", "reports"),
    ("deploy", "send"): ("bundle", "addresses", "inventory", "identity"),
}
"""What most people set; the rest is under "More". A command that is not here shows everything."""
HIDDEN = frozenset({"as_json", "dry_run", "help", "list_only", "list_", "last"})
"""Options about output, which the screen decides."""
KNOWN: Mapping[str, frozenset[str]] = {
    "model": frozenset({"model", "run", "artifact"}),
    "artifact": frozenset({"artifact"}),
    "bundle": frozenset({"bundle"}),
    "device": frozenset({"device"}),
    "device_profile": frozenset({"device"}),
}
"""Parameters -> the kinds of things whose names are offered while one types."""


def find_command(commands: click.Group, path: Sequence[str]) -> tuple[click.Command, tuple[str, ...], tuple[str, ...]]:
    """The click command that `path` begins with, its names, and the arguments after them."""
    found: click.Command = commands
    context = click.Context(commands)
    for depth, name in enumerate(path):
        child = found.get_command(context, name) if isinstance(found, click.Group) else None
        if child is None:
            return found, tuple(path[:depth]), tuple(path[depth:])
        found = child
    return found, tuple(path), ()


def fields(command: click.Command) -> list[click.Parameter]:
    """The parameters a form asks for."""
    return [one for one in command.params if one.name not in HIDDEN and not getattr(one, "hidden", False)]


def arguments(values: Mapping[str, Any], command: click.Command) -> Iterator[str]:
    """The words of a command line, of the values of a form; empty values are left out.

    Args:
        values: by parameter name: text, a bool for a flag.
    """
    last = []
    for parameter in fields(command):
        value = values.get(parameter.name or "")
        if value in (None, "", False):
            continue
        if isinstance(parameter, click.Argument):
            last.extend(str(value).replace(",", " ").split() if parameter.nargs != 1 else [str(value)])
        elif getattr(parameter, "is_flag", False):
            yield parameter.opts[0]
        else:
            for one in str(value).split(",") if parameter.multiple else [str(value)]:
                yield from (parameter.opts[0], one.strip())
    yield from last


def values_of(command: click.Command, words: Sequence[str]) -> dict[str, Any]:
    """What `words` set, by parameter name: the beginning of a form."""
    context = click.Context(command, resilient_parsing=True)
    parsed, _, _ = command.make_parser(context).parse_args(list(words))
    return {name: _text(value) for name, value in parsed.items() if _is_set(value)}


def _is_set(value: object) -> bool:
    return value is not None and not str(value).startswith("Sentinel")


def _text(value: object) -> object:
    if isinstance(value, (list, tuple)):
        return ",".join(map(str, value))
    return value if isinstance(value, bool) else str(value)


class FormScreen(Screen[None]):
    """Fill in, look at the plan, start."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "app.pop_screen", "Back"),
        Binding("ctrl+s", "start", "Start"),
        Binding("f5", "plan", "Plan"),
        Binding("f4", "data", "Look at the data"),
        Binding("f3", "copy", "Copy command"),
    ]
    HELP = """Every field is an option of the command above, which follows what you type. Names that are known here are
offered in grey; **→** takes them.

**F5** shows what would be done, with advice where there is any, and writes nothing. **F4** shows what a data set
holds: what is wrong with it, how long its examples are, the first of them. **Ctrl+S** starts the command: long work as
a job, which goes on when this screen closes. **F3** copies it. **Tab** goes to the next field."""

    def __init__(self, commands: click.Group, path: Sequence[str], start: Callable[[tuple[str, ...]], None]) -> None:
        super().__init__()
        self._command, self._names, words = find_command(commands, path)
        self._values = values_of(self._command, words)
        self._start = start

    def compose(self) -> ComposeResult:
        yield Static("", id="line", classes="command", markup=False)
        with VerticalScroll(id="fields"):
            yield Label((self._command.help or "").split("\n\n")[0], markup=False, classes="about")
            main = MAIN.get(self._names, ())
            first = [one for one in fields(self._command) if not main or one.name in main]
            first.sort(key=lambda one: main.index(one.name) if one.name in main else 0)
            rest = [one for one in fields(self._command) if one not in first]
            for parameter in first:
                yield from self._field(parameter)
            if rest:
                with Collapsible(title=f"More ({len(rest)})"):
                    for parameter in rest:
                        yield from self._field(parameter)
        yield Area("", read_only=True, soft_wrap=False, id="plan")
        with Horizontal(id="buttons"):
            if self._plans:
                yield Button("Plan", id="do-plan", compact=True)
            yield Button("Start", id="do-start", variant="primary", compact=True)
        yield Footer(show_command_palette=False)

    @property
    def _plans(self) -> bool:
        return any(one.name == "dry_run" for one in self._command.params)

    def _field(self, parameter: click.Parameter) -> ComposeResult:
        name = parameter.name or ""
        value = self._values.get(name)
        identity = f"field-{name}"
        title = parameter.opts[0] if isinstance(parameter, click.Option) else (parameter.human_readable_name).lower()
        about = (getattr(parameter, "help", None) or ("required" if parameter.required else "")).strip()
        if getattr(parameter, "is_flag", False):
            yield Checkbox(f"{title.lstrip('-')}: {about}", value=bool(value), id=identity, compact=True)
            return
        yield Label(f"{title.lstrip('-')}  [dim]{_escaped(about)}[/dim]", classes="title")
        if isinstance(parameter.type, click.Choice):
            choices = [(str(choice), str(choice)) for choice in parameter.type.choices]
            known = value if any(value == choice for _, choice in choices) else Select.NULL
            yield Select(choices, value=known, id=identity, prompt="default", compact=True)
        else:
            yield Field(str(value or ""), id=identity, placeholder=parameter.metavar or "", compact=True)

    def on_mount(self) -> None:
        self.query_one("#plan").display = False
        self._changed()
        empty = [field for field in self.query("#fields > Input").results(Input) if not field.value]
        self.set_focus((empty or self.query("#fields Input, #fields Select"))[0])  # at once: keys may be waiting
        self._offer()

    @work(exclusive=True, group="offer")
    async def _offer(self) -> None:
        """Names of what is here, while one types."""
        from asyncio import to_thread

        from edgeft.inventory import data_sets, inventory

        items = await to_thread(inventory, application(self).folder)
        names = {key: [item.name for item in items if item.kind in kinds] for key, kinds in KNOWN.items()}
        names["data"] = names["dataset"] = await to_thread(data_sets, application(self).folder)
        for key, offered in names.items():
            for field in self.query(f"#field-{key}").results(Input):
                field.suggester = SuggestFromList(offered)

    @property
    def words(self) -> tuple[str, ...]:
        """The command as filled in."""
        return (*self._names, *arguments(self._filled(), self._command))

    def _filled(self) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for parameter in fields(self._command):
            widget = self.query_one(f"#field-{parameter.name}")
            assert isinstance(widget, (Input, Select, Checkbox))
            value = widget.value
            values[parameter.name or ""] = None if value is Select.NULL else value
        return values

    @on(Input.Changed)
    @on(Select.Changed)
    @on(Checkbox.Changed)
    def _changed(self) -> None:
        self.query_one("#line", Static).update("$ " + command_line(self.words))

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        if action == "data":
            return self._data is not None
        return self._plans if action == "plan" else True

    @property
    def _data(self) -> str | None:
        """The data set that is named; None where the command has none."""
        for name in ("data", "dataset"):
            if any(one.name == name for one in fields(self._command)):
                return str(self._filled().get(name) or "") if self.is_mounted else ""
        return None

    @on(Button.Pressed, "#do-plan")
    def action_plan(self) -> None:
        self._show((*self.words, "--dry-run"))

    def action_data(self) -> None:
        data, model = self._data, str(self._filled().get("model") or "")
        if not data:
            self.notify("Name a data set first.", severity="warning")
            return
        self._show(("data", "check", data, "--preview", "2", *(("--model", model) if model else ())))

    @on(Input.Submitted, "#field-data")
    def _data_chosen(self) -> None:
        if self._data:
            self.action_data()

    @work(exclusive=True)
    async def _show(self, command: tuple[str, ...]) -> None:
        """A command that writes nothing, and what it says."""
        area = self.query_one("#plan", TextArea)
        area.display = area.loading = True
        code, out, remarks = await run_command(command, columns=max(40, self.size.width - 4))
        area.loading = False
        said = "\n".join(line for line in remarks.splitlines() if not line.endswith(" …"))
        ended = f"\nexit code {code}" if code else ""
        area.load_text(f"$ {command_line(command)}\n{said}\n{out}{ended}")

    @on(Button.Pressed, "#do-start")
    def action_start(self) -> None:
        self._start(self.words)

    def action_copy(self) -> None:
        self.app.copy_to_clipboard(command_line(self.words))
        self.notify("copied")


def _escaped(text: str) -> str:
    return text.replace("[", r"\[")
