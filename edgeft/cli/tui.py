"""`edgeft tui`: everything on one screen."""

from __future__ import annotations

import os
from pathlib import Path

import click

from edgeft.errors import UsageError, require


@click.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path), default=".")
@click.option("--plain", is_flag=True, help="No animation, no decoration; also by ACCESSIBLE=1.")
def tui(folder: Path, plain: bool) -> None:
    """Models, training, export, chat, devices and jobs on one screen. ? is help, Ctrl+P the command palette.

    FOLDER is where runs and files are looked for. Every action shows its command line; long work runs as jobs
    (`edgeft jobs`), which go on when the screen closes.
    """
    require("textual", "tui")
    import sys

    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise UsageError("edgeft tui needs a terminal", "edgeft status shows the same list as text or JSON.")
    from edgeft.cli.main import cli
    from edgeft.tui.app import run

    run(cli, folder=folder, plain=plain or bool(os.environ.get("ACCESSIBLE")))
