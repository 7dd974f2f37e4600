"""`edgeft imatrix`: how much each weight matters on the user's own text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgeft.cli._output import ConsoleProgress, json_option, note, print_json, print_table

if TYPE_CHECKING:
    from edgeft.export import Origin
    from edgeft.gain import FileLoss

EPILOG = """
\b
Examples:
  edgeft imatrix runs/demo                              demo.imatrix.gguf, from the run's own training data
  edgeft imatrix ./base --data mine.jsonl --examples 500
  edgeft export runs/demo --imatrix demo.imatrix.gguf --to gguf --bpw 4.5
"""


@click.command(epilog=EPILOG)
@click.argument("model", metavar="RUN|MODEL")
@click.option("--adapter", type=click.Path(path_type=Path), help="PEFT adapter on MODEL, when that is not a run.")
@click.option("--data", help="Data set whose training split is read; default: the run's own.")
@click.option("--examples", type=click.IntRange(min=1), default=256, show_default=True, help="Examples to read.")
@click.option(
    "--out", type=click.Path(dir_okay=False, path_type=Path), help="File to write; default: NAME.imatrix.gguf."
)
@click.option(
    "--gain/--no-gain",
    "measured",
    default=True,
    show_default=True,
    help="Measure on held-out text what the matrix is worth: three files are made and compared with the model.",
)
@json_option
def imatrix(
    model: str,
    adapter: Path | None,
    data: str | None,
    examples: int,
    out: Path | None,
    measured: bool,
    as_json: bool,
) -> None:
    """Measure how much each weight matters, for exports that spend bits where they count.

    Reads text through the merged model, layer by layer, and writes llama.cpp's importance matrix (squared inputs), with
    the squared gradients that edgeft export --fit needs besides. Needs torch; exporting with the file does not.
    """
    from edgeft.export import calibrate, find

    progress = ConsoleProgress()
    origin = find(model, adapter, progress)
    file = calibrate(origin, data, out or Path(f"{origin.name}.imatrix.gguf"), examples, progress)
    found = _gain(origin, file, data, progress) if measured else []
    if as_json:
        gain = [one.as_dict() for one in found]
        print_json({"path": str(file), "bytes": file.stat().st_size, "examples": examples, "gain": gain})
        return
    click.echo(f"{file}  {file.stat().st_size / 1e6:.1f} MB")
    rows = [(one.name, f"{one.bytes / 1e6:.1f}", f"{one.kl:.4f}", _range(one.saved)) for one in found]
    if rows:
        print_table(("file", "MB", "KL from the model", "saved, 95 %"), rows)


def _gain(origin: Origin, file: Path, data: str | None, progress: ConsoleProgress) -> list[FileLoss]:
    """Nothing when it cannot be measured here; the matrix is written all the same."""
    from edgeft.errors import DataError, MissingDependency
    from edgeft.gain import measure_gain

    try:
        return measure_gain(origin, file, data, progress=progress)
    except (DataError, MissingDependency) as error:
        note(f"note: its gain is not measured: {error.message}")
        return []


def _range(pair: tuple[float, float] | None) -> str:
    return "" if pair is None else f"{pair[0]:+.4f} to {pair[1]:+.4f}"
