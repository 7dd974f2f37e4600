"""`edgeft imatrix`: how much each weight matters on the user's own text."""

from __future__ import annotations

from pathlib import Path

import click

from edgeft.cli._output import ConsoleProgress, json_option, print_json

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
@json_option
def imatrix(model: str, adapter: Path | None, data: str | None, examples: int, out: Path | None, as_json: bool) -> None:
    """Measure how much each weight matters, for exports that spend bits where they count.

    Reads text through the merged model, layer by layer, and writes llama.cpp's importance matrix (squared inputs), with
    the squared gradients that edgeft export --fit needs besides. Needs torch; exporting with the file does not.
    """
    from edgeft.export import calibrate, find

    progress = ConsoleProgress()
    origin = find(model, adapter, progress)
    file = calibrate(origin, data, out or Path(f"{origin.name}.imatrix.gguf"), examples, progress)
    if as_json:
        print_json({"path": str(file), "bytes": file.stat().st_size, "examples": examples})
    else:
        click.echo(f"{file}  {file.stat().st_size / 1e6:.1f} MB")
