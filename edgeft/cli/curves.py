"""`edgeft curves`: what a training measures, of one run or of several beside each other."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgeft.cli._output import json_option, note, print_json, print_table

if TYPE_CHECKING:
    from edgeft.run import Run
    from edgeft.train.compare import Summary

_EXAMPLES = """\b
Examples:
  edgeft curves runs/home-1                    while it is trained, too
  edgeft curves runs/home-1 runs/home-2        side by side, and the settings in which they differ
  edgeft curves runs/home-1 --samples          how answers to held-out prompts changed (edgeft train --samples 3)
"""
_HEIGHT = 8


@click.command(epilog=_EXAMPLES)
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="RUN…")
@click.option("--samples", is_flag=True, help="Answers to held-out prompts instead of curves.")
@json_option
def curves(runs: tuple[Path, ...], samples: bool, as_json: bool) -> None:
    """Loss, speed and memory of runs, finished or not; several are drawn on the same scale."""
    from edgeft.run import Run
    from edgeft.train import compare

    found = [Run(path) for path in runs]
    different = compare.differences(found)  # also refuses what is no run
    if as_json:
        told = [
            {**compare.summary(run).as_dict(), "curves": compare.curves(run), "samples": run.samples()} for run in found
        ]
        print_json({"runs": told, "different": different})
    elif samples:
        for run in found:
            _show_samples(run)
    else:
        print_table(_COLUMNS, [_row(compare.summary(run)) for run in found])
        for key, values in different.items():
            click.echo(f"{key.replace('_', '-'):<16} {'   '.join(map(str, values))}")
        _draw(found)


_COLUMNS = ("run", "step", "loss", "best validation", "held out", "tokens/s", "memory GB", "time", "left")


def _row(found: Summary) -> tuple[str, ...]:
    return (
        found.run,
        f"{found.step}" + ("" if found.finished else " …"),
        _figure(found.loss, ".4f"),
        "" if found.val_loss is None else f"{found.val_loss:.4f} at {found.val_step}",
        _figure(found.held_out, ".4f"),
        _figure(found.tokens_per_s, ".0f"),
        _figure(found.memory_bytes and found.memory_bytes / 1e9, ".2f"),
        _clock(found.seconds),
        _clock(found.left_s),
    )


def _figure(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"


def _clock(seconds: float | None) -> str:
    return "" if seconds is None else "{}:{:02d}".format(*divmod(round(seconds), 60))


def _draw(runs: list[Run]) -> None:
    from edgeft.train.curve import loss_range, terminal_curve

    span = loss_range(runs)
    for run in runs:
        if drawn := terminal_curve(run, height=_HEIGHT, span=span):
            click.echo(f"\n{run.path}\n{drawn}")


def _show_samples(run: Run) -> None:
    found = run.samples()
    if not found:
        note(f"{run.path} has no samples: edgeft train --samples 3 writes them at each validation")
        return
    from edgeft.train.compare import one_line

    for at, last in enumerate(found[-1]["samples"]):
        click.echo(f"{one_line(last['prompt'])}\n  wanted       {one_line(last['wanted'])}")
        for event in found:
            if at < len(event["samples"]):
                click.echo(f"  step {event['step']:<7} {one_line(event['samples'][at]['answer'])}")
        click.echo()
