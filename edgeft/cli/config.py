"""`edgeft config`: what is set, where it came from, and whether a file is right."""

from __future__ import annotations

from pathlib import Path

import click

from edgeft import config as settings
from edgeft.cli._output import json_option, print_json, print_table


@click.group()
def config() -> None:
    """Show settings and where each one comes from.

    Order: flag, then environment (EDGEFT_…), then the project's edgeft.toml, then your own file, then the default.
    """


@config.command()
@json_option
def show(as_json: bool) -> None:
    """Every setting, its value and its origin."""
    values = settings.load()
    if as_json:
        print_json({name: {"value": item.value, "origin": item.origin} for name, item in values.items()})
        return
    rows = [(key.name, str(values[key.name].value), values[key.name].origin, key.help) for key in settings.SCHEMA]
    print_table(("key", "value", "from", "meaning"), rows)


@config.command()
@json_option
def path(as_json: bool) -> None:
    """The files that are read, weakest first."""
    files = settings.config_files()
    if as_json:
        print_json([{"path": str(file), "exists": file.is_file()} for file in files])
        return
    for file in files:
        click.echo(f"{file}{'' if file.is_file() else '  (none)'}")


@config.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path), required=False)
def validate(file: Path | None) -> None:
    """Check FILE, or all files that are read. Exit code 2 when one is wrong."""
    for candidate in [file] if file else settings.config_files():
        if candidate.is_file():
            settings.validate(candidate)
            click.echo(f"{candidate}: ok")
