"""Forecasts against tokens per second that others published; `benchmarks/forecast.py` prints them.

A row is never used for its own forecast. The machine's GB/s (GOPS for prompts) come from, in this order:

* other rows: the median of the same machine's other rows (leave one out);
* published: runs on that kind of machine that are not among the rows;
* copy: tinymembench's "C copy" times the median ratio of all other machines;
* nominal: the memory's nominal rate times the median share that all other machines reach;
* lanes (prompts): cores x clock x width times the median of all other machines;
* like: a stated share of another machine's.

Everything after that is `edgeft.forecast`'s own arithmetic. With `alone` no row of the same kind of machine is
used, nor a published run on it: what a forecast is worth for a machine of which nothing but its memory is known.
"""

from __future__ import annotations

import statistics
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgeft.device import DeviceProfile, Figure, load_profile
from edgeft.forecast.facts import ModelFacts, Part
from edgeft.forecast.speed import decode, prefill

DATA = Path(__file__).parent / "published.toml"
MEDIAN, WORST = 0.12, 2.0
"""What is promised: the median relative error, and the most by which a forecast may be off as a factor."""

Row = Mapping[str, Any]
Figures = tuple[float, str]
"""Speed of a machine and the rule it came from."""


@dataclass(frozen=True)
class Compared:
    row: Row
    what: str
    measured: float
    forecast: float
    rule: str

    @property
    def error(self) -> float:
        """Relative: 0.1 is 10 % too fast."""
        return self.forecast / self.measured - 1

    @property
    def factor(self) -> float:
        return max(self.forecast / self.measured, self.measured / self.forecast)


class Published:
    """The data file."""

    def __init__(self, file: Path = DATA) -> None:
        document = tomllib.loads(file.read_text(encoding="utf-8"))
        self.machines: Mapping[str, Mapping[str, Any]] = document["machines"]
        self.sources: Mapping[str, str] = document["sources"]
        self.rows: Sequence[Row] = document["rows"]

    def root(self, machine: str) -> str:
        return str(self.machines[machine].get("same", machine))

    def kin(self, machine: str, without: Row | None) -> list[Row]:
        return [row for row in self.rows if self.root(row["machine"]) == self.root(machine) and row is not without]

    def gbs(self, machine: str, without: Row | None = None) -> float | None:
        """Effective GB/s while decoding: of published runs, or the median of its rows."""
        rows = [row["read"] * row["decode"] for row in self.kin(machine, without)]
        known = self.machines[machine].get("known_gbs")
        return statistics.median(rows) if rows else known

    def gops(self, machine: str, repacked: bool, without: Row | None = None) -> float | None:
        rows = [
            2 * row["billions"] * row["prefill"]
            for row in self.kin(machine, without)
            if "prefill" in row and _repacked(row) == repacked
        ]
        known = self.machines[machine].get("known_repacked_gops") if repacked else None
        return statistics.median(rows) if rows else known

    def ratio(self, key: str, machine: str, speed: str) -> float | None:
        """Median of speed / `key` over all machines but this one and its kin."""
        found = []
        for name, facts in self.machines.items():
            if key in facts and self.root(name) != self.root(machine) and "same" not in facts:
                value = self.gbs(name) if speed == "decode" else self.gops(name, False)
                found += [value / facts[key]] if value is not None else []
        return statistics.median(found) if found else None


def _repacked(row: Row) -> bool:
    return str(row["type"]).startswith("Q4_0_")


def decode_figure(data: Published, row: Row, *, alone: bool = False) -> Figures | None:
    machine = data.root(row["machine"]) if alone else str(row["machine"])
    facts = data.machines[machine]
    if not alone and (others := data.gbs(machine, row)) is not None:
        return others, "other rows" if data.kin(machine, row) else "published"
    for key in ("copy", "nominal"):
        if key in facts and (ratio := data.ratio(key, machine, "decode")) is not None:
            return facts[key] * ratio, key
    if "like" in facts and (other := data.gbs(facts["like"])) is not None:
        return other * facts["share"], "like"
    return None


def prefill_figure(data: Published, row: Row) -> Figures | None:
    machine = str(row["machine"])
    facts = data.machines[machine]
    if (found := data.gops(machine, _repacked(row), row)) is not None:
        others = [
            other for other in data.kin(machine, row) if "prefill" in other and _repacked(other) == _repacked(row)
        ]
        return found, "other rows" if others else "published"
    if "lanes" in facts and (ratio := data.ratio("lanes", machine, "prefill")) is not None:
        return facts["lanes"] * ratio, "lanes"
    return None


def facts_of(row: Row) -> ModelFacts:
    """As much of a model as a speed at the start of a context takes."""
    part = Part("layer", str(row["type"]), round(row["billions"] * 1e9), round(row["read"] * 1e9))
    return ModelFacts(
        name=str(row["model"]), format="gguf", architecture="llama", parts=(part,), kv_values=(), windowed=(),
        window=0, heads=1, kv_heads=1, width=1, inner=1, vocabulary=1, context=1,
    )  # fmt: skip


