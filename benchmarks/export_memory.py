"""Peak memory of an export, for every GGUF target and for ONNX.

    python benchmarks/export_memory.py [--json] [--only CASE …] [--log FILE] [--work FOLDER]

The randomly initialised 1.07B Llama of `benchmarks/export.py` (2.1 GB in bfloat16) with its rank-16 adapter on all
linear layers, exported once per target: every mixture, with an importance matrix (random, of the right shapes) where it
is used, sizes chosen by `--bpw`, ternary types by force, one type for all tensors by `--type-override`, the adapter
alone, and ONNX folders, whose limit is twice the model in 16 bits: their graph is made by torch and transformers. Every
export is a process of its own; its peak memory is the largest resident set (wait4). Files are deleted as soon as they
are measured.

With `--log` each case is kept as a line of JSON and skipped when it is there already.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from export import build, run

LIMIT_MB = 600

MATRIX = """
import sys
from pathlib import Path
import numpy as np
from edgeft import plugins
from edgeft.converters import importance
from edgeft.plugins import ConvertOptions, Source
base, out = Path(sys.argv[1]), Path(sys.argv[2])
plan = plugins.load("converters", "gguf").plan(Source(base), "gguf-bf16", ConvertOptions(out))
random = np.random.default_rng(0)
positive = lambda *shape: random.random(shape, np.float32) + np.float32(0.01)
shapes = {tensor.name: tensor.shape for tensor in plan.tensors if len(tensor.shape) == 2}
vocabulary, width = shapes.pop("token_embd.weight")
shapes["output.weight"] = vocabulary, width
tokens = np.array([100], np.float32)
uses = {name: importance.Use(100 * positive(1, columns), tokens, 1e-6 * positive(rows))
        for name, (rows, columns) in shapes.items()}
rows = positive(vocabulary)
importance.write_importance(out, uses, ["random"], 1, 100, (rows / rows.sum(), 1e-6 * positive(width)))
"""
TARGETS = """
from edgeft import plugins
print(*plugins.load("converters", "gguf").targets)
"""


ONNX = ("onnx-q4", "onnx-int8", "onnx-fp32")


@dataclass(frozen=True)
class Case:
    name: str
    options: tuple[str, ...]
    """Of `edgeft export`; IMATRIX stands for the file."""


@dataclass(frozen=True)
class Result:
    case: str
    peak_mb: float
    seconds: float
    file_mb: float


def cases(work: Path) -> list[Case]:
    """Every target by its name, then what takes other paths through the exporter."""
    found = []
    for target in _said(TARGETS, work).split():
        if target == "gguf":
            continue
        options: tuple[str, ...] = ("--to", target)
        if "-iq" in target or target == "gguf-q2_k_s":
            options += ("--imatrix", "IMATRIX")
        if "-tq" in target:
            options += ("--force",)
        found.append(Case(target, options))
    found.append(Case("gguf-bpw", ("--to", "gguf", "--bpw", "4.5", "--imatrix", "IMATRIX")))
    found.append(Case("gguf-fit", ("--to", "gguf", "--fit", "700MB", "--imatrix", "IMATRIX")))
    found.append(Case("gguf-q4_k_m-imatrix", ("--to", "gguf-q4_k_m", "--imatrix", "IMATRIX")))
    found.append(Case("gguf-q2_k-imatrix", ("--to", "gguf-q2_k", "--imatrix", "IMATRIX")))
    found.append(Case("mxfp4-everywhere", ("--to", "gguf-q8_0", "--type-override", ".*=mxfp4")))
    found.append(Case("gguf-q8_0-round-bf16", ("--to", "gguf-q8_0", "--round", "bf16")))
    return found + [Case(target, ("--to", target)) for target in ONNX]


def _said(code: str, work: Path) -> str:
    """What a program prints; in a process of its own, for a parent's memory counts as its children's."""
    out = work / "said.txt"
    run([sys.executable, "-c", f"import sys\nsys.stdout = open(sys.argv[1], 'w')\n{code}", str(out)], out)
    text = out.read_text()
    out.unlink()
    return text


def measure(case: Case, model: Path, work: Path) -> Result:
    out = work / "out.gguf"
    matrix = work / "imatrix.gguf"
    if "IMATRIX" in case.options and not matrix.is_file():
        run([sys.executable, "-c", MATRIX, str(model / "base"), str(matrix)], matrix)
    options = [str(matrix) if option == "IMATRIX" else option for option in case.options]
    command = [sys.executable, "-m", "edgeft", "export", str(model / "base"), "--adapter", str(model / "adapter")]
    try:
        cost = run([*command, *options, "--out", str(out), "--no-verify"], out)
    finally:
        shutil.rmtree(out, ignore_errors=True)
        for file in (out, out.with_name(out.name + ".json")):
            file.unlink(missing_ok=True)
    return Result(case.name, round(cost.peak / 1e6, 1), round(cost.seconds, 1), round(cost.written / 1e6, 1))


def read_log(log: Path | None) -> dict[str, Result]:
    if log is None or not log.is_file():
        return {}
    results = [Result(**json.loads(line)) for line in log.read_text().splitlines()]
    return {result.case: result for result in results}


def figures(results: Sequence[Result]) -> dict[str, Any]:
    """One flat object: the largest peak, and every case's."""
    shares = {result.case: result.peak_mb / limit(result.case) for result in results}
    largest = max(results, key=lambda result: shares[result.case])
    return {
        "peak_memory_mb": largest.peak_mb,
        "peak_memory_case": largest.case,
        "peak_memory_limit_mb": limit(largest.case),
        "peak_memory_ratio": round(shares[largest.case], 4),
        "cases": len(results),
        **{f"peak_memory_mb_{result.case}": result.peak_mb for result in results},
        "cores": len(os.sched_getaffinity(0)),
    }


def limit(case: str) -> int:
    """MB: for a GGUF target the one limit; for ONNX twice the 1.07B weights of two bytes each."""
    return 4300 if case in ONNX else LIMIT_MB


def table(results: Sequence[Result]) -> str:
    """A Markdown table, the largest first."""
    rows = [
        f"| {result.case} | {result.peak_mb:,.0f} | {result.file_mb:,.1f} | {result.seconds:.1f} |"
        for result in sorted(results, key=lambda result: -result.peak_mb)
    ]
    machine = f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores, Python {platform.python_version()}"
    head = ["| case | peak memory, MB | file, MB | wall, s |", "|---|--:|--:|--:|"]
    return "\n".join([machine, "", *head, *rows, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one flat object")
    parser.add_argument("--only", action="append", metavar="CASE", help="only these; may be repeated")
    parser.add_argument("--log", type=Path, help="keep the figures of each case in this file, and skip what it has")
    parser.add_argument("--model", type=Path, help="folder with base and adapter; default: built in the work folder")
    parser.add_argument("--work", type=Path, help="folder for the files (7 GB); default: a new one")
    arguments = parser.parse_args()
    known = read_log(arguments.log)
    with tempfile.TemporaryDirectory(dir=arguments.work) as name:
        work = Path(name)
        model = arguments.model or work
        build(model)
        wanted = [case for case in cases(work) if not arguments.only or case.name in arguments.only]
        for case in wanted:
            if case.name not in known:
                known[case.name] = measure(case, model, work)
                print(asdict(known[case.name]), file=sys.stderr)
                if arguments.log:
                    with arguments.log.open("a") as log:
                        log.write(json.dumps(asdict(known[case.name])) + "\n")
    results = [known[case.name] for case in wanted]
    print(json.dumps(figures(results)) if arguments.json else table(results))


if __name__ == "__main__":
    main()
