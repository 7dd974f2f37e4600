"""`edgeft doctor`: what works here, what is missing, and the line that installs it."""

from __future__ import annotations

from dataclasses import asdict

import click

from edgeft import doctor as checks
from edgeft.cli._output import json_option, print_json, print_table


@click.command()
@json_option
def doctor(as_json: bool) -> None:
    """What this installation can do, and what it lacks."""
    machine, extras, plugins = checks.machine(), checks.extras(), checks.plugin_reports()
    if as_json:
        print_json(
            {
                "machine": machine,
                "extras": [{**asdict(extra), "install": extra.install} for extra in extras],
                "plugins": [asdict(plugin) for plugin in plugins],
            }
        )
        return
    for key, value in machine.items():
        click.echo(f"{key:<12} {' '.join(value) if isinstance(value, list) else value}")
    click.echo()
    print_table(
        ("extra", "state", "to install"),
        [(e.name, f"lacks {', '.join(e.missing)}" if e.missing else "ready", e.install) for e in extras],
    )
    click.echo()
    print_table(
        ("family", "plug-in", "state", "hint"),
        [(p.family, p.name, p.error or "ready", p.hint) for p in plugins],
    )
