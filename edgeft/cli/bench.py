"""`edgeft bench`: how fast a model really is here, what it takes, and what was forecast."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgeft.cli._output import ConsoleProgress, json_option, note, print_json, print_table
from edgeft.errors import ExitCode, UsageError

if TYPE_CHECKING:
    from edgeft.bench.compare import Compared
    from edgeft.bench.suite import Book, Measured, Result, Settings, Spread
    from edgeft.device import DeviceProfile
    from edgeft.forecast.facts import ModelFacts

EXAMPLES = """\b
Examples:
  edgeft bench mine-q4.gguf                                  speed, memory, and the forecast beside them
  edgeft bench mine-q4.gguf --runtime llama-cpp-python,xllamacpp --threads 1,2,4
  edgeft bench mine-q4.gguf --ctx 512,2048,8192 --out b.json  with full contexts; run it again to go on
  edgeft bench mine-q4.gguf --watts 7 --price 0.30           what a thousand tokens cost on a Raspberry Pi 5
  edgeft bench mine-q4.gguf --recalibrate                    correct the profile `local` by what was measured
"""


def _counts(_context: click.Context, _option: click.Parameter, value: str | None) -> tuple[int | None, ...]:
    """Whole numbers with commas between them."""
    if value is None:
        return (None,)
    try:
        counts = tuple(int(part) for part in value.split(","))
    except ValueError:
        raise click.BadParameter(f"{value!r} is no list of whole numbers, such as 1,2,4") from None
    if min(counts) < 1:
        raise click.BadParameter("each must be 1 or more")
    return counts


@click.command(epilog=EXAMPLES)
@click.argument("model")
@click.option("--runtime", "runtimes", default="auto", show_default=True, help="Runtimes, with commas; side by side.")
@click.option("--threads", callback=_counts, help="Threads that decode: 1,2,4. Default: the runtime's choice.")
@click.option(
    "--ctx", "contexts", callback=_counts, help="Contexts, each filled: 512,2048. Default: 512 tokens of one."
)
@click.option("--prompt", type=click.IntRange(min=1), help="Tokens of the prompt, whatever the context.")
@click.option("--tokens", type=click.IntRange(min=2), default=64, show_default=True, help="Decoded after each prompt.")
@click.option("--repeats", type=click.IntRange(min=1), default=3, show_default=True, help="Of every prompt.")
@click.option("--device", "profile_name", help="Profile to compare with; default: `local`, where there is one.")
@click.option("--recalibrate", is_flag=True, help="Write the profile again with what was measured.")
@click.option("--watts", type=click.FloatRange(min=0, min_open=True), help="Power of the device at work.")
@click.option("--price", type=click.FloatRange(min=0), help="Of a kilowatt-hour, for the cost of 1,000 tokens.")
@click.option("--out", type=click.Path(path_type=Path), help="Keep results here, and go on from those it has.")
@click.option("--plot", type=click.Path(path_type=Path), help="Write a PNG.")
@json_option
def bench(
    model: str,
    runtimes: str,
    threads: tuple[int | None, ...],
    contexts: tuple[int | None, ...],
    prompt: int | None,
    tokens: int,
    repeats: int,
    profile_name: str | None,
    recalibrate: bool,
    watts: float | None,
    price: float | None,
    out: Path | None,
    plot: Path | None,
    as_json: bool,
) -> int:
    """Measure MODEL on this machine, every setting in a process of its own.

    MODEL is what `edgeft run` takes. Each figure is the median of the repeats, after a warm-up that is not counted.
    Ctrl-C ends the bench with what is measured so far; with --out it goes on from there next time.
    """
    from edgeft.bench.suite import Measured, Settings

    settings = Settings(model, tuple(runtimes.split(",")), threads, contexts, prompt, tokens, repeats)
    facts = _facts(model)
    device = _profile(profile_name, needed=recalibrate)
    book = _book(out, model)
    results, ended = _measure(settings, book)
    measured = [found for found in results if isinstance(found, Measured)]
    rows = [(found, _compare(facts, device, found, tokens)) for found in measured]
    if as_json:
        print_json(_document(model, results, rows, device, watts, price, ended))
    else:
        _show(results, rows, device, watts, price)
    if plot and measured:
        from edgeft.bench.plot import write_png

        write_png(measured, Path(model).name, plot)
        note(f"{plot} written")
    if ended:
        note("interrupted" + (f"; the same command goes on from {out}" if out else ""))
        return ExitCode.INTERRUPTED
    if recalibrate:
        _recalibrate(device, facts, model, rows)
    return ExitCode.OK


def _facts(model: str) -> ModelFacts | None:
    """None for what no forecast is made of."""
    from edgeft.errors import EdgeftError
    from edgeft.forecast.find import find_facts
    from edgeft.sessions import find_artifact

    try:
        return find_facts(str(find_artifact(model).path))
    except EdgeftError:
        return None


def _profile(name: str | None, *, needed: bool) -> DeviceProfile | None:
    """Raises: UsageError when it is needed and not there."""
    from edgeft.device import load_profile, names

    if name is None and not needed and "local" not in names():
        note("no forecast to compare with: edgeft devices probe measures this machine for one")
        return None
    return load_profile(name or "local")


def _book(out: Path | None, model: str) -> Book:
    from edgeft.bench.suite import Book
    from edgeft.sessions import find_artifact

    path = find_artifact(model, "echo").path
    facts: dict[str, Any] = {"name": path.name}
    if path.exists():
        facts |= {"bytes": path.stat().st_size, "changed": path.stat().st_mtime_ns}
    book = Book(out, facts)
    book.open()
    return book


def _measure(settings: Settings, book: Book) -> tuple[list[Result], bool]:
    """Results, and whether Ctrl-C ended them."""
    from edgeft.bench.suite import Refused, bench

    results: list[Result] = []
    progress = ConsoleProgress()
    try:
        for result in bench(settings, book, progress):
            results.append(result)
    except KeyboardInterrupt:
        # Between keeping a result and handing it over there is time for Ctrl-C.
        kept = [found for job in settings.jobs() if (found := book.find(job))]
        return [*kept, *(each for each in results if isinstance(each, Refused))], True
    finally:
        progress.finish()
    return results, False


def _compare(facts: ModelFacts | None, device: DeviceProfile | None, found: Measured, tokens: int) -> list[Compared]:
    from edgeft.bench.compare import compared, fits_profile

    if facts is None or device is None:
        return []
    if reason := fits_profile(device, found):
        note(f"not compared with the forecast: {reason}")
        return []
    return compared(facts, device, found, tokens)


def _recalibrate(
    device: DeviceProfile | None,
    facts: ModelFacts | None,
    model: str,
    rows: Sequence[tuple[Measured, Sequence[Compared]]],
) -> None:
    """Raises: UsageError when nothing that was measured says anything about the profile."""
    from edgeft.bench.compare import recalibrated
    from edgeft.device import write_profile
    from edgeft.paths import home

    pairs = next((pairs for _, pairs in rows if pairs), None)
    if device is None or facts is None or pairs is None:
        raise UsageError("nothing was measured that the profile could be corrected by")
    file = home() / "devices" / f"{device.name}.toml"
    write_profile(recalibrated(device, facts, Path(model).name, pairs), file)
    note(f"{file} written")


# --- Showing ------------------------------------------------------------------


def _document(
    model: str,
    results: Sequence[Result],
    rows: Sequence[tuple[Measured, Sequence[Compared]]],
    device: DeviceProfile | None,
    watts: float | None,
    price: float | None,
    ended: bool,
) -> dict[str, Any]:
    from edgeft.bench.compare import as_dict
    from edgeft.bench.cost import of_decoding, of_prompts
    from edgeft.bench.suite import Refused
    from edgeft.probe.machine import machine

    def one(found: Measured, pairs: Sequence[Compared]) -> dict[str, Any]:
        costs = {"decode": of_decoding(found, watts, price), "prompt": of_prompts(found, watts, price)}
        per_1000 = {what: asdict(cost) if cost else None for what, cost in costs.items()}
        return {**asdict(found), "per_1000_tokens": per_1000, "forecast": as_dict(pairs) or None}

    return {
        "model": model,
        "machine": asdict(machine()),
        "device": device.name if device else None,
        "complete": not ended,
        "results": [one(found, pairs) for found, pairs in rows],
        "refused": [asdict(found) for found in results if isinstance(found, Refused)],
    }


def _show(
    results: Sequence[Result],
    rows: Sequence[tuple[Measured, Sequence[Compared]]],
    device: DeviceProfile | None,
    watts: float | None,
    price: float | None,
) -> None:
    from edgeft.bench.plot import bars
    from edgeft.bench.suite import Refused

    measured = [found for found, _ in rows]
    if measured:
        print_table(_COLUMNS, [_row(found) for found in measured])
        click.echo()
        _show_energy(measured, watts, price)
    if len(measured) > 1:
        click.echo("decode after the prompt, tokens/s")
        for line in bars(measured):
            click.echo(line)
        click.echo()
    compared = [line for found, pairs in rows for line in _forecast_rows(found, pairs)]
    if compared and device:
        columns = ("runtime", "context", "figure", "measured", "forecast", "error")
        print_table(columns, compared, title=f"Beside the forecast for {device.name}")
    for found in results:
        if isinstance(found, Refused):
            note(f"not measured: {found.runtime}, {found.threads or 'default'} threads, {found.reason}")


_COLUMNS = (
    "runtime", "threads", "context", "prompt", "load s", "prompt t/s", "first token s", "decode t/s",
    "after prompt t/s", "p50 ms", "p99 ms", "peak MB",
)  # fmt: skip


def _row(found: Measured) -> tuple[object, ...]:
    return (
        found.runtime,
        found.threads or "",
        found.context,
        found.prompt_tokens,
        round(found.load_s, 2),
        _said(found.prefill_tps),
        _said(found.ttft_s, 2),
        _said(found.decode_tps),
        _said(found.decode_full_tps),
        round(1000 * found.gap_p50_s, 1),
        round(1000 * found.gap_p99_s, 1),
        "" if found.peak_bytes is None else round(found.peak_bytes / 1e6),
    )


def _said(spread: Spread, digits: int = 1) -> str:
    """Median, and the whole range of the repeats."""
    if spread.count == 1:
        return f"{spread.median:.{digits}f}"
    return f"{spread.median:.{digits}f} ({spread.low:.{digits}f}-{spread.high:.{digits}f})"


def _show_energy(measured: Sequence[Measured], watts: float | None, price: float | None) -> None:
    from edgeft.bench.cost import of_decoding, of_prompts

    lines: list[tuple[object, ...]] = []
    for found in measured:
        for what, cost in (
            ("decoded", of_decoding(found, watts, price)),
            ("of a prompt", of_prompts(found, watts, price)),
        ):
            if cost:
                money = "" if cost.money is None else f"{cost.money:.3g}"
                lines.append((found.runtime, found.context, what, round(cost.joules, 1), money, cost.source))
    if lines:
        print_table(("runtime", "context", "1,000 tokens", "joules", "cost", "from"), lines)
        click.echo()
    elif measured[0].no_energy:
        note(f"no energy: {measured[0].no_energy}; --watts says what the device takes")


def _forecast_rows(found: Measured, pairs: Sequence[Compared]) -> Iterator[tuple[object, ...]]:
    for pair in pairs:
        scale, unit = (1e6, "MB") if pair.what == "peak_bytes" else (1.0, "tokens/s")
        values = (f"{pair.measured / scale:.1f} {unit}", f"{pair.forecast / scale:.1f} {unit}", f"{pair.error:+.0%}")
        yield found.runtime, found.context, _FIGURES[pair.what], *values


_FIGURES = {
    "decode": "decode",
    "decode_full": "decode after the prompt",
    "prefill": "prompt",
    "peak_bytes": "peak memory",
}
