"""The benchmark of quantization-aware training: shares of losses that are known, and the tables made of them."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import quantization_aware_data as data
import quantization_aware_tables as tables


def made_up(shares: list[float], noise: float = 0.0) -> dict[str, Any]:
    """Cells in which rounding adds 1 to every example's loss of 2, and a seed's other file has its share less."""
    draw, cells = random.Random(0), {}
    for seed, share in enumerate(shares):
        for kind, count in (("file", 20), ("more", 80)):
            tail = "/q4_0" if kind == "file" else ""
            losses = {"nll_trained": [2.0] * count, "nll": [3.0] * count, "tokens": [10] * count}
            less = [3.0 - share + draw.gauss(0, noise) for _ in range(count)]
            others = {"kl": [0.5] * count, "same": [9] * count, "bytes": 91_000_000} if kind == "file" else {}
            cells[f"{kind}/demo/lora/{seed}{tail}"] = losses | others
            cells[f"{kind}/demo/both/{seed}{tail}"] = losses | {"nll": less} | others
        cells |= {f"train/demo/{method}/{seed}": {"cpu_s": 321.4} for method in ("lora", "both")}
    return cells


def test_the_share_is_of_what_rounding_adds() -> None:
    found = tables.recovered(made_up([0.75, 0.75]), "demo", "both", "all", [0, 1])
    assert found is not None
    assert (found["share"], found["low"], found["high"]) == (0.75, 0.75, 0.75)
    assert (found["trained"], found["plain"], found["aware"]) == ([0.2, 0.2], [0.3, 0.3], [0.225, 0.225])
    assert (found["examples"], found["tokens"]) == (100, 1000)


def test_the_interval_knows_of_seeds_and_of_examples() -> None:
    seeds = tables.recovered(made_up([0.5, 1.0]), "demo", "both", "all", [0, 1])
    examples = tables.recovered(made_up([0.75], noise=1.0), "demo", "both", "all", [0])
    assert seeds is not None and examples is not None
    assert (seeds["low"], seeds["high"]) == (0.5, 1.0)
    assert 0.3 < examples["high"] - examples["low"] < 0.5  # 4 standard errors of 1 / sqrt(100)
    official = tables.recovered(made_up([0.75], noise=1.0), "demo", "both", "official", [0])
    assert official is not None and official["high"] - official["low"] > 0.6


def test_a_seed_that_is_not_complete_does_not_count() -> None:
    cells = made_up([0.5, 1.0])
    del cells["more/demo/both/1"]
    found = tables.recovered(cells, "demo", "both", "all", [0, 1, 2])
    assert found is not None and (found["seeds"], found["share"]) == ([0], 0.5)
    assert tables.recovered(cells, "text", "both", "all", [0]) is None


def test_tables_go_where_they_belong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.md"
    mark = "<!-- quantization_aware.py: {} -->\nold\n<!-- end -->\n"
    page.write_text("before\n" + mark.format("demo compared") + "between\n" + mark.format("text compared"))
    for name, file in (("FIGURES", tmp_path / "figures.json"), ("RESULTS", page), ("PAGE", page)):
        monkeypatch.setattr(tables, name, file)
    cells = made_up([0.75])
    cells["exact/demo/both/0/q4_0"] = {"exact": [1, 1, 1, 0]}
    tables.publish(tables.report(cells, ["text", "demo"], [0]))
    text = page.read_text()
    assert (
        "| `--for gguf-q4_0 --tune both`, 0.2000 | its file | 91.0 | 0.2250 | 0.0500 | 90.0 % | 75.0 % | 321 |" in text
    )
    assert "| LoRA on 16 bits, 0.2000 | merged, `gguf-q4_0` | 91.0 | 0.3000 | 0.0500 | 90.0 % | – | 321 |" in text
    assert text.startswith("before\n") and text.endswith("between\n" + mark.format("text compared"))
    assert tables.pages() == {page: text}  # what is published is up to date


def test_more_commands_are_held_out_and_none_of_the_data_set() -> None:
    from edgeft.data.smart_home.generate import commands
    from edgeft.data.smart_home.vocabulary import SPLITS

    known = {split: list(commands(split)) for split in SPLITS}
    more = list(commands("test", data.MORE, data.MORE_SEED, {one.core for each in known.values() for one in each}))
    assert len(data.more_commands()) == len({one.core for one in more}) == data.MORE
    assert not {one.core for one in more} & {one.core for each in known.values() for one in each}
    for split in ("train", "valid"):
        assert not {one.template for one in more} & {one.template for one in known[split]}
