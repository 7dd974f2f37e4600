"""Screens of the way from a model to a device: which one an action or a job opens, and what comes after a job."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from textual.screen import Screen

from edgeft import jobs
from edgeft.jobs import Job, State
from edgeft.tui.actions import Action, How, actions

if TYPE_CHECKING:
    from edgeft.tui.app import EdgeftApp

Start = Callable[[Sequence[str]], None]
"""Begins a command as a job and shows it."""


def application(screen: Screen[Any]) -> EdgeftApp:
    """The application that a screen belongs to, with what it can do."""
    from edgeft.tui.app import EdgeftApp

    app = screen.app
    assert isinstance(app, EdgeftApp)
    return app


def screen_for(commands: click.Group, action: Action, start: Start, folder: Path) -> Screen[None]:
    """The screen of an action whose work has one of its own."""
    from edgeft.run import Run

    if action.how is How.EXPORT:
        from edgeft.tui.export import ExportScreen

        return ExportScreen(commands, action.command)
    if action.how is How.LEDGER:
        from edgeft.tui.ledger import LedgerScreen

        return LedgerScreen(action.command[1], start)
    if action.how is How.DEPLOY:
        from edgeft.tui.deploy import DeployScreen

        return DeployScreen(commands, action.command)
    from edgeft.tui.curves import CurvesScreen

    return CurvesScreen([Run(folder / name) for name in action.command[1:]])


def watching(job: Job, commands: click.Group) -> Screen[None]:
    """Where a job is best seen."""
    if job.command[0] == "train":
        from edgeft.tui.training import TrainingScreen

        return TrainingScreen(job)
    if job.command[:2] == ("deploy", "send"):
        from edgeft.tui.deploy import DeployScreen

        return DeployScreen(commands, job.command, job)
    from edgeft.tui.jobs import JobScreen

    return JobScreen(job)


def next_step(job: Job) -> Action | None:
    """What one would do with what a job has made; None when it failed, or made nothing."""
    if job.state is not State.DONE or job.made is None:
        return None
    from edgeft.inventory import item_at

    item = item_at(job.made)
    if item is None:
        return None
    if job.command[0] == "verify":
        return Action("See what each step lost", ("verify", item.name, "--last"), How.LEDGER)
    return actions(item)[0]


def start_all(commands: Sequence[Sequence[str]], folder: Path) -> Job:
    """Jobs one after the other; the first of them.

    Raises:
        UsageError, WriteError: see `edgeft.jobs.start`.
    """
    first = last = jobs.start(commands[0], directory=folder)
    for command in commands[1:]:
        last = jobs.start(command, directory=folder, after=last.id)
    return first
