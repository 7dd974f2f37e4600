"""Files for phones, as `edgeft verify` judges them: size, distance from the model and speed, one row per target.

    python benchmarks/mobile.py MODEL --data DATA --work FOLDER [--targets litert-int8,litert-q8,…] [--examples N]
                                [--json]

MODEL is what `edgeft export` takes: a run, a directory, an alias. Files are made once and kept in FOLDER. Distances are
of DATA's held-out split. Speed is of `edgeft bench`: tokens/s of decoding, median of three; on a machine that does
other things only the ratio of two rows says something, and that roughly.

Needs the targets' toolchains (`edgeft toolchain install litert`, `executorch`) and the `train` and `litert` extras.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

TARGETS = ("litert-int8", "litert-q8", "litert-q4", "litert-fp32")
COLUMNS = ("MB", "KL, nats", "at most", "same next token", "at least", "decode, tokens/s", "verify")


@dataclass(frozen=True)
class Row:
    target: str
    bytes: int
    kl: float
    kl_limit: float
    top1: float
    top1_limit: float
    tokens: int
    passed: bool
    decode: float

    def cells(self) -> list[str]:
        return [
            f"{self.bytes / 1e6:.1f}",
            f"{self.kl:.4f}",
            f"{self.kl_limit:.4f}",
            f"{self.top1:.1%}",
            f"{self.top1_limit:.1%}",
            f"{self.decode:.1f}",
            "passes" if self.passed else "refused",
        ]


def edgeft(*words: object, accept: Sequence[int] = (0,)) -> Any:
    command = [sys.executable, "-m", "edgeft", *map(str, words), "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode not in accept:
        sys.exit(f"edgeft {' '.join(map(str, words))} failed")
    return json.loads(done.stdout.splitlines()[-1])


def made(model: str, target: str, work: Path) -> Path:
    suffix = ".litertlm" if target.startswith("litert") else ""
    out = work / f"{target.replace(':', '-').replace('=', '-')}{suffix}"
    if not out.exists():
        name, *settings = target.split(":")
        edgeft("export", model, "--to", name, *(f"--set={one}" for one in settings), "--out", out, "--no-verify")
    return out


def measured(model: str, target: str, data: str, work: Path, examples: int | None) -> Row:
    file = made(model, target, work)
    runtime = "litert" if file.suffix == ".litertlm" else "executorch"
    some = () if examples is None else ("--examples", examples)
    # 5: a check failed; that is what is asked here.
    report = edgeft("verify", model, file, "--data", data, "--quick", "--runtime", runtime, *some, accept=(0, 5))
    found = {finding["name"]: finding for finding in report["findings"]}
    (bench,) = edgeft("bench", file, "--runtime", runtime)["results"]
    return Row(
        target,
        sum(part.stat().st_size for part in file.rglob("*")) if file.is_dir() else file.stat().st_size,
        found["kl"]["value"],
        found["kl"]["limit"],
        found["top1"]["value"],
        found["top1"]["limit"],
        report["tokens"],
        bool(report["ok"]),
        float(bench["decode_tps"]["median"]),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--targets", default=",".join(TARGETS), help="settings after colons: litert-q4:block=64")
    parser.add_argument("--examples", type=int, help="of the held-out split; default: all")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    rows = [measured(given.model, one, given.data, given.work, given.examples) for one in given.targets.split(",")]
    if given.json:
        print(json.dumps([asdict(row) for row in rows]))
        return
    print(f"| {rows[0].tokens:,} tokens | " + " | ".join(COLUMNS) + " |\n|---|" + "--:|" * (len(COLUMNS) - 1) + "---|")
    for row in rows:
        print(f"| `{row.target}` | " + " | ".join(row.cells()) + " |")


if __name__ == "__main__":
    main()
