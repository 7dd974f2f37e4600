"""`edgeft tui`: everything on one screen."""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgeft.errors import UsageError, require

if TYPE_CHECKING:
    from edgeft.tui.place import ChatPlace


@click.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path), default=".")
@click.option("--plain", is_flag=True, help="No animation, no decoration; also by ACCESSIBLE=1.")
@click.option("--no-animation", is_flag=True, help="Nothing moves; also by TEXTUAL_ANIMATIONS=none.")
def tui(folder: Path, plain: bool, no_animation: bool) -> int:
    """Models, training, export, chat, devices and jobs on one screen. ? is help, Ctrl+P the command palette.

    FOLDER is where runs and files are looked for. Every action shows its command line; long work runs as jobs
    (`edgeft jobs`), which go on when the screen closes.
    """
    if no_animation:
        os.environ["TEXTUAL_ANIMATIONS"] = "none"  # Textual reads it when it is imported
    return show(folder, plain)


def show(folder: Path, plain: bool = False, chat: ChatPlace | None = None) -> int:
    """The screens, beginning with a conversation if one is given. Raises: MissingDependency, UsageError."""
    require("textual", "tui")
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise UsageError("edgeft tui needs a terminal", "edgeft status shows the same list as text or JSON.")
    # Imports make objects that stay: looking through them for garbage costs a tenth of the start, and pauses later.
    gc.disable()
    from edgeft.cli.main import cli
    from edgeft.tui.app import run

    gc.freeze()
    gc.enable()
    return run(cli, folder, plain or bool(os.environ.get("ACCESSIBLE")), chat)
