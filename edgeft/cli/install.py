"""`edgeft install`: bundles on this machine."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgeft.cli._output import ConsoleProgress, dry_run_option, json_option, print_json, print_table
from edgeft.errors import UsageError

if TYPE_CHECKING:
    from edgeft.package.install import State

EPILOG = """\b
Examples:
  edgeft install demo-q4-rpi5/                 install, ask its question, switch to it
  edgeft install demo.tar.zst --key release.pem.pub
  edgeft install --list
  edgeft install --rollback demo-q4
"""


@click.command(epilog=EPILOG)
@click.argument("bundle", required=False, type=click.Path(exists=True, path_type=Path))
@click.option("--key", type=click.Path(exists=True, path_type=Path), help="Public key that must have signed it.")
@click.option("--keep", type=click.IntRange(min=1), default=2, show_default=True, help="Versions that stay.")
@click.option("--allow-downgrade", is_flag=True, help="Install although a newer version is installed.")
@click.option("--no-health-check", is_flag=True, help="Switch without asking the bundle's question.")
@click.option("--root", type=click.Path(path_type=Path), help="Where versions go; default: in edgeft's data folder.")
@click.option("--bin", "bin_folder", type=click.Path(path_type=Path), help="Where the command goes; ~/.local/bin.")
@click.option("--list", "list_", is_flag=True, help="Show what is installed.")
@click.option("--rollback", metavar="NAME", help="Go back to the version before.")
@click.option("--uninstall", metavar="NAME", help="Remove every version of it.")
@json_option
@dry_run_option
def install(
    bundle: Path | None,
    key: Path | None,
    keep: int,
    allow_downgrade: bool,
    no_health_check: bool,
    root: Path | None,
    bin_folder: Path | None,
    list_: bool,
    rollback: str | None,
    uninstall: str | None,
    as_json: bool,
    dry_run: bool,
) -> None:
    """Install BUNDLE (a folder or an archive) on this machine.

    Every file is checked before anything is written. The new version is asked a question; when it answers it replaces
    the one in use in one step, else that stays. Needs neither network nor root.
    """
    from edgeft.package import install as work

    place = (root or work.apps_root()).expanduser().absolute()
    programs = (bin_folder or Path("~/.local/bin")).expanduser().absolute()
    if sum(map(bool, (bundle, list_, rollback, uninstall))) != 1:
        raise UsageError("give a bundle, or one of --list, --rollback NAME and --uninstall NAME")
    if list_:
        _print_states([work.state(place, name) for name in work.names(place)], as_json)
    elif rollback:
        state = work.state(place, rollback) if dry_run else work.rollback(place, rollback)
        _print_states([state], as_json)
    elif uninstall:
        if not dry_run:
            work.uninstall(place, uninstall, programs)
        click.echo(f"{'would remove' if dry_run else 'removed'} {place / uninstall}", err=True)
    else:
        assert bundle is not None
        options = work.Options(place, programs, keep, key, allow_downgrade, not no_health_check)
        _install(bundle, options, as_json, dry_run)


def _install(bundle: Path, options: object, as_json: bool, dry_run: bool) -> None:
    from edgeft.package import install as work
    from edgeft.package.formats import opened

    assert isinstance(options, work.Options)
    with opened(bundle, options.root) as folder:
        if dry_run:
            found = work.check(folder, options)
            click.echo(f"would install {found.name} {found.id}, {found.total_bytes / 1e6:.1f} MB", err=True)
            return
        result = work.install(folder, options, ConsoleProgress())
    if as_json:
        print_json({**dataclasses.asdict(result), "launcher": str(result.launcher)})
        return
    click.echo(f"installed {result.name} {result.id}; {result.copied_bytes / 1e6:.1f} MB copied", err=True)
    if result.answer:
        click.echo(f"it says: {result.answer.strip()}", err=True)
    click.echo(result.launcher)


def _print_states(states: list[State], as_json: bool) -> None:
    if as_json:
        print_json([dataclasses.asdict(state) for state in states])
        return
    rows = [
        (state.name, version.version, "in use" if version.id == state.current else "", version.installed, version.id)
        for state in states
        for version in reversed(state.versions)
    ]
    print_table(("name", "version", "", "installed", "id"), rows)
