"""`edgeft data`: check, prepare and split data sets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from edgeft.cli._output import ConsoleProgress, dry_run_option, json_option, note, print_json, print_table
from edgeft.errors import ExitCode, UsageError

if TYPE_CHECKING:
    from edgeft.data.check import Reader, Report, SplitReport, TokenStatistics
    from edgeft.data.formats import Format
    from edgeft.data.prepare import Options, Prepared

_SHOWN = 10
_BAR = 40

# As edgeft.data.formats.FORMATS: help must not import the readers. A test compares them.
FORMAT_NAMES = ("messages", "prompt-completion", "instruction", "sharegpt", "text", "preference")

format_option = click.option(
    "--format", "as_format", type=click.Choice(FORMAT_NAMES), help="Read every record as this; default: detect each."
)
out_option = click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder to write.")
valid_option = click.option(
    "--valid", type=click.FloatRange(0, 50), default=5.0, show_default=True, help="Percent held out for validation."
)
test_option = click.option(
    "--test", type=click.FloatRange(0, 50), default=5.0, show_default=True, help="Percent held out for the test."
)
force_option = click.option("--force", is_flag=True, help="Replace a prepared folder that is already there.")


@click.group()
def data() -> None:
    """Check, prepare and split data sets.

    DATA is a file (.jsonl .json .csv .tsv .parquet .txt), a folder with train, valid and test files, or the built-in
    data set smart-home. Records may be messages, prompt/completion, instruction/input/output, ShareGPT conversations,
    plain text or preference pairs.
    """


@data.command(epilog="Example: edgeft data check chats.jsonl --model smollm2-135m")
@click.argument("dataset", metavar="DATA")
@click.option("--model", help="Count tokens with this model's tokenizer and chat template.")
@click.option("--context", type=click.IntRange(min=1), help="Context window in tokens; default: the model's own.")
@click.option("--preview", type=click.IntRange(min=0), default=0, help="Show so many examples of each split, too.")
@format_option
@json_option
@click.pass_context
def check(
    ctx: click.Context,
    dataset: str,
    model: str | None,
    context: int | None,
    preview: int,
    as_format: Format | None,
    as_json: bool,
) -> None:
    """Report what DATA holds and what is wrong with it. Exit code 1 when it cannot be used."""
    from edgeft.data.check import as_dict, first_examples
    from edgeft.data.check import check as run_check

    if context and not model:
        raise UsageError("--context needs --model", "The length in tokens depends on the tokenizer.")
    reader = _reader(model, context) if model else None
    report = run_check(dataset, as_format=as_format, reader=reader, progress=ConsoleProgress())
    examples = {item.name: list(first_examples(item.file, as_format, preview)) for item in report.splits}
    if as_json:
        print_json(as_dict(report) | ({"preview": examples} if preview else {}))
    else:
        _show(report)
        _show_examples(examples)
    if report.problems():
        ctx.exit(ExitCode.FAILED)


@data.command(epilog="Example: edgeft data prepare chats.csv --out chats --scrub-pii")
@click.argument("dataset", metavar="DATA")
@out_option
@format_option
@valid_option
@test_option
@click.option("--near", type=click.FloatRange(0.5, 1), default=0.9, show_default=True, help="Similarity of duplicates.")
@click.option("--keep-near", is_flag=True, help="Keep near-duplicates.")
@click.option("--keep-duplicates", is_flag=True, help="Keep exact duplicates, too.")
@click.option("--keep-leaks", is_flag=True, help="Keep training examples that a held-out split also has.")
@click.option(
    "--scrub-pii", is_flag=True, help="Replace e-mail addresses, phone, card and social security numbers, IP addresses."
)
@click.option(
    "--preferences",
    type=click.Choice(["keep", "chosen"]),
    default="keep",
    help="Keep preference pairs, or make examples of the preferred answers.",
)
@click.option("--licence", help="Licence of the data, for data.json.")
@force_option
@dry_run_option
@json_option
def prepare(
    dataset: str,
    out: Path,
    as_format: Format | None,
    valid: float,
    test: float,
    near: float,
    keep_near: bool,
    keep_duplicates: bool,
    keep_leaks: bool,
    scrub_pii: bool,
    preferences: Literal["keep", "chosen"],
    licence: str | None,
    force: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Make a prepared folder: canonical JSONL, no duplicates, no leakage, and a digest in data.json.

    A single file is split by content: adding lines later moves none of the others. A folder keeps its splits.
    """
    from edgeft.data.prepare import Options

    options = Options(
        as_format=as_format,
        shares={"valid": valid / 100, "test": test / 100},
        exact=not keep_duplicates,
        near=None if keep_near or keep_duplicates else near,
        leaks=not keep_leaks,
        scrub_pii=scrub_pii,
        preferences=preferences,
        licence=licence,
    )
    _make(dataset, out, options, force, dry_run, as_json)