def compared(data: Published, *, alone: bool = False) -> Iterator[Compared]:
    """Every row for which there is a figure; `alone`: decoding only."""
    for row in data.rows:
        if (found := decode_figure(data, row, alone=alone)) is not None:
            speed = decode(facts_of(row), _device(found[0])).value
            yield Compared(row, "decode", row["decode"], speed, found[1])
        if not alone and "prefill" in row and (found := prefill_figure(data, row)) is not None:
            yield Compared(row, "prefill", row["prefill"], prefill(facts_of(row), _device(found[0])).value, found[1])


def _device(speed: float) -> DeviceProfile:
    """A device of that speed, in decoding as in prompts."""
    figure = Figure(speed, "derived", "published rows")
    return replace(load_profile("rpi4-4g"), bandwidth=figure, prefill=figure, prefill_repacked=None)


def left_out(data: Published) -> list[str]:
    """Rows with nothing to forecast them from."""
    missing = [row for row in data.rows if decode_figure(data, row) is None]
    prompts = [row for row in data.rows if "prefill" in row and prefill_figure(data, row) is None]
    return [f"{row['machine']}, {row['model']}: decode" for row in missing] + [
        f"{row['machine']}, {row['model']}: prefill" for row in prompts
    ]


def summary(found: Sequence[Compared]) -> dict[str, Any]:
    worst = max(found, key=lambda each: each.factor)
    return {
        "rows": len(found),
        "median_error": round(statistics.median(abs(each.error) for each in found), 4),
        "worst_factor": round(worst.factor, 3),
        "worst": f"{worst.row['machine']}, {worst.row['model']}",
    }


def page(data: Published) -> str:
    """The comparison as Markdown."""
    found = list(compared(data))
    lines = [HEAD]
    for what in ("decode", "prefill"):
        mine = [each for each in found if each.what == what]
        said = summary(mine)
        lines.append(
            f"\n## {TITLES[what]}\n\n{said['rows']} rows: median error {said['median_error']:.1%}, "
            f"the worst off by a factor of {said['worst_factor']:.2f} ({said['worst']}).\n\n{COLUMNS}"
        )
        lines += [_line(each, data) for each in mine]
    strict = summary(list(compared(data, alone=True)))
    lines.append(
        f"\n## Machines nothing was measured on\n\nThe same rows of decoding, forecast from the memory's copying or "
        f"nominal rate alone, with no row and no published run of the same kind of machine: median error "
        f"{strict['median_error']:.1%} over {strict['rows']} rows, the worst off by a factor of "
        f"{strict['worst_factor']:.2f} ({strict['worst']}). That is why `edgeft devices probe` exists.\n"
    )
    missing = "; ".join(left_out(data)) or "none"
    lines.append(f"\nNot forecast, for want of anything to forecast from: {missing}.\n")
    return "".join(lines)


def _line(each: Compared, data: Published) -> str:
    row = each.row
    cells = (
        row["machine"], row["threads"] or "–", row["model"], row["type"], f"{each.measured:g}", f"{each.forecast:.3g}",
        f"{each.error:+.0%}", each.rule, f"{row['runtime']}; {data.sources[row['source']]}",
    )  # fmt: skip
    return "| " + " | ".join(map(str, cells)) + " |\n"


HEAD = f"""# Forecasts against published speeds

Made from `benchmarks/published.toml` by `make docs`; do not edit. `python benchmarks/forecast.py --json` has the same
figures for programs.

No row is used for its own forecast. "Rule" says where the machine's speed is from: *other rows*, the median of the same
machine's other rows (leave one out); *published*, other runs on that kind of machine; *copy* and *nominal*, its
memory's measured copying rate or nominal rate, times the median that all other machines make of theirs; *lanes*,
cores × clock × width in the same way; *like*, a stated share of another machine's speed, which is an estimate.
Promised is a median error of at most {MEDIAN:.0%} in decoding and no row off by more than a factor of {WORST:g}.
"""
TITLES = {"decode": "Decoding, tokens/s", "prefill": "Prompts, tokens/s"}
COLUMNS = (
    "| machine | threads | model | type | measured | forecast | error | rule | source |\n"
    "|---|---|---|---|---|---|---|---|---|\n"
)


def both(data: Published) -> dict[str, dict[str, Any]]:
    """Summaries of decoding and of prompts."""
    found = list(compared(data))
    return {what: summary([each for each in found if each.what == what]) for what in TITLES}


def kept(data: Published) -> bool:
    """Whether what is promised holds."""
    said = both(data)
    return said["decode"]["median_error"] <= MEDIAN and all(each["worst_factor"] <= WORST for each in said.values())


def as_dict(data: Published) -> dict[str, Any]:
    rows = [
        {**each.row, "what": each.what, "measured": each.measured, "forecast": round(each.forecast, 3),
         "error": round(each.error, 4), "rule": each.rule}
        for each in compared(data)
    ]  # fmt: skip
    alone = summary(list(compared(data, alone=True)))
    return {"kept": kept(data), **both(data), "alone": alone, "left_out": left_out(data), "compared": rows}
