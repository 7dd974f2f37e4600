"""`edgeft monitor`: what the request log of `edgeft serve` says, and an exit code for what is wrong."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgeft.cli._output import json_option, note, print_json, print_table
from edgeft.errors import ExitCode, UsageError
from edgeft.paths import home

if TYPE_CHECKING:
    from edgeft.monitor import Report
    from edgeft.request_log import Rated

_HOUR_S = 3600.0
_WEBHOOK_S = 10.0

EXAMPLES = """\b
Examples:
  edgeft monitor --hours 1
  edgeft monitor --save-baseline usual.json             once, while all is well
  edgeft monitor --baseline usual.json --webhook https://example.org/alerts
"""


@click.command(epilog=EXAMPLES)
@click.option(
    "--log", type=click.Path(path_type=Path), help="Of a server, or a cascade's audit log.  [default: the server's]"
)
@click.option("--hours", type=click.FloatRange(0, min_open=True), default=24.0, show_default=True, help="Look back.")
@click.option("--model", help="Only this one.")
@click.option("--baseline", type=click.Path(path_type=Path), help="What is usual; default: the log before that time.")
@click.option("--save-baseline", type=click.Path(path_type=Path), help="Write what is usual now to a file.")
@click.option("--max-psi", type=float, default=0.25, show_default=True, help="Drift (population stability index).")
@click.option("--max-errors", type=float, default=0.05, show_default=True, help="Share of requests that failed.")
@click.option("--max-deferrals", type=float, help="Share of answers from the cloud.")
@click.option("--min-liked", type=float, default=0.5, show_default=True, help="Share of thumbs up, of 10 or more.")
@click.option("--max-ttft", type=float, help="95 % of first tokens within this many ms.")
@click.option("--max-cost", type=float, help="Spent on the cloud in this time.")
@click.option("--webhook", metavar="URL", help="POST alerts there as JSON.")
@json_option
def monitor(
    log: Path | None,
    hours: float,
    model: str | None,
    baseline: Path | None,
    save_baseline: Path | None,
    webhook: str | None,
    as_json: bool,
    **limits: float | None,
) -> int:
    """Feedback, errors, speed and drift of what `edgeft serve` answered. The exit code is 5 when there is an alert."""
    from edgeft import monitor as monitoring

    if webhook and not webhook.startswith(("http://", "https://")):
        raise UsageError(f"not a web address: {webhook}")
    now, before = _requests(log or home() / "requests.sqlite", hours, model)
    usual = monitoring.read_reference(baseline) if baseline else monitoring.reference(before)
    if save_baseline:
        monitoring.reference(now).save(save_baseline)
    chosen = monitoring.Limits(
        limits["max_psi"],
        limits["max_errors"],
        limits["max_deferrals"],
        limits["min_liked"],
        ttft_ms=limits["max_ttft"],
        cost=limits["max_cost"],
    )
    report = monitoring.report(now, usual, chosen)
    if as_json:
        print_json(report.as_dict())
    else:
        _print(report)
    if not report.alerts:
        return ExitCode.OK
    if webhook:
        _post(webhook, {"alerts": report.alerts, "report": report.as_dict()})
    return ExitCode.CHECK_FAILED


def _requests(path: Path, hours: float, model: str | None) -> tuple[list[Rated], list[Rated]]:
    """The last hours, and all before them. Raises: UsageError when there is no log."""
    from edgeft.request_log import read_log

    if not path.is_file():
        raise UsageError(f"there is no request log {path}", "edgeft serve writes one; --log says where it is.")
    everything = [rated for rated in read_log(path) if model in (None, rated.request.served, rated.request.model)]
    begin = time.time() - hours * _HOUR_S
    return (
        [rated for rated in everything if rated.request.at >= begin],
        [rated for rated in everything if rated.request.at < begin],
    )


def _print(report: Report) -> None:
    rows: list[tuple[str, Any]] = [
        ("requests", report.requests),
        ("failed", f"{report.error_rate:.1%}"),
        ("from the cloud", f"{report.deferral_rate:.1%}"),
        ("thumbs up, down", f"{report.up}, {report.down}"),
        ("first token, 50 % and 95 %", _pair(report.ttft_p50_ms, report.ttft_p95_ms, "ms")),
        ("tokens/s, 50 %", "" if report.tokens_per_s_p50 is None else f"{report.tokens_per_s_p50:.1f}"),
        ("cost", f"{report.cost:.4f}"),
        *((f"drift of {drift.measure} (PSI)", f"{drift.psi:.3f}") for drift in report.drift),
    ]
    print_table(("", ""), [(name, str(value)) for name, value in rows])
    for alert in report.alerts:
        note(f"alert: {alert}")


def _pair(one: float | None, other: float | None, unit: str) -> str:
    return "" if one is None or other is None else f"{one:.0f}, {other:.0f} {unit}"


def _post(url: str, value: dict[str, Any]) -> None:
    """Send alerts; that it did not work is said and changes no exit code: the alert is what matters."""
    request = urllib.request.Request(url, json.dumps(value).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=_WEBHOOK_S):
            pass
    except (urllib.error.URLError, OSError, ValueError) as error:
        note(f"the webhook {url} did not take the alert: {error}")
