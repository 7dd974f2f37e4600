"""`edgeft run`: one prompt in, one answer out."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgeft.chat import Delta, Usage
from edgeft.cli._generate import (
    adapter_option,
    ask_for,
    by_option,
    explain,
    open_model,
    parse_adapter,
    run_options,
    sampling,
    settings,
    show_notes,
    stream,
    system_prompt,
)
from edgeft.cli._output import json_option, print_json
from edgeft.errors import ExitCode, UsageError
from edgeft.paths import parse_json

if TYPE_CHECKING:
    from edgeft.chat import TokenIds
    from edgeft.plugins import Session
    from edgeft.sessions import Opened

EXAMPLES = """\b
Examples:
  edgeft run smollm2-135m "Name three colours."
  edgeft run mine-q4.gguf --temperature 0.8 --seed 7 - < question.txt
  edgeft run mine-q4.gguf "kitchen light off" --json-schema call.json --json
"""


@click.command(epilog=EXAMPLES)
@click.argument("model")
@click.argument("prompt", required=False)
@click.option("--system", help="System prompt; default: the one the model was trained with, if any. '' for none.")
@click.option("--raw", is_flag=True, help="Give the prompt to the model as it is, without its chat template.")
@click.option("--json-schema", "schema_file", type=click.Path(path_type=Path), help="Answer with JSON that validates.")
@adapter_option
@click.option("--stop", multiple=True, metavar="TEXT", help="End the answer before this text; repeatable.")
@click.option(
    "--explain",
    "explaining",
    is_flag=True,
    help="Say with what settings a model runs and why, or how a cascade answered.",
)
@by_option
@click.option("--logprobs", type=click.IntRange(0, 100), default=0, help="Alternatives per token, in --json.")
@run_options
@json_option
def run(
    model: str,
    prompt: str | None,
    system: str | None,
    raw: bool,
    schema_file: Path | None,
    adapters: tuple[str, ...],
    stop: tuple[str, ...],
    explaining: bool,
    by: str,
    logprobs: int,
    as_json: bool,
    **flags: Any,
) -> int:
    """Answer PROMPT with MODEL, streaming to stdout.

    MODEL is a .gguf file or a name from `edgeft models list`. The prompt comes from stdin when it is - or left out and
    stdin is not a terminal. Ctrl-C ends the answer where it is; the exit code is then 130.
    """
    if logprobs and not as_json:
        raise UsageError("--logprobs needs --json")
    if raw and system:
        raise UsageError("--raw has no place for --system", "Write it into the prompt.")
    text = _read_prompt(prompt)
    schema = _read_schema(schema_file) if schema_file else None
    values = settings(flags)
    how = sampling(values, stop=stop, json_schema=schema, top_logprobs=logprobs)
    opened = open_model(model, values, [parse_adapter(adapter) for adapter in adapters])
    with opened.session as session:
        ask_for(opened, by)
        tokens = session.tokenize(text, special=True, bos=True) if raw else _chat_tokens(opened, system, text)
        deltas = []
        with contextlib.closing(stream(session, tokens, how)) as answer:
            for delta in answer:
                deltas.append(delta)
                if not as_json:
                    click.echo(delta.text, nl=False)
        code = _finish(model, opened, deltas, as_json)
        show_notes(session)
        if explaining:
            explain(opened)
        return code


def _chat_tokens(opened: Opened, system: str | None, text: str) -> TokenIds:
    instructions = system_prompt(system, opened)
    before = [{"role": "system", "content": instructions}] if instructions else []
    return opened.session.render([*before, {"role": "user", "content": text}])


def _finish(model: str, opened: Opened, deltas: list[Delta], as_json: bool) -> int:
    """End the output; the exit code."""
    usage = deltas[-1].usage
    assert usage is not None
    text = "".join(delta.text for delta in deltas)
    if as_json:
        print_json(_result(model, opened, text, usage, deltas))
    elif not text.endswith("\n"):
        click.echo()
    return ExitCode.INTERRUPTED if usage.finish_reason == "cancel" else ExitCode.OK


def _result(model: str, opened: Opened, text: str, usage: Usage, deltas: list[Delta]) -> dict[str, Any]:
    result: dict[str, Any] = {"text": text, "model": model, "runtime": opened.runtime, "usage": usage.as_dict()}
    if (record := getattr(opened.session, "record", None)) is not None:
        result["cascade"] = record.as_dict()
    logprobs = [_logprobs(opened.session, delta) for delta in deltas if delta.logprob is not None]
    return {**result, "logprobs": logprobs} if logprobs else result


def _logprobs(session: Session, delta: Delta) -> dict[str, Any]:
    def entry(token: int, logprob: float) -> dict[str, Any]:
        return {"token": token, "text": session.detokenize([token]), "logprob": round(logprob, 6)}

    assert delta.token is not None and delta.logprob is not None
    return {**entry(delta.token, delta.logprob), "top": [entry(*choice) for choice in delta.top_logprobs]}


def _read_prompt(prompt: str | None) -> str:
    if prompt is None and sys.stdin.isatty():
        raise UsageError("there is no prompt", "Give it as an argument, or pipe it in.")
    if prompt is None or prompt == "-":
        try:
            prompt = sys.stdin.buffer.read().decode("utf-8-sig").removesuffix("\n")
        except UnicodeDecodeError as error:
            raise UsageError(f"the prompt on stdin is not UTF-8: {error}") from error
    if not prompt:
        raise UsageError("the prompt is empty")
    if not prompt.isascii() and any("\ud800" <= letter <= "\udfff" for letter in prompt):
        raise UsageError("the prompt is not UTF-8")
    return prompt


def _read_schema(file: Path) -> Mapping[str, Any]:
    try:
        schema = parse_json(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read the JSON schema {file}: {error.strerror}") from error
    except ValueError as error:
        raise UsageError(f"{file} is not JSON: {error}") from error
    if not isinstance(schema, dict):
        raise UsageError(f"{file} is not a JSON schema: it must be an object")
    return schema
