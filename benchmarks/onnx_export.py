"""Peak memory of an ONNX export against twice the size of the model in 16 bits.

    python benchmarks/onnx_export.py [--json] [--only CASE …] [--log FILE] [--model FOLDER] [--work FOLDER]

The randomly initialised 1.07B Llama of `benchmarks/export.py` (2.1 GB in bfloat16) with its rank-16 adapter on all
linear layers, exported once per case. Every export is a process of its own; its peak memory is the largest resident set
(wait4), torch and the model builder included. Folders are deleted as soon as they are measured.

With `--log` each case is kept as a line of JSON and skipped when it is there already. Needs the `train` and
`onnx-export` extras.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from export import build, run

CASES: Mapping[str, tuple[str, ...]] = {
    "onnx-q4": ("--to", "onnx-q4"),
    "onnx-q4-k_quant": ("--to", "onnx-q4", "--set", "method=k_quant"),
    "onnx-q4-hqq": ("--to", "onnx-q4", "--set", "method=hqq"),
    "onnx-int8": ("--to", "onnx-int8"),
    "onnx-fp32": ("--to", "onnx-fp32"),
}
"""Name -> options of `edgeft export`."""

DEFAULT = ("onnx-q4",)


@dataclass(frozen=True)
class Result:
    case: str
    peak_mb: float
    seconds: float
    file_mb: float


def measure(case: str, model: Path, work: Path) -> Result:
    out = work / "out-onnx"
    command = [sys.executable, "-m", "edgeft", "export", str(model / "base"), "--adapter", str(model / "adapter")]
    try:
        cost = run([*command, *CASES[case], "--out", str(out), "--no-verify"], out)
    finally:
        shutil.rmtree(out, ignore_errors=True)
        out.with_name(out.name + ".json").unlink(missing_ok=True)
    return Result(case, round(cost.peak / 1e6, 1), round(cost.seconds, 1), round(cost.written / 1e6, 1))


def read_log(log: Path | None) -> dict[str, Result]:
    if log is None or not log.is_file():
        return {}
    results = [Result(**json.loads(line)) for line in log.read_text().splitlines()]
    return {result.case: result for result in results}


def figures(results: Sequence[Result], original: int) -> dict[str, Any]:
    """One flat object. The limit is twice `original`, the bytes of the base in 16 bits."""
    largest = max(results, key=lambda result: result.peak_mb)
    limit = 2 * original / 1e6
    found: dict[str, Any] = {
        "peak_memory_mb": largest.peak_mb,
        "peak_memory_case": largest.case,
        "peak_memory_limit_mb": round(limit, 1),
        "peak_memory_ratio": round(largest.peak_mb / limit, 4),
        "model_16_bit_mb": round(original / 1e6, 1),
    }
    for result in results:
        found[f"peak_memory_mb_{result.case}"] = result.peak_mb
        found[f"wall_seconds_{result.case}"] = result.seconds
        found[f"file_mb_{result.case}"] = result.file_mb
    return {**found, "cases": len(results), "cores": len(os.sched_getaffinity(0))}


def table(results: Sequence[Result], original: int) -> str:
    """A Markdown table, the largest peak first."""
    rows = [
        f"| {result.case} | {result.peak_mb:,.0f} | {result.peak_mb * 1e6 / (2 * original):.2f} "
        f"| {result.file_mb:,.1f} | {result.seconds:.1f} |"
        for result in sorted(results, key=lambda result: -result.peak_mb)
    ]
    machine = f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores, Python {platform.python_version()}"
    head = ["| case | peak memory, MB | of the limit | file, MB | wall, s |", "|---|--:|--:|--:|--:|"]
    return "\n".join([machine, "", *head, *rows, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one flat object")
    parser.add_argument("--only", action="append", choices=list(CASES), help=f"default: {' '.join(DEFAULT)}")
    parser.add_argument("--log", type=Path, help="keep the figures of each case in this file, and skip what it has")
    parser.add_argument("--model", type=Path, help="folder with base and adapter; default: built in the work folder")
    parser.add_argument("--work", type=Path, help="folder for the files (7 GB); default: a new one")
    arguments = parser.parse_args()
    known = read_log(arguments.log)
    wanted = arguments.only or list(DEFAULT)
    with tempfile.TemporaryDirectory(dir=arguments.work) as name:
        work = Path(name)
        model = arguments.model or work
        build(model)
        for case in wanted:
            if case not in known:
                known[case] = measure(case, model, work)
                print(asdict(known[case]), file=sys.stderr)
                if arguments.log:
                    with arguments.log.open("a") as log:
                        log.write(json.dumps(asdict(known[case])) + "\n")
        original = sum(file.stat().st_size for file in (model / "base").glob("*.safetensors"))
    results = [known[case] for case in wanted]
    print(json.dumps(figures(results, original)) if arguments.json else table(results, original))


if __name__ == "__main__":
    main()
