"""How far forecasts are off: on this machine, and against speeds that others published.

    python benchmarks/forecast.py [--json]                           published rows
    python benchmarks/forecast.py --here BOOK FILE... [--ctx 512,2048,8192] [--seconds 240] [--runtime xllamacpp]
        [--repeats 3] [--again]
    python benchmarks/forecast.py --report BOOK [--json]

`--here` measures GGUF files with full contexts, one process for each, and keeps what it finds in BOOK: it can be ended
and called again, and stops by itself before a setting for which `--seconds` leave no time. The forecast is made of the
profile `local` (`edgeft devices probe` first, with the same runtime), which was measured with no model of these.
`--again` measures what BOOK has once more and keeps the faster answers: minutes later, other neighbours of a virtual
machine are at work. Peak memory is VmHWM of the process, since `ru_maxrss` begins with the parent's. Decoding is the
median of 24 tokens, at the start and with the context full, of the fastest of `--repeats` answers: the forecast is of a
machine with nothing else to do. At the start it is the same work whatever the context, and the fastest of a file's
contexts counts for all of them. A virtual machine's neighbours change its speed from minute to minute, so the probe's
own model is timed before and after each setting: "pace" is its best speed then as a share of what the profile says of
it. Errors are given as they are and "at that pace", with the forecast multiplied by it: the first say how wrong a user
was, the second how much of that is the forecast's doing.

Ends with 1 when what is promised does not hold: memory within 10 %, decoding within 20 %; published rows 12 % in the
median and none off by more than a factor of 2.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import published

from edgeft.bench.child import run
from edgeft.bench.job import Answer, Event, Finished, Job, Loaded
from edgeft.bench.suite import START
from edgeft.device import DeviceProfile, load_profile
from edgeft.forecast.find import find_facts
from edgeft.forecast.memory import Settings, memory
from edgeft.forecast.speed import decode
from edgeft.paths import parse_json, write_json
from edgeft.probe.figures import TOKENS as PROBED
from edgeft.probe.measure import Bench
from edgeft.probe.synthetic import sized, write_model

TOKENS, SETTLE = 24, 4
"""Decoded after each prompt; the first ones are still in the way of the threads that computed it."""
MEMORY, DECODE = 0.10, 0.20
SPEEDS = ("decode", "decode_full")
REFERENCE = sized("Q8_0", 80_000_000)


def measure(
    book: Path,
    files: Sequence[Path],
    contexts: Sequence[int],
    runtime: str,
    seconds: float,
    repeats: int,
    *,
    again: bool,
) -> None:
    """Fill the book; what it has is only measured again when asked for."""
    began, longest = time.monotonic(), 0.0
    entries, device = read(book), load_profile("local")
    threads = int(device.decode_threads.value)
    for file in files:
        for context in contexts:
            key = f"{file.name} {context} {runtime}"
            if key in entries and not again:
                continue
            if time.monotonic() - began + longest > seconds:
                print(f"time is up before {key}", file=sys.stderr)
                return
            started = time.monotonic()
            before = reference(runtime, threads)
            job = Job(str(file), runtime, context, threads, None, (START, 0), TOKENS, repeats)
            found = {"file": str(file), **figures(list(run(job)))}
            found["reference"] = [before, reference(runtime, threads)]
            entries[key] = faster(entries.get(key, {}), found)
            longest = max(longest, time.monotonic() - started)
            write_json(book, entries)
            print(key, file=sys.stderr)


def faster(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """Of two measurements of a setting the better speeds, the higher peak, and all that was seen of the machine."""
    highest = ("peak_bytes", "prefill", *SPEEDS)
    best = {name: max(before.get(name, 0), now[name]) for name in highest}
    return {**now, **best, "reference": [*before.get("reference", ()), *now["reference"]]}


def reference(runtime: str, threads: int) -> float:
    """Tokens per second of the probe's own model."""
    with tempfile.TemporaryDirectory() as folder:
        return 1 / Bench(Path(folder), runtime).time(REFERENCE, threads, (START,)).seconds


