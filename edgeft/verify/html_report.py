"""A verification as one HTML page with its plots in it: it can be mailed, and opens without a network."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from edgeft.verify import svg
from edgeft.verify.bootstrap import Interval
from edgeft.verify.ledger import PERCENTILES, ChangedToken, Ledger, Row
from edgeft.verify.report import Finding, Report

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1e23; --soft: #6b7280; --line: #d9dde3; --page: #fff; --mark: #4269d0 }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8eb; --soft: #9aa3af; --line: #3a404a; --page: #15171a } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page); max-width: 62rem;
  margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem; margin-bottom: .2rem } h2 { font-size: 1.1rem; margin-top: 2rem }
table { border-collapse: collapse; width: 100%; font-size: .9rem }
th, td { text-align: left; padding: .35rem .6rem; border-bottom: 1px solid var(--line); vertical-align: top }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
small, .soft { color: var(--soft) } td small { display: block }
.ok { color: #16803c } .bad { color: #c62828; font-weight: 600 } .advice { border-left: 4px solid var(--mark);
  padding: .4rem .9rem } code { font-size: .9em }
svg { width: 100%; max-width: 46rem; display: block } svg text { font: 12px system-ui, sans-serif; fill: var(--ink) }
.grid { stroke: var(--line) } .range { stroke: var(--mark); stroke-width: 2 } .dot { fill: var(--mark) }
"""


def page(report: Report, context: Mapping[str, Any], detokenize: Callable[[Sequence[int]], str]) -> str:
    """The whole page.

    Args:
        context: model, artifact, runtime, data, split, as the command knows them.
        detokenize: text of tokens.
    """
    ledger = report.ledger
    verdict = '<span class="ok">passed</span>' if report.ok else '<span class="bad">FAILED</span>'
    where = ", ".join(f"{key} {context[key]}" for key in ("data", "split", "runtime") if context.get(key))
    body = [
        f"<h1>{escape(str(context['artifact']))}</h1>",
        f'<p class="soft">against {escape(str(context["model"]))} · {escape(where)} · {verdict}</p>',
    ]
    if ledger is not None:
        body += _ledger(ledger, report.advice)
    body.append(_findings(report.findings))
    if ledger is not None and ledger.changed:
        body.append(_changed(ledger.changed, detokenize))
    title = escape(str(context["artifact"]))
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>verify {title}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head><body>'
        + "\n".join(body)
        + "</body></html>\n"
    )


def _ledger(ledger: Ledger, advice: str) -> list[str]:
    names = [row.title for row in ledger.rows]
    others = [row for row in ledger.rows if row.name != ledger.reference]
    shown = [
        "<h2>From training to the device</h2>",
        _steps(ledger),
        *(f'<p class="soft">Left out: {escape(step.name)}, because {escape(step.why)}</p>' for step in ledger.skipped),
        f'<p class="advice">{escape(advice)}</p>',
        "<h2>Loss on held-out data, nats per token</h2>",
        svg.dots(names, [row.nll for row in ledger.rows]),
    ]
    if others:
        labels = [f"{share:.1%}".replace(".0%", "%") if share < 1 else "worst" for share in PERCENTILES]
        shown += [
            f"<h2>KL from “{escape(_title(ledger))}”, nats, by share of tokens</h2>",
            svg.lines([row.title for row in others], [list(enumerate(row.percentiles)) for row in others], labels),
            '<p class="soft">Read: at the step of that colour, so many percent of the tokens have at most this KL.</p>',
            f"<h2>Same most probable token as “{escape(_title(ledger))}”</h2>",
            svg.dots([row.title for row in others], [row.same_top for row in others], form=".2%"),
        ]
    return shown


def _title(ledger: Ledger) -> str:
    row = ledger.row(ledger.reference)
    return row.title if row else ledger.reference


def _steps(ledger: Ledger) -> str:
    head = (
        '<tr><th>step</th><th class="n">NLL</th><th class="n">perplexity</th><th class="n">KL, mean</th>'
        '<th class="n">KL, 99 %</th><th class="n">same top token</th><th class="n">exact match</th>'
        '<th class="n">MB</th><th class="n">lost here</th></tr>'
    )
    note = (
        f"{ledger.examples} examples, {ledger.tokens} scored tokens. KL and same top token: from “{_title(ledger)}”. "
        "Lost here: KL from the step before. Exact match: answers that greedy decoding gives token by token. "
        "Below each figure its 95 % interval (bootstrap over examples)."
    )
    rows = "".join(_step(row) for row in ledger.rows)
    return f'<table>{head}{rows}</table><p class="soft">{escape(note)}</p>'


def _step(row: Row) -> str:
    size = "" if row.bytes is None else f"{row.bytes / 1e6:.1f}"
    cells = [
        _cell(row.nll, ".4f"),
        _cell(row.perplexity, ".3f"),
        _cell(row.kl, ".3g"),
        _cell(row.kl_p99, ".3g"),
        _cell(row.same_top, ".2%"),
        _cell(row.exact, ".1%"),
        f'<td class="n">{size}</td>',
        _cell(row.lost, ".3g"),
    ]
    return f"<tr><td>{escape(row.title)}</td>{''.join(cells)}</tr>"


def _cell(interval: Interval | None, form: str) -> str:
    if interval is None:
        return "<td></td>"
    between = ""
    if interval.low is not None and interval.high is not None:
        between = f"<small>{interval.low:{form}} – {interval.high:{form}}</small>"
    return f'<td class="n">{interval.value:{form}}{between}</td>'


def _findings(findings: Sequence[Finding]) -> str:
    rows = []
    for finding in findings:
        verdict = "skipped" if finding.skipped else "ok" if finding.ok else "FAILED"
        kind = "bad" if not finding.ok else "soft" if finding.skipped else "ok"
        value, limit = ("" if number is None else f"{number:.4g}" for number in (finding.value, finding.limit))
        rows.append(
            f'<tr><td>{escape(finding.name)}</td><td class="{kind}">{verdict}</td><td class="n">{value}</td>'
            f'<td class="n">{limit}</td><td>{escape(finding.detail)}</td></tr>'
        )
    head = '<tr><th>check</th><th>result</th><th class="n">value</th><th class="n">limit</th><th>what</th></tr>'
    return f"<h2>Checks</h2><table>{head}{''.join(rows)}</table>"


def _changed(tokens: Sequence[ChangedToken], detokenize: Callable[[Sequence[int]], str]) -> str:
    rows = "".join(
        f'<tr><td class="n">{token.example + 1}</td><td><code>…{escape(detokenize(token.tokens))}</code></td>'
        f'<td><code>{escape(detokenize([token.token]))}</code></td><td class="n">{token.kl:.3g}</td>'
        f'<td class="n">{token.reference:.3f}</td><td class="n">{token.file:.3f}</td></tr>'
        for token in tokens
    )
    head = (
        '<tr><th class="n">example</th><th>after</th><th>the next token</th><th class="n">KL</th>'
        '<th class="n">reference gives it</th><th class="n">the file</th></tr>'
    )
    return f"<h2>Where the file parts most from the reference</h2><table>{head}{rows}</table>"
