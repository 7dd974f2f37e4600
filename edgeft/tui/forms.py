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
from textual.widgets import Button, Checkbox, Collapsible, Footer, Input, Label, Select, Static, TextArea

from edgeft.tui.actions import command_line
from edgeft.tui.output import run_command

MAIN: Mapping[tuple[str, ...], tuple[str, ...]] = {
    ("train",): ("model", "data", "method", "target", "epochs", "rank", "out"),
    ("export",): ("run", "target", "device", "fit", "out"),
    ("eval",): ("model", "data", "metrics"),
    ("package",): ("artifact", "device", "out"),
    ("verify",): ("run", "artifact", "report"),
}
"""What most people set; the rest is under "More". A command that is not here shows everything."""
HIDDEN = frozenset({"as_json", "dry_run", "help", "list_only", "list_"})
"""Options about output, which the screen decides."""
QUICK = frozenset({"devices", "models", "data", "install", "eval"})
"""Verbs whose result one waits for."""


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
            last.extend(str(value).split() if parameter.nargs != 1 else [str(value)])
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
        Binding("f3", "copy", "Copy command"),
    ]
    HELP = """Every field is an option of the command above, which follows what you type.

**F5** shows what would be done, and writes nothing. **Ctrl+S** starts it: long work as a job, which goes on when
this screen closes. **F3** copies the command. **Tab** goes to the next field."""

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
        yield TextArea("", read_only=True, soft_wrap=False, id="plan")
        with Horizontal(id="buttons"):
            if self._plans:
                yield Button("Plan", id="do-plan")
            yield Button("Start", id="do-start", variant="primary")
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
            yield Checkbox(f"{title.lstrip('-')}: {about}", value=bool(value), id=identity)
            return
        yield Label(f"{title.lstrip('-')}  [dim]{_escaped(about)}[/dim]", classes="title")
        if isinstance(parameter.type, click.Choice):
            choices = [(str(choice), str(choice)) for choice in parameter.type.choices]
            known = value if any(value == choice for _, choice in choices) else Select.NULL
            yield Select(choices, value=known, id=identity, prompt="default")
        else:
            yield Input(str(value or ""), id=identity, placeholder=parameter.metavar or "")

    def on_mount(self) -> None:
        self.query_one("#plan").display = False
        self._changed()
        self.query("#fields Input, #fields Select").first().focus()

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

    @on(Button.Pressed, "#do-plan")
    @work(exclusive=True)
    async def action_plan(self) -> None:
        area = self.query_one("#plan", TextArea)
        area.display = area.loading = True
        code, out, remarks = await run_command((*self.words, "--dry-run"))
        area.loading = False
        area.load_text(remarks + out + (f"\nexit code {code}" if code else ""))

    @on(Button.Pressed, "#do-start")
    def action_start(self) -> None:
        self._start(self.words)

    def action_copy(self) -> None:
        self.app.copy_to_clipboard(command_line(self.words))
        self.notify("copied")


def _escaped(text: str) -> str:
    return text.replace("[", r"\[")
