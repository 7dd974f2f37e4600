"""`edgeft serve`: models on this machine behind OpenAI's protocol."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgeft.cli._generate import parse_adapter, run_options, sampling, settings
from edgeft.cli._output import dry_run_option, note, print_json
from edgeft.errors import UsageError, require
from edgeft.paths import home

if TYPE_CHECKING:
    from edgeft.serve.engine import Spec
    from edgeft.serve.server import Settings

EXAMPLES = """\b
Examples:
  edgeft serve smollm2-135m
  edgeft serve home=mine-q4.gguf --adapter lights=lights.gguf      models home and home:lights
  edgeft serve old.gguf new.gguf --ab both=old,new,0.1             a tenth of the clients gets new
  EDGEFT_SERVE_KEYS=… edgeft serve mine-q4.gguf --host 0.0.0.0
"""


@click.command(epilog=EXAMPLES)
@click.argument("models", nargs=-1, required=True, metavar="[NAME=]MODEL…")
@click.option("--adapter", "adapters", multiple=True, metavar="[MODEL:]NAME=FILE[=SCALE]", help="Serve as MODEL:NAME.")
@click.option("--ab", "splits", multiple=True, metavar="NAME=FIRST,SECOND[,SHARE]", help="Split clients between two.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Any but loopback needs EDGEFT_SERVE_KEYS.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0: any free one.")
@click.option("--queue", type=click.IntRange(1), default=64, show_default=True, help="Requests that may wait.")
@click.option(
    "--parallel",
    type=click.IntRange(1, 64),
    default=1,
    show_default=True,
    help="Answers that a model writes at a time; memory for a whole context each.",
)
@click.option("--rate", type=click.IntRange(1), help="Requests a minute per key; default: no limit.")
@click.option("--timeout", type=click.FloatRange(1), default=600.0, show_default=True, help="Seconds per answer.")
@click.option(
    "--grace", type=click.FloatRange(0), default=30.0, show_default=True, help="Seconds to finish at the end."
)
@click.option("--body-limit", type=click.IntRange(1024), default=4 << 20, show_default=True, help="Bytes per request.")
@click.option("--log", type=click.Path(path_type=Path), help="Request log (SQLite).  [default: in edgeft's folder]")
@click.option("--no-log", is_flag=True, help="Keep no request log.")
@click.option("--log-prompts", is_flag=True, help="Also write prompts and answers to the logs.")
@click.option("--confidence", is_flag=True, help="Log the mean log-probability of answers, for `edgeft monitor`.")
@click.option("--otel", is_flag=True, help="Export traces by OpenTelemetry, as its OTEL_… variables say.")
@run_options
@dry_run_option
def serve(dry_run: bool, otel: bool, **options: Any) -> None:
    """Serve MODELs over HTTP as OpenAI does: /v1/chat/completions and its kin.

    Keys are read from EDGEFT_SERVE_KEYS, commas between them. stdout gets the address when requests can be answered;
    stderr gets one JSON line per request.
    """
    require("starlette", "serve")
    require("uvicorn", "serve")
    require("prometheus_client", "serve")
    from edgeft.serve.server import serve as run

    chosen = _settings(options, otel)
    if dry_run:
        print_json(_shown(chosen))
        return
    run(chosen, lambda url: click.echo(f"{url}/v1"))
    note("stopped")


def _settings(options: dict[str, Any], otel: bool) -> Settings:
    from edgeft.serve.app import Limits
    from edgeft.serve.catalogue import parse_split
    from edgeft.serve.gate import KEYS_VARIABLE, check_binding, parse_keys
    from edgeft.serve.server import Settings

    values = {**settings(options), "parallel": options["parallel"]}
    keys = parse_keys(os.environ.get(KEYS_VARIABLE))
    check_binding(options["host"], keys)
    return Settings(
        _specs(options["models"], options["adapters"], values),
        tuple(parse_split(split) for split in options["splits"]),
        options["host"],
        options["port"],
        keys,
        options["rate"],
        options["queue"],
        options["grace"],
        sampling(values),
        Limits(options["body_limit"], answer_s=options["timeout"]),
        None if options["no_log"] else options["log"] or home() / "requests.sqlite",
        options["log_prompts"],
        options["confidence"],
        _exporter() if otel else None,
    )


def _exporter() -> Any:
    require("opentelemetry.sdk", "otel")
    require("opentelemetry.exporter.otlp.proto.http", "otel")
    from edgeft.serve.telemetry import exporter

    return exporter()


def _specs(models: Sequence[str], adapters: Sequence[str], values: dict[str, Any]) -> tuple[tuple[str, Spec], ...]:
    """Names and what to load. Raises: UsageError for a name that is taken, or an adapter of an unknown model."""
    from edgeft.serve.engine import Spec
    from edgeft.sessions import levers

    references = dict(_named(model) for model in models)
    if len(references) < len(models):
        raise UsageError("two models have the same name", "Give them names: NAME=MODEL.")
    by_model: dict[str, dict[str, tuple[str, float]]] = {name: {} for name in references}
    for text in adapters:
        model, name, adapter = _adapter(text, list(references))
        by_model[model][name] = adapter
    names = ("context", "threads", "threads-batch", "parallel")
    load = {**{name.replace("-", "_"): values[name] or None for name in names}, **levers(values)}
    return tuple(
        (name, Spec(reference, str(values["runtime"]), load, by_model[name])) for name, reference in references.items()
    )


def _named(text: str) -> tuple[str, str]:
    """`NAME=MODEL`, or MODEL, whose name is that of the file without its ending."""
    name, equals, reference = text.partition("=")
    if equals and not Path(text).exists():
        if not name or not reference or ":" in name:
            raise UsageError(f"not a model: {text}", "Write NAME=MODEL, without a colon in the name.")
        return name, reference
    path = Path(text)
    name = path.name if path.exists() else text
    for ending in (".gguf", ".echo.json", ".toml"):
        name = name.removesuffix(ending)
    return name.replace(":", "-"), text


def _adapter(text: str, models: Sequence[str]) -> tuple[str, str, tuple[str, float]]:
    name, equals, file = text.partition("=")
    model, colon, short = name.rpartition(":")
    if not equals or not short or (colon and model not in models) or (not colon and len(models) > 1):
        raise UsageError(f"not an adapter: {text}", f"Write MODEL:NAME=FILE; models are {', '.join(models)}.")
    adapter = parse_adapter(file)
    return model or models[0], short, (str(adapter.path.absolute()), adapter.scale)


def _shown(chosen: Settings) -> dict[str, Any]:
    names = [f"{name}:{adapter}" for name, spec in chosen.models for adapter in ("", *spec.adapters)]
    return {
        "models": [name.removesuffix(":") for name in names],
        "splits": [split.name for split in chosen.splits],
        "host": chosen.host,
        "port": chosen.port,
        "keys": len(chosen.keys),
        "queue": chosen.queue,
        "log": str(chosen.log) if chosen.log else None,
    }
