"""What commands share to speak: results on stdout, everything else on stderr."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgeft.jobs.events import JobEvents

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as RichProgress

json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
dry_run_option = click.option("--dry-run", is_flag=True, help="Say what would be done; write nothing.")


def print_json(value: Any) -> None:
    click.echo(json.dumps(value, ensure_ascii=False))


def note(text: str) -> None:
    """A line for the person watching, on stderr."""
    click.echo(text, err=True)


def made(path: Path) -> None:
    """Tell the job that this command runs for, if any, what it makes."""
    if events := JobEvents.from_environment():
        events.made(path)


def stderr_console() -> Console:
    from rich.console import Console

    return Console(stderr=True)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[object]], title: str | None = None) -> None:
    """A table on stdout; numbers flush right."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for index, column in enumerate(columns):
        numeric = bool(rows) and all(isinstance(row[index], (int, float)) for row in rows)
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*("" if cell is None else str(cell) for cell in row))
    # A pipe has no width: never wrap or cut there.
    console = Console(width=None if sys.stdout.isatty() else 200)
    console.print(table)


class ConsoleProgress:
    """A bar on a terminal; elsewhere one plain line every ten seconds, so that logs stay readable.

    In a job (`edgeft jobs`) also lines of JSON, for whoever watches it.

    Args:
        part: which of several things that are done side by side.
        quiet: for a job alone.
    """

    _INTERVAL_S = 10.0

    def __init__(self, part: str = "", quiet: bool = False) -> None:
        self._quiet = quiet
        self._bar: RichProgress | None = None
        self._task: Any = None
        self._label, self._unit = "", ""
        self._total: float | None = None
        self._done, self._last = 0.0, 0.0
        self._events = JobEvents.from_environment(part)

    def start(self, label: str, total: float | None, unit: str = "") -> None:
        self.finish()
        self._label, self._total, self._unit = label, total, unit
        self._done, self._last = 0.0, time.monotonic()
        if self._events:
            self._events.start(label, total, unit)
        if self._quiet:
            return
        if not sys.stderr.isatty():
            note(f"{label} …")
            return
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=stderr_console(),
        )
        self._task = self._bar.add_task(label, total=total, note="")
        self._bar.start()

    def advance(self, amount: float, note_text: str = "", /) -> None:
        self._done += amount
        if self._events:
            self._events.at(self._done, note_text)
        if self._bar is not None:
            self._bar.update(self._task, advance=amount, note=note_text)
        elif not self._quiet and time.monotonic() - self._last >= self._INTERVAL_S:
            self._last = time.monotonic()
            share = f" {self._done / self._total:.0%}" if self._total else ""
            note(f"{self._label}{share} {note_text}".rstrip())

    def finish(self) -> None:
        if self._events:
            self._events.finish()
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
