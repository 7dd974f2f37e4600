"""`edgeft cascade`: write, tune and judge the settings of a cascade, and see what it did."""

from __future__ import annotations

import json
import time
from pathlib import Path

import click

from edgeft.cli._cascade_settings import budget, privacy, set_, threshold
from edgeft.cli._cascade_tune import report, tune
from edgeft.cli._output import dry_run_option, json_option, note, print_json, print_table
from edgeft.errors import ExitCode, UsageError
from edgeft.paths import write_text

DEFAULT = "cascade.toml"

INIT_EXAMPLES = """\b
Examples:
  edgeft cascade init --model mine-q4.gguf --url https://api.example.com/v1#big-model
  edgeft run cascade.toml "Name three colours." --explain
"""


@click.group()
def cascade() -> None:
    """Answer on the device, ask the cloud only when it pays. docs/cascade.md says how."""


@cascade.command(epilog=INIT_EXAMPLES)
@click.argument("file", type=click.Path(path_type=Path), default=DEFAULT)
@click.option("--model", default="smollm2-135m", show_default=True, help="The local model.")
@click.option("--url", default="http://127.0.0.1:8080/v1", show_default=True, help="The endpoint: URL#MODEL.")
@dry_run_option
@json_option
def init(file: Path, model: str, url: str, dry_run: bool, as_json: bool) -> int:
    """Write commented settings to FILE (cascade.toml)."""
    from edgeft.cascade.settings import POLICIES, TEMPLATE, read_settings
    from edgeft.chat_completions import parse_endpoint

    endpoint = parse_endpoint(url)
    local = Path(model).expanduser()
    text = TEMPLATE.format(
        model=json.dumps(str(local.absolute()) if local.exists() else model),
        url=json.dumps(endpoint.url),
        name=json.dumps(endpoint.model),
        policies=", ".join(POLICIES),
    )
    if file.exists() and not dry_run:
        raise UsageError(f"{file} exists", "Choose another name, or remove it.")
    if not dry_run:
        write_text(file, text)
        read_settings(file)
    if as_json:
        print_json({"file": str(file), "written": not dry_run})
    elif dry_run:
        click.echo(text, nl=False)
    else:
        note(f"wrote {file}; the key is expected in EDGEFT_CLOUD_KEY")
    return ExitCode.OK


@cascade.command()
@click.argument("file", type=click.Path(path_type=Path), default=DEFAULT)
@click.option("--last", type=click.IntRange(1), default=20, show_default=True, help="How many answers.")
@json_option
def log(file: Path, last: int, as_json: bool) -> int:
    """What left the device, why, and what it cost."""
    from edgeft.cascade.audit import AuditLog
    from edgeft.cascade.settings import read_settings

    settings = read_settings(file)
    audit = AuditLog(settings.audit_file, settings.audit)
    try:
        records = audit.records(last)
    finally:
        audit.close()
    if as_json:
        print_json(records)
        return ExitCode.OK
    rows = [
        (
            time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(each["at"])),
            ", ".join(each["authors"]) or "nobody",
            "yes" if each["left_device"] else "no",
            f"{each['cost']:.6f}",
            each["finish"],
            each["reason"] or each["error"],
        )
        for each in records
    ]
    print_table(("at (UTC)", "author", "left", "cost", "end", "why"), rows)
    return ExitCode.OK


for _command in (tune, report, set_, threshold, budget, privacy):
    cascade.add_command(_command)
