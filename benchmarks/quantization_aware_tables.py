"""The figures of `quantization_aware.py`: summed up from its cells, and as the tables of the documentation.

`publish` writes the sums beside the results, and the tables into the marked parts of the pages; `docs/generate.py
--check` makes the tables again from the sums.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

FIGURES = Path(__file__).parent / "results" / "quantization_aware.json"
RESULTS = FIGURES.with_suffix(".md")
PAGE = Path(__file__).parent.parent / "docs" / "quantization-aware.md"

Cells = Mapping[str, Any]
Figures = dict[str, Any]

SETS = {"all": ("file", "more"), "official": ("file",)}
"""Held-out examples that a share is of -> the cells that have them."""

COMPARED = (
    ("both", "`--for gguf-q4_0 --tune both`", {"q4_0": "its file"}),
    ("aware", "`--for gguf-q4_0`", {"q4_0": "its file"}),
    (
        "lora",
        "LoRA on 16 bits",
        {
            "q4_0": "merged, `gguf-q4_0`",
            "q4": "merged, `gguf-q4`",
            "q4_k_m": "merged, `gguf-q4_k_m`",
            "unmerged-q4_0": "unmerged on the base's `gguf-q4_0`",
        },
    ),
    (
        "qlora",
        "QLoRA on NF4",
        {
            "w16-q4_0": "into 16 bits, `gguf-q4_0`",
            "nf4-q4_0": "into the NF4 round trip, `gguf-q4_0`",
            "w16-q4": "into 16 bits, `gguf-q4`",
            "nf4-q4": "into the NF4 round trip, `gguf-q4`",
            "w16-q4_k_m": "into 16 bits, `gguf-q4_k_m`",
            "nf4-q4_k_m": "into the NF4 round trip, `gguf-q4_k_m`",
            "unmerged-q4_0": "unmerged on the base's `gguf-q4_0`",
        },
    ),
)
"""Method, its name, and how -> as what it ships."""


# --- From cells to figures ----------------------------------------------------------


def report(cells: Cells, tasks: Sequence[str], seeds: Sequence[int]) -> Figures:
    """Task -> what is known of it."""
    return {task: of_task(cells, task, seeds) for task in tasks}


def of_task(cells: Cells, task: str, seeds: Sequence[int]) -> Figures:
    shares = {
        f"{method}, {which}": recovered(cells, task, method, which, seeds)
        for method in ("both", "aware")
        for which in SETS
    }
    files, trainings, valid, runtime = (
        below(cells, f"{kind}/{task}/") for kind in ("file", "train", "valid", "runtime")
    )
    return {
        "recovered": {name: share for name, share in shares.items() if share},
        "validation": {name: round(sum(cell["nll"]) / sum(cell["tokens"]), 5) for name, cell in valid.items()},
        "runtime": runtime,
        "trainings": trainings,
        "files": {name: line(cell, cells.get(f"exact/{task}/{name}")) for name, cell in sorted(files.items())},
    }


def below(cells: Cells, prefix: str) -> Figures:
    return {name.removeprefix(prefix): cell for name, cell in cells.items() if name.startswith(prefix)}


def line(cell: Figures, answered: Figures | None) -> Figures:
    """Means per learned token of one file."""
    tokens = round(sum(cell["tokens"]))
    known = {key: round(sum(cell[key]) / tokens, 5) for key in ("nll_trained", "nll", "kl", "same")}
    if answered:
        known["exact_match"] = round(sum(answered["exact"]) / len(answered["exact"]), 4)
    return {**known, "bytes": cell["bytes"], "examples": len(cell["tokens"]), "tokens": tokens}


def recovered(cells: Cells, task: str, method: str, which: str, seeds: Sequence[int]) -> Figures | None:
    """The share with a 95 % interval over the seeds that are known, and what it is made of; None without any."""

    def parts(name: str, seed: int) -> list[Any]:
        keys = [f"{kind}/{task}/{name}/{seed}" + ("/q4_0" if kind == "file" else "") for kind in SETS[which]]
        return [cells[key] for key in keys if key in cells]

    pairs = {seed: (parts("lora", seed), parts(method, seed)) for seed in seeds}
    known = [seed for seed, pair in pairs.items() if all(len(each) == len(SETS[which]) for each in pair)]
    if not known:
        return None

    def rows(side: int, key: str) -> list[list[float]]:
        return [[value for cell in pairs[seed][side] for value in cell[key]] for seed in known]

    tokens = round(sum(rows(0, "tokens")[0]))
    losses = {"trained": rows(0, "nll_trained"), "plain": rows(0, "nll"), "aware": rows(1, "nll")}
    means = {name: [round(sum(row) / tokens, 5) for row in found] for name, found in losses.items()}
    examples = len(losses["plain"][0])
    return {"seeds": known, "examples": examples, "tokens": tokens, **means, **interval(**losses)}


def interval(
    trained: Sequence[Any], plain: Sequence[Any], aware: Sequence[Any], rounds: int = 10_000
) -> dict[str, Any]:
    """The recovered share; seeds and held-out examples drawn with replacement, the same for all three.

    Args:
        trained, plain, aware: (seeds, examples), summed losses of LoRA, of its file, and of the other file.
    """
    import numpy as np

    added, gained = np.subtract(plain, trained), np.subtract(plain, aware)
    generator = np.random.default_rng(0)
    seeds, examples = added.shape

    def share(rows: Any, columns: Any) -> float:
        chosen = np.ix_(rows, columns)
        return float(gained[chosen].sum() / added[chosen].sum())

    drawn = [
        share(generator.integers(0, seeds, seeds), generator.integers(0, examples, examples)) for _ in range(rounds)
    ]
    low, high = np.percentile(drawn, [2.5, 97.5])
    by_seed = [round(share([seed], range(examples)), 4) for seed in range(seeds)]
    whole = share(range(seeds), range(examples))
    return {"share": round(whole, 4), "low": round(float(low), 4), "high": round(float(high), 4), "by_seed": by_seed}


# --- From figures to tables ------------------------------------------------------------


def publish(figures: Figures) -> None:
    """Keep the figures of tasks that have some, and put their tables into the pages."""
    from edgeft.paths import write_json, write_text

    write_json(FIGURES, known_figures() | {task: found for task, found in figures.items() if found["files"]})
    for file, text in pages().items():
        write_text(file, text)


def known_figures() -> Figures:
    found: Figures = json.loads(FIGURES.read_text(encoding="utf-8")) if FIGURES.is_file() else {}
    return found


def pages() -> dict[Path, str]:
    """Pages with tables -> what should be in them."""
    tables = {
        f"{task} {name}": "\n".join(make(found))
        for task, found in known_figures().items()
        for name, make in (("recovered", recovered_table), ("compared", compared_table))
    }
    return {file: filled(file.read_text(encoding="utf-8"), tables) for file in (RESULTS, PAGE)}


def filled(text: str, tables: Mapping[str, str]) -> str:
    """A page with its marked parts made anew."""

    def part(found: re.Match[str]) -> str:
        table = tables.get(found[2])
        return found[0] if table is None else f"{found[1]}\n{table}\n{found[3]}"

    return re.sub(r"(<!-- quantization_aware\.py: (.*?) -->)\n.*?(<!-- end -->)", part, text, flags=re.DOTALL)


def recovered_table(found: Figures) -> Iterator[str]:
    """A column per seed, all held-out examples first, the official ones below."""
    for name, share in found["recovered"].items():
        method, which = name.split(", ")
        if method != "both":
            continue
        if which == "official" and "both, all" in found["recovered"]:
            yield ""
        seeds = share["seeds"]
        what = f"{share['examples']:,} held-out examples, {share['tokens']:,} learned tokens"
        yield f"| {what} | {' | '.join(f'seed {seed}' for seed in seeds)} | |"
        yield f"|---|{'---|' * len(seeds)}---|"
        for label, key in (
            ("LoRA, as trained (bfloat16)", "trained"),
            ("LoRA → merge → `gguf-q4_0`", "plain"),
            ("`--for gguf-q4_0 --tune both`", "aware"),
        ):
            yield f"| {label} | {' | '.join(f'{value:.4f}' for value in share[key])} | {mean(share[key]):.4f} |"
        each = " | ".join(f"{100 * value:.1f} %" for value in share["by_seed"])
        yield f"| recovered | {each} | **{percent(share)}** |"


def percent(share: Figures) -> str:
    return f"{100 * share['share']:.1f} % ({100 * share['low']:.1f} to {100 * share['high']:.1f})"


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def compared_table(found: Figures, seed: int = 0) -> Iterator[str]:
    """One seed: every way to ship an adapter."""
    yield "| trained as | shipped as | MB | NLL | KL | same next token | exact match | training, CPU s |"
    yield "|---|---|--:|--:|--:|--:|--:|--:|"
    for method, label, ways in COMPARED:
        first = True
        for how, shipped in ways.items():
            row = found["files"].get(f"{method}/{seed}/{how}")
            if row is None:
                continue
            trained = found["trainings"][f"{method}/{seed}"]
            head = f"{label}, {row['nll_trained']:.4f}" if first else ""
            known = f"{trained['cpu_s']:.0f}" if trained["cpu_s"] else "–"
            exact = f"{100 * row['exact_match']:.1f} %" if "exact_match" in row else "–"
            yield (
                f"| {head} | {shipped} | {row['bytes'] / 1e6:.1f} | {row['nll']:.4f} | {row['kl']:.4f} | "
                f"{100 * row['same']:.1f} % | {exact} | {known if first else ''} |"
            )
            first = False
