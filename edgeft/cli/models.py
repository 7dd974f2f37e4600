"""`edgeft models`: what models there are, fetching them, looking into them, removing them."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import click

from edgeft.cli._output import ConsoleProgress, dry_run_option, json_option, note, print_json, print_table


@click.group()
def models() -> None:
    """List, pull, import and remove models.

    A model is named by a folder in Hugging Face format, a .gguf file, a run, hf:org/name[@revision][:file.gguf], or an
    alias of `edgeft models list`.
    """


@models.command("list")
@json_option
def list_models(as_json: bool) -> None:
    """Aliases and what is in the store: size, real bits per weight, licence, path."""
    from edgeft.models.listing import stored_models

    found = stored_models()
    if as_json:
        print_json([{**dataclasses.asdict(model), "path": str(model.path) if model.path else None} for model in found])
        return
    print_table(
        ("model", "kind", "state", "size", "bits/weight", "licence", "path"),
        [
            (
                m.name,
                m.kind,
                "here" if m.here else "not pulled",
                megabytes(m.bytes),
                m.bits_per_weight,
                m.licence,
                m.path,
            )
            for m in found
        ],
    )


def megabytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB"


@models.command()
@click.argument("reference")
@json_option
@dry_run_option
def pull(reference: str, as_json: bool, dry_run: bool) -> None:
    """Fetch REFERENCE (an alias or hf:org/name) into the store; nothing is fetched twice."""
    from edgeft.models import ALIASES, resolve

    if dry_run:
        alias = ALIASES.get(reference)
        size = f", {megabytes(alias.bytes)}" if alias else ""
        note(f"would fetch {reference} into the store{size}")
        return
    found = resolve(reference, progress=ConsoleProgress())
    if as_json:
        print_json({"path": str(found.path), "kind": found.kind, "licence": found.licence})
    else:
        click.echo(found.path)


@models.command("import")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="Folder to make; default: one in the store.")
@json_option
@dry_run_option
def import_model(file: Path, out: Path | None, as_json: bool, dry_run: bool) -> None:
    """Make a Hugging Face directory from FILE.gguf, so that it can be trained.

    Weights are dequantized to bfloat16: the directory is larger than the file, and no more precise.
    """
    from edgeft.models.gguf_header import read_header
    from edgeft.models.gguf_import import import_gguf, imported

    header = read_header(file)
    if dry_run:
        note(
            f"would import {file} ({header.architecture}) into {out or 'the store'}, {megabytes(2 * header.parameters)}"
        )
        return
    progress = ConsoleProgress()
    folder = import_gguf(file.absolute(), out, progress=progress) if out else imported(file.absolute(), progress)
    if as_json:
        print_json({"path": str(folder.absolute()), "parameters": header.parameters, "licence": header.licence})
    else:
        click.echo(folder)


@models.command()
@click.argument("reference")
@json_option
def show(reference: str, as_json: bool) -> None:
    """What REFERENCE really is: architecture, type mix, bits per weight, context, template. Fetches nothing."""
    from edgeft.models.describe import describe

    facts = describe(reference)
    if as_json:
        print_json(facts)
        return
    for key, value in facts.items():
        click.echo(f"{key:<16} {_readable(value)}")


def _readable(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_readable(inner)}" for name, inner in value.items())
    if isinstance(value, float):
        return f"{value:.4f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


@models.command()
@click.argument("name")
@click.option("--yes", is_flag=True, help="Do not ask.")
@dry_run_option
def rm(name: str, yes: bool, dry_run: bool) -> None:
    """Remove NAME from the store."""
    from edgeft.errors import UsageError
    from edgeft.models.listing import find_stored, remove

    model = find_stored(name)
    question = f"remove {model.name}, {megabytes(model.bytes)}, {model.path}"
    if dry_run:
        note(f"would {question}")
        return
    if not yes:
        if not sys.stdin.isatty():
            raise UsageError("there is no terminal to ask on", f"edgeft models rm {name} --yes")
        click.confirm(f"{question}?", abort=True, err=True)
    remove(model)
