"""The application: which screen comes when, themes, the command palette, help."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import ClassVar

import click
from textual.app import App, SystemCommand
from textual.binding import Binding, BindingType
from textual.screen import Screen

from edgeft import jobs
from edgeft.errors import EdgeftError
from edgeft.paths import home, parse_json, write_json
from edgeft.tui.actions import Action, How, general
from edgeft.tui.forms import FormScreen, find_command, values_of
from edgeft.tui.help import HelpScreen
from edgeft.tui.home import HomeScreen
from edgeft.tui.jobs import JobScreen
from edgeft.tui.output import OutputScreen


class EdgeftApp(App[None]):
    """Everything edgeft does, on one screen."""

    TITLE = "edgeft"
    CSS_PATH = "style.tcss"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("question_mark,f1", "help", "Help", key_display="?"),
        Binding("ctrl+q", "quit", "Quit", show=False),
    ]

    def __init__(self, commands: click.Group, folder: Path | None = None, plain: bool = False) -> None:
        super().__init__()
        self._commands = commands
        self._folder = folder or Path.cwd()
        self._plain = plain
        if plain:
            self.animation_level = "none"

    def get_default_screen(self) -> Screen[None]:
        return HomeScreen(self._folder)

    def on_mount(self) -> None:
        remembered = _remembered()
        if (theme := remembered.get("theme")) in self.available_themes:
            self.theme = str(theme)
        self.theme_changed_signal.subscribe(self, lambda theme: _remember(theme=theme.name))
        if self._plain:
            self.add_class("plain")

    def get_system_commands(self, screen: Screen[object]) -> Iterable[SystemCommand]:
        yield from super().get_system_commands(screen)
        for action in general():
            yield SystemCommand(action.title, action.line, lambda action=action: self.do(action))

    def do(self, action: Action) -> None:
        """Begin an action, on the screen where its work is seen."""
        if action.how is How.CHAT:
            self._chat(action.command)
        elif action.how is How.FORM:
            self.push_screen(FormScreen(self._commands, action.command, self.start))
        elif action.how is How.JOB:
            self.start(action.command)
        elif action.how is How.SHOW:
            self.push_screen(OutputScreen(action.command))
        elif action.how is How.WATCH:
            self.push_screen(JobScreen(jobs.find_job(action.command[-1])))
        else:
            self._curves(action.command[-1])

    def start(self, command: Sequence[str]) -> None:
        """Run a command as a job and watch it."""
        try:
            job = jobs.start(command, directory=self._folder)
        except EdgeftError as error:
            self.notify(error.message, severity="error")
            return
        self.push_screen(JobScreen(job))

    def _chat(self, command: Sequence[str]) -> None:
        from edgeft.tui.chat import ChatScreen

        _, _, words = find_command(self._commands, command)
        values = values_of(find_command(self._commands, command)[0], words)
        adapters = tuple(name for name in str(values.get("adapters", "")).split(",") if name)
        self.push_screen(ChatScreen(str(values["model"]), adapters))

    def _curves(self, folder: str) -> None:
        from edgeft.run import Run
        from edgeft.tui.curves import CurvesScreen

        self.push_screen(CurvesScreen([Run(self._folder / folder)]))

    def action_help(self) -> None:
        self.push_screen(HelpScreen(self.screen))


def _memory() -> Path:
    return home() / "tui.json"


def _remembered() -> dict[str, object]:
    try:
        value = parse_json(_memory().read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _remember(**values: object) -> None:
    with contextlib.suppress(EdgeftError):  # a full disk does not end the screen
        write_json(_memory(), {**_remembered(), **values})


def run(commands: click.Group, words: Sequence[str] = (), folder: Path | None = None, plain: bool = False) -> None:
    """Show the application until it is left."""
    if plain:
        os.environ.setdefault("TEXTUAL_ANIMATIONS", "none")
    EdgeftApp(commands, folder, plain).run()
