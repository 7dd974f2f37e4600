"""`edgeft cascade set`, `threshold`, `budget` and `privacy`: change the settings, and see what they would do."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from edgeft.cli._output import dry_run_option, json_option, note, print_json, print_table
from edgeft.errors import ExitCode, UsageError
from edgeft.paths import write_text

_file = click.argument("file", type=click.Path(path_type=Path), default="cascade.toml")

SET_EXAMPLES = """\b
Examples:
  edgeft cascade set cascade.toml policy.threshold=1.2 budget.day-money=0.25
  edgeft cascade set cascade.toml 'privacy.topics=["salary"]' --dry-run
"""
PRIVACY_EXAMPLES = """\b
Examples:
  echo "Write to ada@example.org" | edgeft cascade privacy cascade.toml
"""


@click.command(name="set", epilog=SET_EXAMPLES)
@click.argument("file", type=click.Path(path_type=Path))
@click.argument("changes", nargs=-1, required=True, metavar="KEY=VALUE...")
@dry_run_option
@json_option
def set_(file: Path, changes: tuple[str, ...], dry_run: bool, as_json: bool) -> int:
    """Change values in FILE; its comments stay. An endpoint's keys begin with its place: cloud.1.price-in."""
    from edgeft.cascade.edit import edited, read_value
    from edgeft.cascade.settings import read_settings

    pairs = [change.partition("=") for change in changes]
    if wrong := [change for change, (_, mark, _) in zip(changes, pairs, strict=True) if not mark]:
        raise UsageError(f"{wrong[0]!r} is not KEY=VALUE")
    values = {name.strip(): read_value(name.strip(), text) for name, _, text in pairs}
    path = read_settings(file).path
    text = edited(path.read_text(encoding="utf-8"), values, path)
    if not dry_run:
        write_text(path, text)
    if as_json:
        print_json({"file": str(file), "written": not dry_run, "changed": list(values)})
    elif dry_run:
        click.echo(text, nl=False)
    else:
        note(f"wrote {file}")
    return ExitCode.OK


@click.command()
@_file
@click.option("--to", "wanted", type=float, help="The new threshold; default: show the curve.")
@dry_run_option
@json_option
def threshold(file: Path, wanted: float | None, dry_run: bool, as_json: bool) -> int:
    """The deferral curve that tuning kept: quality, cost and share of cloud calls at each threshold; or move it."""
    from edgeft.cascade.calibration import read_calibration
    from edgeft.cascade.settings import read_settings
    from edgeft.cascade.tune import at_threshold, moved

    settings = read_settings(file)
    if not settings.policy.calibration:
        raise UsageError(f"{file} names no calibration", "edgeft cascade tune makes one.")
    path = settings.beside(settings.policy.calibration)
    found = read_calibration(path)
    if wanted is not None:
        found = moved(found, wanted)
        if not dry_run:
            found.write(path)
            note(f"wrote {path}")
    now = (found.threshold, *at_threshold(found, found.threshold)[1:])
    if as_json:
        print_json({"threshold": now[0], "deferred": now[1], "quality": now[2], "cost": now[3], "curve": found.curve})
        return ExitCode.OK
    shown = [found.curve[round(at * (len(found.curve) - 1) / 10)] for at in range(11)]
    rows = [("now", *_row(now)), *(("", *_row(point)) for point in dict.fromkeys(shown))]
    print_table(("", "threshold", "to the cloud", "quality", "cost per request"), rows)
    return ExitCode.OK


def _row(point: tuple[float, ...]) -> tuple[str, str, str, str]:
    return f"{point[0]:.4g}", f"{point[1]:.1%}", f"{point[2]:.1%}", f"{point[3]:.6f}"


@click.command()
@_file
@json_option
def budget(file: Path, as_json: bool) -> int:
    """What was spent this day and this month (UTC), and the limits."""
    from edgeft.cascade.budget import spending
    from edgeft.cascade.settings import read_settings

    settings = read_settings(file)
    found = spending(settings)
    if as_json:
        print_json([each.as_dict() for each in found])
        return ExitCode.OK
    rows = [
        (each.period, f"{each.money:.6f}", each.money_limit or "none", each.tokens, each.tokens_limit or "none")
        for each in found
    ]
    print_table(("", settings.budget.currency, "limit", "tokens", "limit"), rows)
    return ExitCode.OK


@click.command(epilog=PRIVACY_EXAMPLES)
@_file
@json_option
def privacy(file: Path, as_json: bool) -> int:
    """What of a text, read from standard input, would leave the device. Nothing is sent."""
    from dataclasses import asdict

    from edgeft.cascade.privacy import Guard, leaving
    from edgeft.cascade.settings import read_settings

    guard = Guard(read_settings(file).privacy)
    found = leaving(guard, sys.stdin.read().rstrip("\n"))
    if as_json:
        print_json(asdict(found))
    elif found.pinned:
        note(f"it stays on the device: {found.pinned}")
    else:
        click.echo(found.text)
        replaced = ", ".join(f"{count} {kind}" for kind, count in found.replaced.items()) or "nothing"
        note(f"replaced: {replaced}")
    return ExitCode.OK
