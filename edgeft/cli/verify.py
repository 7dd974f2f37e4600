"""`edgeft verify`: proof that a file answers as the trained model does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgeft.cli._output import ConsoleProgress, json_option, made, note, print_json, print_table

if TYPE_CHECKING:
    from edgeft.data.example import Example
    from edgeft.plugins import AdapterScale
    from edgeft.run import Run
    from edgeft.verify.bootstrap import Interval
    from edgeft.verify.ledger import Ledger, Row
    from edgeft.verify.report import Report

EPILOG = """
\b
Examples:
  edgeft verify runs/demo demo-q4.gguf                        on the run's own held-out data
  edgeft verify runs/demo demo-q4.gguf --report demo.html     the same, with plots
  edgeft verify demo-q4.gguf --last                           what was measured last; measures nothing
  edgeft verify ./base demo-q4.gguf --adapter ./adapter --data mine.jsonl
  edgeft verify runs/demo demo-lora.gguf --base base-q4.gguf  an adapter beside its base
  edgeft verify runs/demo demo-q4.gguf --tolerance kl=0.02 --tolerance top1=0.99
  edgeft verify runs/small small-tq2_0.gguf --against small-q4.gguf      which of the two to take
"""


@click.command(epilog=EPILOG)
@click.argument("model", metavar="[RUN|MODEL]")
@click.argument("artifact", type=click.Path(path_type=Path), required=False)
@click.option("--adapter", type=click.Path(path_type=Path), help="PEFT adapter on MODEL, when that is not a run.")
@click.option(
    "--base",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="GGUF that an adapter ARTIFACT goes onto; default: the one it was trained on.",
)
@click.option("--data", help="Data set to compare on; default: the run's own.")
@click.option("--split", type=click.Choice(["test", "valid", "train"]), help="Default: test, or valid without one.")
@click.option("--examples", type=click.IntRange(min=1), help="Compare the first N examples only.")
@click.option("--tolerance", multiple=True, metavar="NAME=VALUE", help="Change a limit: kl, top1 or nll.")
@click.option("--quick", is_flag=True, help="Measure the merged model and the file only, in half the time.")
@click.option("--runtime", default="auto", show_default=True, help="Runtime that loads the file.")
@click.option(
    "--report",
    "reports",
    multiple=True,
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write a report: FILE.html, one page with plots that needs no network, or FILE.json.",
)
@click.option(
    "--against",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Another file of the same task, such as one with 4 bits: loss, bytes and speed of both, and which to take.",
)
@click.option("--last", is_flag=True, help="Show what was measured last, out of the file's manifest.")
@json_option
def verify(
    model: str,
    artifact: Path | None,
    adapter: Path | None,
    base: Path | None,
    data: str | None,
    split: str | None,
    examples: int | None,
    tolerance: Sequence[str],
    quick: bool,
    runtime: str,
    reports: Sequence[Path],
    against: Path | None,
    last: bool,
    as_json: bool,
) -> None:
    """Prove that a file answers as the trained model does, and show what each step on the way costs.

    Compares ARTIFACT, loaded in its runtime, with base and adapter merged in torch: the same tokens for every text, the
    same chat template, and on held-out data the same next tokens, within limits that depend on the file's bits per
    weight (docs/verify.md). The ledger has every step: the graph that was trained, the merge, the file's tensors in
    torch, the file in its runtime. It goes into the file's manifest, unless only a part of the data is compared. Exit
    code 5 when a check fails. Of a file alone, RUN is the one that it was exported from.
    """
    model, artifact = _of_file(Path(model)) if artifact is None and not last else (model, artifact or Path(model))
    if last:
        _show_last(artifact, as_json)
        return
    limits = dict(_limit(text) for text in tolerance)
    _check_reports(reports)
    made(artifact)
    from edgeft.artifact import read_manifest
    from edgeft.export import as_exported, find, merged
    from edgeft.sessions import open_session
    from edgeft.verify.build_steps import Parts
    from edgeft.verify.check import verify_file
    from edgeft.verify.examples import held_out

    progress = ConsoleProgress()
    origin = find(model, adapter, progress)
    trained = origin.source
    file, adapters = _parts(artifact, base or origin.source.gguf)
    if origin.source.gguf and not adapters:
        origin = merged(origin, progress)
    origin = as_exported(origin, read_manifest(artifact))
    held, notes = held_out(origin.run, data, split)
    for text in notes:
        note(f"note: {text}")
    # A ledger's stages belong to one set of examples.
    whole = examples is None and (origin.run is None or (data is None and split is None))
    opened = open_session(str(file), runtime, progress=progress, adapters=adapters, needs="scores")
    with opened.session as session:
        report = verify_file(
            Parts(origin.source, opened.artifact.path, session, adapters, origin.run, opened.runtime, quick, trained),
            held[:examples],
            tolerance=limits,
            nll_training_graph=_trained_nll(origin.run) if whole else None,
            progress=progress,
        )
        context = _context(model, artifact, opened.runtime, origin.run, data, split)
        _write_reports(reports, report, context, session.detokenize)
    if whole:
        _write_ledger(artifact, report, context)
        _compare_counts(origin.run, report)
    if against is not None:
        context["against"] = _against(artifact, against, held[:examples], runtime, progress)
    _print(report, context, as_json)
    _fail_on(report, artifact)


def _of_file(artifact: Path) -> tuple[str, Path]:
    """The run that a file was exported from, and the file. Raises: UsageError when that is not known."""
    from edgeft.artifact import open_artifact
    from edgeft.errors import UsageError

    manifest = open_artifact(artifact).manifest
    if manifest is None or manifest.run is None:
        raise UsageError(f"{artifact} does not say which run it is of", "edgeft verify RUN|MODEL ARTIFACT")
    return manifest.run, artifact


def _show_last(artifact: Path, as_json: bool) -> None:
    """Raises: UsageError when nothing was measured."""
    from edgeft.artifact import open_artifact
    from edgeft.errors import UsageError
    from edgeft.verify.stored import COLUMNS, stored_steps

    manifest = open_artifact(artifact).manifest
    if manifest is None or not manifest.verification:
        raise UsageError(f"{artifact} was not verified", "edgeft verify RUN|MODEL ARTIFACT")
    found = dict(manifest.verification)
    if as_json:
        print_json({"artifact": str(artifact), "run": manifest.run, **found})
        return
    findings = found.get("findings", ())
    print_table(_CHECKS, [_finding_row(finding) for finding in findings])
    click.echo()
    title = f"{found.get('examples')} examples of {found.get('data')}, in {found.get('runtime')}"
    print_table(COLUMNS, [step.cells for step in stored_steps(found)], title)
    click.echo(f"\n{found.get('advice', '')}")


def _against(
    artifact: Path, other: Path, held: Sequence[Example], runtime: str, progress: ConsoleProgress
) -> dict[str, Any]:
    from edgeft.ternary_verdict import measure, verdict

    both = [measure(file, held, runtime, progress) for file in (artifact, other)]
    return {"files": [figures.as_dict() for figures in both], "verdict": verdict(*both)}


def _print_against(found: dict[str, Any]) -> None:
    rows = [
        (file["name"], f"{file['bytes'] / 1e6:.2f}", f"{file['nll']:.4f}", _number(file["tokens_per_s"]))
        for file in found["files"]
    ]
    click.echo()
    print_table(("file", "MB", "NLL", "tokens/s"), rows)
    click.echo(f"\n{found['verdict']}")


def _parts(artifact: Path, base: Path | None) -> tuple[Path, list[AdapterScale]]:
    """The file to load and what goes onto it. Raises: UsageError for an adapter without a base."""
    from edgeft.errors import UsageError
    from edgeft.models.adapter_file import is_adapter
    from edgeft.models.gguf_header import read_header
    from edgeft.plugins import AdapterScale

    if artifact.suffix != ".gguf" or not is_adapter(read_header(artifact)):
        return artifact, []
    if base is None:
        raise UsageError(f"{artifact} is an adapter", "Name the GGUF it goes onto: --base FILE.")
    return base, [AdapterScale(artifact)]


def _context(
    model: str, artifact: Path, runtime: str, run: Run | None, data: str | None, split: str | None
) -> dict[str, Any]:
    recorded = run.manifest().data if run else {}
    return {
        "model": model,
        "artifact": str(artifact),
        "runtime": runtime,
        "data": data or recorded.get("reference"),
        "split": split or (recorded.get("held_out") if data is None else None),
    }


def _check_reports(reports: Sequence[Path]) -> None:
    for file in reports:
        if file.suffix not in (".html", ".json"):
            raise click.UsageError(f"--report: {file} is neither FILE.html nor FILE.json")


def _write_reports(reports: Sequence[Path], report: Report, context: dict[str, Any], detokenize: Any) -> None:
    from edgeft.paths import write_json, write_text

    for file in reports:
        if file.suffix == ".json":
            write_json(file, {**context, **report.as_dict()})
        else:
            from edgeft.verify.html_report import page

            write_text(file, page(report, context, detokenize))
        note(f"note: wrote {file}")


def _write_ledger(artifact: Path, report: Report, context: dict[str, Any]) -> None:
    from edgeft import __version__
    from edgeft.artifact import update_ledger

    assert report.ledger is not None
    told = {key: context[key] for key in ("data", "split", "runtime")}
    found = {**told, "ok": report.ok, "edgeft_version": __version__, **report.ledger.as_dict()}
    found |= {"advice": report.advice, "findings": [finding.as_dict() for finding in report.findings]}
    if not update_ledger(artifact, report.losses, found):
        note(f"note: {artifact} has no manifest beside it to write the ledger into")


def _trained_nll(run: Run | None) -> float | None:
    return run.manifest().evaluation.get("nll_training_graph") if run else None


def _compare_counts(run: Run | None, report: Report) -> None:
    scored = run.manifest().evaluation.get("tokens") if run else None
    if scored is not None and scored != report.figures["tokens"]:
        note(f"note: training scored {scored:.0f} tokens, this comparison {report.figures['tokens']}")


def _limit(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    try:
        return name.strip(), float(value)
    except ValueError as error:
        raise click.UsageError(f"--tolerance: write NAME=VALUE, such as kl=0.05, not {text!r}") from error


def _print(report: Report, context: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json({**context, **report.as_dict()})
        return
    print_table(_CHECKS, [_finding_row(finding.as_dict()) for finding in report.findings])
    click.echo()
    for key, value in report.figures.items():
        if value is not None:
            click.echo(f"{key:<20} {_number(value)}")
    if report.ledger is not None:
        click.echo()
        _print_ledger(report.ledger)
        click.echo(f"\n{report.advice}")
    if "against" in context:
        _print_against(context["against"])


_CHECKS = ("check", "result", "value", "limit", "what")


def _finding_row(finding: Mapping[str, Any]) -> tuple[str, ...]:
    result = "skipped" if finding["skipped"] else "ok" if finding["ok"] else "FAILED"
    return finding["name"], result, _number(finding["value"]), _number(finding["limit"]), finding["detail"]


def _print_ledger(ledger: Ledger) -> None:
    title = f"{ledger.examples} examples, {ledger.tokens} tokens; KL from “{ledger.reference}”; [95 % interval]"
    columns = ("step", "NLL", "perplexity", "KL", "KL 99 %", "same top token", "exact match", "MB", "lost here")
    print_table(columns, [_ledger_row(row) for row in ledger.rows], title)
    for step in ledger.skipped:
        note(f"note: the step “{step.name}” is left out: {step.why}")


def _ledger_row(row: Row) -> tuple[str, ...]:
    return (
        row.title,
        _interval(row.nll, ".4f"),
        f"{row.perplexity.value:.3f}",
        _interval(row.kl, ".2g"),
        f"{row.kl_p99.value:.2g}",
        _interval(row.same_top, ".2%"),
        "" if row.exact is None else _interval(row.exact, ".1%"),
        "" if row.bytes is None else f"{row.bytes / 1e6:.1f}",
        "" if row.lost is None else f"{row.lost.value:.2g}",
    )


def _interval(interval: Interval, form: str) -> str:
    if interval.low is None or interval.high is None:
        return f"{interval.value:{form}}"
    return f"{interval.value:{form}} [{interval.low:{form}}, {interval.high:{form}}]"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _fail_on(report: Report, artifact: Path) -> None:
    from edgeft.errors import CheckFailed

    if not report.ok:
        failed = "; ".join(f"{finding.name}: {finding.detail}" for finding in report.failed)
        raise CheckFailed(
            f"{artifact} is not the trained model within the limits: {failed}",
            "Export again with more bits (--to gguf-q8_0), or set a limit with --tolerance NAME=VALUE.",
        )
