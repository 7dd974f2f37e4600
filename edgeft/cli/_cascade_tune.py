"""`edgeft cascade tune` and `edgeft cascade report`: both sides answer a labelled set, once."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from edgeft.cli._output import ConsoleProgress, dry_run_option, json_option, note, print_json, print_table
from edgeft.errors import ExitCode, UsageError
from edgeft.paths import write_json, write_text

if TYPE_CHECKING:
    from edgeft.cascade import Cascade
    from edgeft.cascade.answers import Case, Collector
    from edgeft.data.example import Example

Command = TypeVar("Command", bound=Callable[..., Any])

TUNE_EXAMPLES = """\b
Examples:
  edgeft cascade tune --data questions.jsonl --goal quality=0.95 --max-cost 0.50
  edgeft cascade tune --data questions.jsonl --goal risk=0.05 --policy quantile --max-cost 0
  edgeft cascade tune --data questions.jsonl --dry-run        what it would cost
  edgeft cascade tune --data asked.jsonl --judge model --max-cost 2    questions without answers, graded by a model
"""
REPORT_EXAMPLES = """\b
Examples:
  edgeft cascade report --data unseen.jsonl --png curve.png --html report.html
  edgeft cascade report --data unseen.jsonl --middle 0.71,0.0004
"""


def _answering(command: Command) -> Command:
    """What both need to get answers."""
    for option in reversed(
        (
            click.argument("file", type=click.Path(path_type=Path), default="cascade.toml"),
            click.option(
                "--data",
                required=True,
                help="Conversations whose last turn is the right answer; with a judge, it may lack.",
            ),
            click.option("--split", default=None, help="Part of the data set; default: train to tune, test to report."),
            click.option("--limit", type=click.IntRange(1), help="Use this many examples."),
            click.option(
                "--judge",
                type=click.Choice(["auto", "exact", "contains", "model"]),
                default="auto",
                show_default=True,
                help="When an answer is right; auto: same text or same JSON value; model: [judge] in FILE says.",
            ),
            click.option(
                "--max-tokens", type=click.IntRange(1), default=128, show_default=True, help="Longest answer."
            ),
            click.option("--max-cost", type=click.FloatRange(0), help="Most that asking the cloud may cost."),
            click.option(
                "--answers", type=click.Path(path_type=Path), help="Where answers are kept; default: beside FILE."
            ),
        )
    ):
        command = option(command)
    return command


@click.command(epilog=TUNE_EXAMPLES)
@_answering
@click.option(
    "--policy",
    "kind",
    type=click.Choice(["learned", "boosted", "quantile", "margin", "entropy"]),
    default="learned",
    show_default=True,
    help="What is fitted.",
)
@click.option(
    "--goal",
    "goal_text",
    default="quality=0.95",
    show_default=True,
    help="quality=SHARE of the cloud's at least cost, cost=MEAN per request, or risk=ALPHA[@CERTAINTY].",
)
@dry_run_option
@json_option
def tune(
    file: Path,
    data: str,
    split: str | None,
    limit: int | None,
    judge: str,
    max_tokens: int,
    max_cost: float | None,
    answers: Path | None,
    kind: str,
    goal_text: str,
    dry_run: bool,
    as_json: bool,
) -> int:
    """Fit the policy in FILE to its very model, and choose the threshold for a goal.

    The threshold is chosen by answers that the fit has not seen: in five folds, or for a risk in two halves. A goal of
    risk=ALPHA bounds the share of answers that are kept though wrong while the cloud's was right; a bound that cannot
    be promised ends with 5. It holds on average over calibration sets, or with @0.95 for 95 % of them.
    """
    from edgeft.cascade import Cascade
    from edgeft.cascade.tune import parse_goal
    from edgeft.cascade.tune import tune as fit

    goal = parse_goal(goal_text)
    examples = _examples(data, split or "train", limit, judge)
    with Cascade.open(file, ConsoleProgress(), calibrated=False) as cascade:
        if dry_run:
            with _collector(cascade, file, answers, max_tokens, judge) as collector:
                requests, cost = collector.estimate(examples)
            print_json({"requests": requests, "cost": cost}) if as_json else click.echo(
                f"{requests} requests, {cost:.4f}"
            )
            return ExitCode.OK
        cases = _cases(cascade, file, answers, max_tokens, judge, examples, max_cost)
        policy, digest = cascade.settings.policy, cascade.artifact_digest
        found = fit(cases, policy, kind, goal, digest, embedder=cascade.embedder_digest)
    target = file.with_name(f"{file.stem}.calibration.json")
    found.write(target)
    write_text(file, with_policy(file.read_text(encoding="utf-8"), kind, target.name))
    if as_json:
        print_json({"calibration": str(target), "threshold": found.threshold, **found.measured})
    else:
        rows = [(name.replace("_", " "), f"{value:.4g}") for name, value in found.measured.items()]
        print_table((kind, str(goal)), [("threshold", f"{found.threshold:.4g}"), *rows])
        note(f"wrote {target}, which {file} now names")
    return ExitCode.OK


@click.command(epilog=REPORT_EXAMPLES)
@_answering
@click.option("--middle", help="QUALITY,COST of one middle-size model for everything, to compare with.")
@click.option("--png", type=click.Path(path_type=Path), help="Write the curves as a picture.")
@click.option("--html", "page", type=click.Path(path_type=Path), help="Write a page.")
@click.option("--out", type=click.Path(path_type=Path), help="Write all figures as JSON.")
@json_option
def report(
    file: Path,
    data: str,
    split: str | None,
    limit: int | None,
    judge: str,
    max_tokens: int,
    max_cost: float | None,
    answers: Path | None,
    middle: str | None,
    png: Path | None,
    page: Path | None,
    out: Path | None,
    as_json: bool,
) -> int:
    """Judge the cascade on data it was not tuned on, beside chance, confidence alone and what is possible."""
    from edgeft.cascade import Cascade
    from edgeft.cascade.calibration import read_calibration
    from edgeft.cascade.report import plot, rows_of, write_html, write_png
    from edgeft.cascade.report import report as judged

    compared = _middle(middle)
    with Cascade.open(file, ConsoleProgress()) as cascade:
        if cascade.stale:
            note(f"the calibration is stale: {cascade.stale}")
        policy = cascade.settings.policy
        cases = _cases(
            cascade, file, answers, max_tokens, judge, _examples(data, split or "test", limit, judge), max_cost
        )
        known = policy.calibration and not cascade.stale
        calibration = read_calibration(cascade.settings.beside(policy.calibration)) if known else None
    figures = judged(cases, policy, calibration, compared)
    for path, write in ((png, write_png), (page, write_html)):
        if path:
            write(figures, path)
    if out:
        write_json(out, figures)
    if as_json:
        print_json(figures)
        return ExitCode.OK
    print_table(("policy", "APGR", "50 %", "80 %", "95 %", "99 %"), rows_of(figures), _title(figures))
    click.echo("\n" + plot(figures))
    return ExitCode.OK


def _title(figures: dict[str, Any]) -> str:
    return (
        f"device {figures['local_quality']:.1%}, cloud {figures['cloud_quality']:.1%} of {figures['examples']}; "
        "share deferred for so much of the gap"
    )


def _middle(text: str | None) -> tuple[float, float] | None:
    if text is None:
        return None
    try:
        quality, cost = (float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"--middle {text} is not QUALITY,COST", "--middle 0.71,0.0004") from None
    return quality, cost


def _examples(data: str, split: str, limit: int | None, judge: str) -> list[Example]:
    from edgeft.cascade.judge import load_questions
    from edgeft.data.load import load_split

    loaded = load_questions(Path(data), split) if judge == "model" and Path(data).is_file() else load_split(data, split)
    return list(loaded[:limit])


@contextlib.contextmanager
def _collector(cascade: Cascade, file: Path, answers: Path | None, max_tokens: int, judge: str) -> Iterator[Collector]:
    from edgeft.cascade.answers import AnswerFile, Collector
    from edgeft.cascade.judge import Grader

    path = answers or file.with_name(f"{file.stem}.answers.jsonl")
    grader = Grader(cascade.settings, cascade.budget, cascade.guard) if judge == "model" else None
    try:
        yield Collector(cascade, AnswerFile(path), max_tokens, judge, grader)
    finally:
        if grader is not None:
            grader.close()


def _cases(
    cascade: Cascade,
    file: Path,
    answers: Path | None,
    max_tokens: int,
    judge: str,
    examples: list[Example],
    max_cost: float | None,
) -> list[Case]:
    with _collector(cascade, file, answers, max_tokens, judge) as collector:
        requests, cost = collector.estimate(examples)
        note(f"{requests} requests to the cloud, at most {cost:.4f} {cascade.settings.budget.currency}")
        return collector.collect(examples, max_cost, ConsoleProgress())


def with_policy(text: str, kind: str, calibration: str) -> str:
    """The settings with another policy and calibration; comments stay. Values are changed inside [policy] only."""
    before, mark, after = text.partition("[policy]")
    if not mark:
        return f'{text.rstrip()}\n\n[policy]\nkind = "{kind}"\ncalibration = "{calibration}"\n'
    body, following, rest = _until_table(after)
    for name, value in (("calibration", calibration), ("kind", kind)):
        line = f'{name} = "{value}"'
        # A comment behind the value stays where it is.
        pattern = re.compile(rf'^(?:# *)?{name} *= *(?:"[^"]*"|\'[^\']*\')', re.MULTILINE)
        body = pattern.sub(line, body, count=1) if pattern.search(body) else f"\n{line}{body}"
    return before + mark + body + following + rest


def _until_table(text: str) -> tuple[str, str, str]:
    found = re.search(r"^\[", text, re.MULTILINE)
    return (text, "", "") if found is None else (text[: found.start()], "[", text[found.start() + 1 :])
