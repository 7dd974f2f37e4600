"""A command's output on a screen; the command runs in a process of its own and ends with the screen."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import ClassVar

from textual import work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.screen import Screen
from textual.widgets import Footer, Static, TextArea

from edgeft.tui.actions import command_line
from edgeft.tui.inputs import Area


async def run_command(command: Sequence[str], columns: int = 200) -> tuple[int, str, str]:
    """Exit code, results and remarks of `edgeft COMMAND`; it is ended when the caller is cancelled."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "edgeft",
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "COLUMNS": str(columns), "NO_COLOR": "1"},
        start_new_session=True,
    )
    try:
        out, remarks = await process.communicate()
    except asyncio.CancelledError:
        with suppress(ProcessLookupError):
            process.terminate()
        raise
    return process.returncode or 0, out.decode(errors="replace"), remarks.decode(errors="replace")


class OutputScreen(Screen[None]):
    """Runs a short command and shows what it says."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,q", "app.pop_screen", "Back"),
        Binding("r", "run", "Again"),
        Binding("c", "copy", "Copy the command"),
    ]
    HELP = "The output of a command. **r** runs it again, **c** copies its command line."

    def __init__(self, command: Sequence[str]) -> None:
        super().__init__()
        self.command = tuple(command)

    def compose(self) -> ComposeResult:
        yield Static(f"$ {command_line(self.command)}", classes="command", markup=False)
        yield Area("…", read_only=True, soft_wrap=False, id="output")
        yield Footer(show_command_palette=False, compact=True)

    def on_mount(self) -> None:
        self.query_one(TextArea).focus()
        self.action_run()

    @work(exclusive=True)
    async def action_run(self) -> None:
        area = self.query_one(TextArea)
        area.loading = True
        code, out, remarks = await run_command(self.command)
        area.loading = False
        ended = f"\nexit code {code}\n" if code else ""
        area.load_text(out + ("\n" if out and remarks else "") + remarks + ended)

    def action_copy(self) -> None:
        self.app.copy_to_clipboard(command_line(self.command))
        self.notify("copied")
