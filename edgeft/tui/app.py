"""The application: which screen comes when, themes, the command palette, help."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import ClassVar

import click
from textual import work
from textual.app import App, SystemCommand
from textual.binding import Binding, BindingType
from textual.screen import Screen

from edgeft.errors import EdgeftError
from edgeft.tui import place
from edgeft.tui.actions import ANY, Action, How, general, models
from edgeft.tui.home import HomeScreen
from edgeft.tui.place import ChatPlace


class EdgeftApp(App[None]):
    """Everything edgeft does, on one screen."""

    TITLE = "edgeft"
    CSS_PATH = "style.tcss"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("question_mark", "help", "Help", key_display="?"),
        Binding("f1", "help", "Help", key_display="F1"),
        Binding("ctrl+q", "quit", "Quit", show=False),
    ]

    def __init__(
        self, commands: click.Group, folder: Path | None = None, plain: bool = False, chat: ChatPlace | None = None
    ) -> None:
        """
        Args:
            chat: the conversation to begin with; by default the one that was cut off the last time.
        """
        super().__init__()
        self._commands, self._first = commands, chat
        self._folder = folder or Path.cwd()
        self._plain = plain
        if plain:
            self.animation_level = "none"

    @property
    def commands(self) -> click.Group:
        """All of `edgeft`."""
        return self._commands

    @property
    def folder(self) -> Path:
        """Where runs and files are looked for, and jobs are started."""
        return self._folder

    def get_default_screen(self) -> Screen[None]:
        return HomeScreen(self._folder)

    def on_mount(self) -> None:
        if (theme := place.remembered().get("theme")) in self.available_themes:
            self.theme = str(theme)
        self.theme_changed_signal.subscribe(self, lambda theme: place.remember(theme=theme.name))
        if self._plain:
            self.add_class("plain")
        for name in ("SIGHUP", "SIGTERM"):
            if number := getattr(signal, name, None):  # Windows has no SIGHUP
                with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):
                    asyncio.get_running_loop().add_signal_handler(number, self._cut_off)
        if first := self._first or place.last_chat():
            self._open_chat(first)

    def _cut_off(self) -> None:
        """The terminal is gone, or somebody ends the process: what was typed and received is kept."""
        self._keep_places()
        self.exit(return_code=129)

    def copy_to_clipboard(self, text: str) -> None:
        """By OSC 52, which works over SSH; tmux takes it from its own command only (its default since 2.6)."""
        super().copy_to_clipboard(text)
        if os.environ.get("TMUX"):
            self._copy_in_tmux(text)

    @work(thread=True, group="clipboard")
    def _copy_in_tmux(self, text: str) -> None:
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            command = ["tmux", "load-buffer", "-w", "-"]
            subprocess.run(command, input=text.encode(), capture_output=True, timeout=5, check=False)

    async def action_quit(self) -> None:
        """What was typed in the last half second is kept too, and where one was."""
        self._keep_places()
        await super().action_quit()

    def _keep_places(self) -> None:
        from edgeft.tui.chat import ChatScreen
        from edgeft.tui.side_by_side import SideBySideScreen

        for screen in self.screen_stack:
            if isinstance(screen, (ChatScreen, SideBySideScreen)):
                screen.cut_off()
            elif isinstance(screen, HomeScreen):
                screen.keep_place()

    def get_system_commands(self, screen: Screen[object]) -> Iterable[SystemCommand]:
        yield from super().get_system_commands(screen)
        for action in general():
            yield SystemCommand(action.title, action.line, lambda action=action: self.do(action))

    def do(self, action: Action) -> None:
        """Begin an action, on the screen where its work is seen."""
        # Screens are imported when they are wanted: the first paint does not wait for them.
        from edgeft import jobs
        from edgeft.tui.forms import FormScreen
        from edgeft.tui.output import OutputScreen
        from edgeft.tui.workflows import screen_for, watching

        if action.how is How.CHAT:
            self._chat(action.command)
        elif action.how is How.AGAINST:
            self._choose_models(action.command)
        elif action.how is How.FORM:
            self.push_screen(FormScreen(self._commands, action.command, self.start))
        elif action.how is How.JOB:
            self.start(action.command)
        elif action.how is How.SHOW:
            self.push_screen(OutputScreen(action.command))
        elif action.how is How.WATCH:
            self.push_screen(watching(jobs.find_job(action.command[-1]), self._commands))
        elif action.how is How.FIT:
            self._fit(action.command)
        elif action.how is How.CASCADE:
            self._cascade(action.command[-1])
        else:
            self.push_screen(screen_for(self._commands, action, self.start, self._folder))

    def start(self, command: Sequence[str]) -> None:
        """Run a command as a job and watch it."""
        self.start_all([command])

    def start_all(self, commands: Sequence[Sequence[str]]) -> None:
        """Run commands as jobs, one after the other, and watch the first."""
        from edgeft.tui.workflows import start_all, watching

        try:
            job = start_all(commands, self._folder)
        except EdgeftError as error:
            self.notify(error.message, severity="error")
            return
        self.push_screen(watching(job, self._commands))

    def _chat(self, command: Sequence[str]) -> None:
        from edgeft.tui.forms import find_command, values_of

        _, _, words = find_command(self._commands, command)
        values = values_of(find_command(self._commands, command)[0], words)
        adapters = tuple((name, 1.0) for name in str(values.get("adapters", "")).split(",") if name)
        self._open_chat(ChatPlace(str(values["model"]), adapters, against=str(values.get("against", ""))))

    @work(exclusive=True)
    async def _choose_models(self, command: Sequence[str]) -> None:
        """For `edgeft chat MODEL --against MODEL`: ask for each that is not named yet."""
        from edgeft.inventory import inventory
        from edgeft.tui.choose import Choose

        known = models(await asyncio.to_thread(inventory, self._folder))
        words = list(command)
        while ANY in words:
            at = words.index(ANY)
            choices = [Action(name, (*words[:at], name, *words[at + 1 :]), How.CHAT) for name in known]
            choices = [one for one in choices if one.title not in words]
            if not choices:
                self.notify("Pull or export a second one first.", title="There is no other model", severity="warning")
                return
            title = f"Beside {words[1]}" if at > 1 else "The first model"
            chosen = await self.push_screen_wait(Choose(title, choices))
            if chosen is None:
                return
            words = list(chosen.command)
        self._chat(words)

    def _open_chat(self, at: ChatPlace) -> None:
        from edgeft.tui.chat import ChatScreen
        from edgeft.tui.side_by_side import SideBySideScreen

        if at.against:
            self.push_screen(SideBySideScreen(at))
            return
        self.push_screen(ChatScreen(at.model, at.adapters, at.conversation, draft=at.draft, by=at.by))

    def _fit(self, command: Sequence[str]) -> None:
        from edgeft.tui.devices import DevicesScreen, Question
        from edgeft.tui.forms import find_command, values_of

        found, _, words = find_command(self._commands, command)
        self.push_screen(DevicesScreen(self.start, Question(str(values_of(found, words).get("model", "")))))

    def _cascade(self, file: str) -> None:
        from edgeft.tui.cascade import CascadeScreen

        self.push_screen(CascadeScreen(Path(file) if self._folder == Path.cwd() else self._folder / file))

    def action_help(self) -> None:
        from edgeft.tui.help import HelpScreen

        self.push_screen(HelpScreen(self.screen))


def run(commands: click.Group, folder: Path | None = None, plain: bool = False, chat: ChatPlace | None = None) -> int:
    """Show the application until it is left; its exit code."""
    if plain:
        os.environ.setdefault("TEXTUAL_ANIMATIONS", "none")
    app = EdgeftApp(commands, folder, plain, chat)
    app.run()
    return app.return_code or 0
