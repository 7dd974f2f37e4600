"""`edgeft eval`: a model's answers on held-out data, measured on the file that ships."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgeft.cli._generate import adapter_option, parse_adapter
from edgeft.cli._output import ConsoleProgress, json_option, note, print_json

if TYPE_CHECKING:
    from edgeft.evaluate import Prediction

EPILOG = """
\b
Examples:
  edgeft eval bot-q4.gguf --data smart-home              every test example
  edgeft eval smollm2-135m --data mine.jsonl --limit 50  the model before training
  edgeft eval bot-q4.gguf --data smart-home --metrics speed --json
  edgeft eval base-q4.gguf --adapter bot-lora.gguf --data smart-home
"""


@click.command(name="eval", epilog=EPILOG)
@click.argument("model")
@click.option("--data", required=True, help="Data set: a file, a prepared folder or a built-in name.")
@adapter_option
@click.option("--split", default="test", show_default=True, type=click.Choice(["test", "valid", "train"]))
@click.option("--limit", type=click.IntRange(min=1), help="Use the first N examples only.")
@click.option(
    "--metrics",
    default="exact-match,nll,speed",
    show_default=True,
    help="What to measure, with commas. exact-match alone ends an answer once it cannot match, which is much faster.",
)
@click.option("--runtime", default="auto", show_default=True, help="Runtime to measure on.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads that decode.")
@click.option("--show", default=3, show_default=True, type=click.IntRange(min=0), help="Wrong answers to show.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Write every answer to this JSONL file.")
@json_option
def evaluate(
    model: str,
    data: str,
    adapters: tuple[str, ...],
    split: str,
    limit: int | None,
    metrics: str,
    runtime: str,
    threads: int | None,
    show: int,
    out: Path | None,
    as_json: bool,
) -> None:
    """Exact match, loss and speed of MODEL on held-out data.

    MODEL is a .gguf file, an alias or hf:org/name:file.gguf. Each conversation is answered greedily from the messages
    before its last turn; an answer is right when it is the reference, spaces around it aside. The loss is that of the
    reference answers, in nats per token.
    """
    wanted = _metrics(metrics)
    from edgeft.data.load import load_split
    from edgeft.evaluate import evaluate_file
    from edgeft.plugins import Capability, LoadOptions
    from edgeft.sessions import open_session

    examples = load_split(data, split)[:limit]
    progress = ConsoleProgress()
    scaled = [parse_adapter(adapter) for adapter in adapters]
    needs: Capability | None = "scores" if "nll" in wanted else None
    opened = open_session(model, runtime, LoadOptions(threads=threads), progress, adapters=scaled, needs=needs)
    note(f"runtime: {opened.runtime} ({opened.reason})")
    with opened.session as session:
        figures, predictions = evaluate_file(session, opened.artifact.path, examples, metrics=wanted, progress=progress)
    if adapters:
        figures["adapters"] = {str(adapter.path): adapter.scale for adapter in scaled}
    figures = {"model": model, "data": data, "split": split, "runtime": opened.runtime, **figures}
    if out:
        _write(out, predictions)
    _print(figures, predictions, show, as_json)


def _metrics(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    known = ("exact-match", "nll", "speed")
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise click.UsageError(
            f"--metrics: {', '.join(unknown) or 'nothing'} cannot be measured, only {', '.join(known)}"
        )
    return names


def _write(out: Path, predictions: Sequence[Prediction]) -> None:
    from edgeft.paths import write_text

    lines = (json.dumps(prediction.as_dict(), ensure_ascii=False) for prediction in predictions)
    write_text(out, "".join(f"{line}\n" for line in lines))


def _print(figures: dict[str, Any], predictions: Sequence[Prediction], show: int, as_json: bool) -> None:
    wrong = [prediction for prediction in predictions if not prediction.exact]
    for prediction in wrong[: show if figures["exact_match"] is not None else 0]:
        note(f"\n  asked     {prediction.prompt}\n  expected  {prediction.expected}\n  answered  {prediction.answer}")
    if as_json:
        print_json(figures)
        return
    for key, value in figures.items():
        if value is not None:
            click.echo(f"{key:<20} {value:.4f}" if isinstance(value, float) else f"{key:<20} {value}")