@data.command(epilog="Example: edgeft data split chats.jsonl --out chats --valid 10 --test 10")
@click.argument("dataset", metavar="DATA")
@out_option
@format_option
@valid_option
@test_option
@force_option
@dry_run_option
@json_option
def split(
    dataset: str,
    out: Path,
    as_format: Format | None,
    valid: float,
    test: float,
    force: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Only split a file by content, and write the splits in canonical form; nothing is removed."""
    from dataclasses import replace

    from edgeft.data.load import resolve_dataset
    from edgeft.data.prepare import SPLIT_ONLY

    if not resolve_dataset(dataset).is_file():
        raise UsageError(f"{dataset} already has splits", "Give one file, or use edgeft data prepare.")
    shares = {"valid": valid / 100, "test": test / 100}
    _make(dataset, out, replace(SPLIT_ONLY, as_format=as_format, shares=shares), force, dry_run, as_json)


def _make(dataset: str, out: Path, options: Options, force: bool, dry_run: bool, as_json: bool) -> None:
    from edgeft.data.prepare import check_target, write_prepared
    from edgeft.data.prepare import prepare as run_prepare

    check_target(out, force=force)
    prepared = run_prepare(dataset, options, ConsoleProgress())
    manifest = None if dry_run else write_prepared(prepared, out, options, force=force)
    _list("left out", prepared.bad)
    if as_json:
        print_json(_prepared_dict(prepared, out, manifest))
        return
    print_table(("split", "examples"), list(prepared.counts().items()))
    changes = {**prepared.removed, **{f"scrubbed {kind}": count for kind, count in prepared.scrubbed.items()}}
    changes["bad lines"] = len(prepared.bad)
    click.echo(
        "left out or changed: "
        + (", ".join(f"{count} {kind}" for kind, count in changes.items() if count) or "nothing")
    )
    if prepared.moved:
        note(
            f"so few examples that {prepared.moved} had to be moved to fill a split; add more before you trust a score"
        )
    click.echo(f"{out}: not written (dry run)" if manifest is None else f"{out}: digest {manifest['digest']}")


def _prepared_dict(prepared: Prepared, out: Path, manifest: dict[str, Any] | None) -> dict[str, Any]:
    return {
        "out": str(out),
        "written": manifest is not None,
        "digest": manifest["digest"] if manifest else None,
        "splits": prepared.counts(),
        "removed": dict(prepared.removed),
        "scrubbed": dict(prepared.scrubbed),
        "bad_lines": [str(bad) for bad in prepared.bad],
    }


def _reader(model: str, context: int | None) -> Reader:
    """Tokenizer, template and context window of a model that is on this machine."""

    from edgeft.data.check import Reader
    from edgeft.models.references import resolve
    from edgeft.models.text import load_text_side, read_object

    folder = resolve(model, want="hf", progress=ConsoleProgress()).path
    text = load_text_side(folder)
    settings = read_object(folder / "config.json")
    window = context or settings.get("max_position_embeddings")
    if not window:
        raise UsageError(f"{folder}/config.json names no context window", "Give one with --context.")
    return Reader(text.need_template(), text.tokenize, text.eos_tokens, int(window))


# --- The report -------------------------------------------------------------------------


def _show(report: Report) -> None:
    click.echo(f"{report.path}\ndigest {report.digest}\n")
    columns = ("split", "examples", "format", "bad lines", "duplicates", "near-duplicates", "role problems")
    print_table(columns, [_row(item) for item in report.splits])
    for item in report.splits:
        _list(f"bad lines in {item.file.name}", item.bad)
        _list("duplicates", [*item.exact, *item.near])
        _list("role problems", item.roles)
        if item.tokens is not None and item.tokens.lengths:
            _show_tokens(item.name, item.tokens)
        if item.tokens is not None:
            _list(f"longer than {item.tokens.context} tokens", item.tokens.too_long)
            _list("refused by the chat template", item.tokens.refused)
            _list("control tokens in the text", item.tokens.control)
    if report.leaks:
        _list("leakage between splits", report.leaks)
    for problem in report.problems():
        note(f"unusable: {problem}")


def _show_examples(examples: Mapping[str, Sequence[Sequence[Mapping[str, str]]]]) -> None:
    for split, found in examples.items():
        for turns in found:
            click.echo(f"\n{split}:")
            for turn in turns:
                click.echo(f"  {turn['role']:<10} {turn['content']}")


def _row(item: SplitReport) -> tuple[object, ...]:
    formats = ", ".join(name if len(item.formats) == 1 else f"{name} {n}" for name, n in item.formats.items())
    return item.name, item.examples, formats, len(item.bad), len(item.exact), len(item.near), len(item.roles)


def _show_tokens(name: str, tokens: TokenStatistics) -> None:
    total = sum(tokens.lengths)
    click.echo(
        f"\n{name}: {total} tokens, {tokens.learned / total:.0%} learned; median {tokens.quantile(0.5)}, "
        f"95% up to {tokens.quantile(0.95)}, longest {max(tokens.lengths)} of {tokens.context}"
    )
    bins = tokens.histogram()
    most = max(count for _, _, count in bins)
    for low, high, count in bins:
        click.echo(f"{low:>7} – {high:<7} {'█' * -(-count * _BAR // most):<{_BAR}} {count}")
    for kind, count in tokens.notes.items():
        click.echo(f"{count} examples: {kind}")


def _list(title: str, places: Sequence[object]) -> None:
    """The first places on stderr; all of them are in the JSON."""
    if not places:
        return
    note(f"\n{title}:")
    for place in places[:_SHOWN]:
        note(f"  {place}")
    if len(places) > _SHOWN:
        note(f"  … and {len(places) - _SHOWN} more")
