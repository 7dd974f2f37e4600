"""`edgeft toolchain`: exporters that live in environments of their own."""

from __future__ import annotations

import click

from edgeft.cli._output import ConsoleProgress, dry_run_option, json_option, note, print_json, print_table
from edgeft.cli.toolchain_build import build


@click.group()
def toolchain() -> None:
    """Exporters with requirements of their own, each in a virtual environment that edgeft keeps."""


@toolchain.command("list")
@json_option
def list_all(as_json: bool) -> None:
    """Every toolchain, whether it is installed, and what it is for."""
    from edgeft.toolchain import TOOLCHAINS, status

    found = [status(one) for one in TOOLCHAINS.values()]
    if as_json:
        print_json(
            [
                {
                    "name": one.toolchain.name,
                    "state": one.state,
                    "about": one.toolchain.about,
                    "requirements": one.toolchain.requirements,
                    "folder": str(one.folder),
                }
                for one in found
            ]
        )
        return
    print_table(
        ("toolchain", "state", "size", "for"),
        [(one.toolchain.name, one.state, f"{one.toolchain.size_mb} MB", one.toolchain.about) for one in found],
    )


@toolchain.command()
@click.argument("name")
@click.option("--again", is_flag=True, help="Make it anew although it is there.")
@json_option
@dry_run_option
def install(name: str, again: bool, as_json: bool, dry_run: bool) -> None:
    """Make the environment NAME: pip fetches its pinned requirements once."""
    from edgeft import toolchain as work

    wanted = work.find_toolchain(name)
    if work.status(wanted).state == "installed" and not again:
        note(f"{name} is installed")
    elif dry_run:
        note(f"would install about {wanted.size_mb} MB: {', '.join(wanted.requirements)}")
        return
    else:
        work.install(wanted, ConsoleProgress())
    found = work.status(wanted)
    if as_json:
        print_json({"name": name, "state": found.state, "folder": str(found.folder)})
    else:
        click.echo(found.folder)


@toolchain.command("rm")
@click.argument("name")
@dry_run_option
def remove(name: str, dry_run: bool) -> None:
    """Remove the environment NAME."""
    from edgeft import toolchain as work

    wanted = work.find_toolchain(name)
    if not dry_run:
        work.remove(wanted)
    note(f"{'would remove' if dry_run else 'removed'} {work.toolchains_dir() / name}")


toolchain.add_command(build)
