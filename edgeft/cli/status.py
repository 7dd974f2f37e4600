"""`edgeft status`: what there is, and what one would do next with it."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path

import click

from edgeft.cli._output import json_option, print_json, print_table


@click.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path), default=".")
@click.option("--devices", is_flag=True, help="Device profiles too.")
@json_option
def status(folder: Path, devices: bool, as_json: bool) -> None:
    """Models, runs, artifacts, bundles and jobs, in the store and below FOLDER, each with the next step.

    The same list is the first screen of `edgeft tui`.
    """
    from edgeft.inventory import inventory

    found = [item for item in inventory(folder) if devices or item.kind != "device"]
    if as_json:
        print_json([{**dataclasses.asdict(item), "next": ["edgeft", *item.next]} for item in found])
        return
    rows = [(item.kind, item.name, item.state, item.detail, shlex.join(("edgeft", *item.next))) for item in found]
    print_table(("what", "name", "state", "about", "next"), rows)
