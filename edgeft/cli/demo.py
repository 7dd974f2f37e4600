"""`edgeft demo`: the whole job on a real model, as the commands a user would type."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import click

from edgeft import demo as workflow
from edgeft.cli._output import dry_run_option, json_option, note, print_json
from edgeft.errors import UsageError


@click.command()
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default="demo",
    show_default=True,
    help="Folder for the run, the file and the figures.",
)
@click.option("--fresh", is_flag=True, help="Start over instead of continuing an earlier demo in the same folder.")
@json_option
@dry_run_option
def demo(out: Path, fresh: bool, as_json: bool, dry_run: bool) -> None:
    """Teach SmolLM2-135M to turn spoken smart-home commands into tool calls, and run the result offline.

    Fetches the base model (93 MB) when it is not here yet, trains an adapter on the CPU, writes one 4-bit GGUF
    file, proves that it answers as the trained model does, and measures it. An interrupted demo continues.
    """
    if dry_run:
        for stage in workflow.stages(out):
            click.echo(stage.command)
        return
    if fresh and out.exists():
        _remove(out)
    figures = workflow.run_demo(out, _announce)
    if as_json:
        print_json(figures)
    else:
        _report(figures)


def _remove(folder: Path) -> None:
    """Delete an earlier demo, and only that: a folder without its record is somebody else's."""
    if not (folder / "stages.json").is_file():
        raise UsageError(f"{folder} was not made by edgeft demo", "Choose another folder with --out.")
    shutil.rmtree(folder)


def _announce(stage: workflow.Stage, done: bool) -> None:
    note(f"\n── {stage.title}{' (done before)' if done else ''}\n$ {stage.command}")


def _report(figures: dict[str, Any]) -> None:
    share = {key: f"{figures[key]:.1%}" for key in ("exact_match_before", "exact_match_after")}
    click.echo(
        f"\nexact match on {figures['examples']} unseen commands   "
        f"{share['exact_match_before']} before, {share['exact_match_after']} after\n"
        f"loss (nats per token)   {figures['nll_training_graph']:.4f} as trained (4-bit base + adapter)\n"
        f"                        {figures['nll_merged']:.4f} merged, before rounding to 4 bits\n"
        f"                        {figures['nll_file']:.4f} the file, in llama.cpp\n"
        f"file                    {figures['file']}, {figures['bytes'] / 1e6:.1f} MB, "
        f"{figures['bits_per_weight']:.2f} bits per weight\n"
        f"speed                   {figures['decode_tokens_per_s']:.0f} tokens/s, "
        f"first token after {figures['ttft_ms']:.0f} ms\n"
        f"time                    {figures['seconds'] / 60:.1f} minutes\n\n"
        f"Talk to it:  edgeft chat {os.path.relpath(figures['file'])}"
    )