def paces(entries: Sequence[dict[str, Any]], device: DeviceProfile) -> list[float | None]:
    """The machine's speed during each setting, as a share of its speed when it was probed; None where not measured."""
    with tempfile.TemporaryDirectory() as folder:
        facts = find_facts(str(write_model(Path(folder) / "reference.gguf", REFERENCE)))
    expected = decode(facts, device, START + PROBED // 2).value
    timed = (entry.get("reference") for entry in entries)
    return [max(speeds) / expected if speeds else None for speeds in timed]


def figures(events: Sequence[Event]) -> dict[str, Any]:
    loaded = next(event for event in events if isinstance(event, Loaded))
    finished = next(event for event in events if isinstance(event, Finished))
    answers = [event for event in events if isinstance(event, Answer)]
    start, full = ([answer for answer in answers if answer.asked == at] for at in (0, 1))
    return {
        "runtime": loaded.runtime,
        "context": loaded.context,
        "prompt_tokens": full[0].prompt_tokens,
        "peak_bytes": finished.peak_bytes,
        "prefill": max(answer.prompt_tokens / answer.ttft_s for answer in full),
        "decode": max(1 / statistics.median(answer.gaps[SETTLE:]) for answer in start),
        "decode_full": max(1 / statistics.median(answer.gaps) for answer in full),
    }


def read(book: Path) -> dict[str, Any]:
    return dict(parse_json(book.read_text())) if book.is_file() else {}


def rows(book: Path, device: DeviceProfile) -> Iterator[dict[str, Any]]:
    """What was measured, what was forecast, and by how much that is off."""
    entries = list(read(book).values())
    starts: dict[tuple[str, str], float] = {}
    for entry in entries:
        of = entry["file"], entry["runtime"]
        starts[of] = max(starts.get(of, 0.0), entry["decode"])
    for entry, pace in zip(entries, paces(entries, device), strict=True):
        file = Path(entry["file"])
        facts = find_facts(str(file))
        past = entry["prompt_tokens"] + TOKENS // 2
        pairs = {
            "peak_mb": (entry["peak_bytes"], memory(facts, device, Settings(entry["context"])).total, 1e6),
            "decode": (starts[entry["file"], entry["runtime"]], decode(facts, device, START + TOKENS // 2).value, 1),
            "decode_full": (entry["decode_full"], decode(facts, device, past).value, 1),
        }
        row: dict[str, Any] = {
            "model": file.stem,
            "context": entry["context"],
            "runtime": entry["runtime"],
            "pace": pace,
        }
        for name, (measured, forecast, scale) in pairs.items():
            row |= {
                name: measured / scale,
                f"{name}_forecast": forecast / scale,
                f"{name}_error": forecast / measured - 1,
            }
            if pace and name in SPEEDS:
                row[f"{name}_error_at_pace"] = forecast * pace / measured - 1
        yield row


def kept(found: Sequence[dict[str, Any]]) -> bool:
    return all(
        abs(row["peak_mb_error"]) <= MEMORY and max(abs(row["decode_error"]), abs(row["decode_full_error"])) <= DECODE
        for row in found
    )


def table(found: Sequence[dict[str, Any]]) -> str:
    head = (
        f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores\n\n"
        "| model | context | peak MB | forecast | error | pace | decode t/s | forecast | error | at that pace "
        "| with a full context | forecast | error | at that pace |\n|---|" + "--:|" * 13 + "\n"
    )
    lines = [_line(row) for row in found]
    names = ("peak_mb_error", *(f"{name}_error{how}" for name in SPEEDS for how in ("", "_at_pace")))
    off = {name: [abs(row[name]) for row in found if name in row] for name in names}
    said = ", ".join(
        f"{name} median {statistics.median(each):.1%}, worst {max(each):.1%}" for name, each in off.items() if each
    )
    return head + "".join(lines) + f"\nErrors: {said}.\n"


def _line(row: dict[str, Any]) -> str:
    cells = [row["model"], row["context"], *_cells(row, "peak_mb", 0), f"{row['pace']:.2f}" if row["pace"] else ""]
    for name in SPEEDS:
        cells += [*_cells(row, name, 1), _share(row.get(f"{name}_error_at_pace"))]
    return "| " + " | ".join(map(str, cells)) + " |\n"


def _cells(row: dict[str, Any], name: str, digits: int) -> list[str]:
    return [f"{row[name]:,.{digits}f}", f"{row[f'{name}_forecast']:,.{digits}f}", _share(row[f"{name}_error"])]


def _share(error: float | None) -> str:
    return "" if error is None else f"{error:+.0%}"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--here", type=Path, metavar="BOOK", help="measure FILEs and keep the results in BOOK")
    parser.add_argument("--report", type=Path, metavar="BOOK", help="compare what BOOK has with the forecast")
    parser.add_argument("--ctx", default="512,2048,8192")
    parser.add_argument("--runtime", default="auto")
    parser.add_argument("--seconds", type=float, default=240)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--again", action="store_true", help="measure again and keep the faster answers")
    parser.add_argument("files", nargs="*", type=Path)
    return parser.parse_args()


def main() -> int:
    asked = arguments()
    if asked.here:
        contexts = [int(part) for part in asked.ctx.split(",")]
        measure(asked.here, asked.files, contexts, asked.runtime, asked.seconds, asked.repeats, again=asked.again)
        return 0
    if asked.report:
        found = list(rows(asked.report, load_profile("local")))
        print(json.dumps({"kept": kept(found), "rows": found}) if asked.json else table(found))
        return 0 if kept(found) else 1
    data = published.Published()
    print(json.dumps(published.as_dict(data)) if asked.json else published.page(data))
    return 0 if published.kept(data) else 1


if __name__ == "__main__":
    sys.exit(main())
