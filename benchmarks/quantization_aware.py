"""Quantization-aware adapters against LoRA -> merge -> quantize, and what becomes of an adapter trained on NF4.

    python benchmarks/quantization_aware.py --work FOLDER [--only REGEX] [--seeds 0,1,2] [--json | --docs]

SmolLM2-135M, rank 16, the same data in the same order, the same number of steps for every method. Two tasks: the demo's
commands, and general text (the Python language reference as `pydoc_data.topics` has it, cut at paragraphs; the losses
are of its held-out parts). Every cell (a training, a file with its scores) is kept in FOLDER/cells.json as soon as it
is known, so the benchmark can be stopped and run in pieces; --only names the cells to compute. With all cells that the
report needs, it is printed; --docs puts it into the tables of the documentation (`quantization_aware_tables`).

Losses are nats per learned token, of the file's own values in the arithmetic of training (bfloat16); "as trained" is
the trained graph. KL and the same next token compare the file with the graph it was trained as. Exact match is
llama.cpp's, and the cells "runtime" compare llama.cpp with the trained graph in float32. The cells "more" are losses on
more held-out commands. The recovered share is (NLL of LoRA's Q4_0 file - NLL of the quantization-aware Q4_0 file) /
(NLL of LoRA's Q4_0 file - NLL of LoRA as trained), with a paired bootstrap over held-out examples and seeds.

Rate and rank were chosen on general text, by the cells "valid" of shorter trainings; nothing was on the commands.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import quantization_aware_tables as tables
from quantization_aware_data import MODEL, encoded, prepare_data, text_pieces, write_lines
from quantization_aware_graphs import file_graph, losses, scores, trained_graph, write

__all__ = ["keep", "read_cells", "text_pieces", "write_lines"]
"""What other benchmarks share."""

RANK, RATE, STEP_TOKENS = 16, 3e-3, 512
TASKS = ("text", "demo")
TARGET = "gguf-q4_0"

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora"},
    "qlora": {"method": "qlora"},
    "aware": {"method": "lora", "target": TARGET},
    "lora-r64": {"method": "lora", "rank": 64, "learning_rate": 2e-3},
    "aware-r64": {"method": "lora", "target": TARGET, "rank": 64, "learning_rate": 2e-3},
    "aware50": {"method": "lora", "target": TARGET, "quantize_after": 0.5},
    "scales": {"method": "lora", "target": TARGET, "tune": "scales", "learning_rate": 2e-3},
    "both": {"method": "lora", "target": TARGET, "tune": "both"},
}

SINGLE = ("lora-r64", "aware-r64", "aware50", "scales")
"""Methods that are tried once, on general text."""

CHOICE = ("lora", "lora-r64", "aware", "aware-r64")
"""Methods among which settings are chosen, by the validation examples' loss of the Q4_0 file."""

Cells = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for data, runs, files and cells.json")
    parser.add_argument("--only", default=".", help="regular expression: compute the cells whose names it fits")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no further cell after so long")
    parser.add_argument("--list", action="store_true", help="list the cells and whether they are known")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--docs", action="store_true", help="write the figures beside the results, and their tables")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    prepare_data(options.work)
    seeds = [int(seed) for seed in options.seeds.split(",")]
    tasks = options.tasks.split(",")
    wanted = plan(tasks, seeds)
    known = read_cells(options.work)
    if options.list:
        print("\n".join(f"{'+' if name in known else '-'} {name}" for name in wanted))
        return
    compute_cells(options, wanted)
    figures = tables.report(read_cells(options.work), tasks, seeds)
    if options.docs:
        tables.publish(figures)
    print(json.dumps(figures) if options.json else json.dumps(figures, indent=1))


def compute_cells(options: argparse.Namespace, wanted: Mapping[str, Callable[[Path], Any]]) -> None:
    from edgeft.train import Interrupted

    known, deadline = read_cells(options.work), time.monotonic() + options.seconds
    for name, compute in wanted.items():
        left = deadline - time.monotonic()
        if name not in known and re.search(options.only, name) and left > 30:
            print(name, f"{left:.0f} s left", file=sys.stderr, flush=True)
            if name.startswith("train/"):
                # The run writes a checkpoint and is continued the next time.
                signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
                signal.setitimer(signal.ITIMER_REAL, min(left, 1e6))
            try:
                keep(options.work, name, compute(options.work))
            except Interrupted:
                return
            signal.setitimer(signal.ITIMER_REAL, 0)


# --- Cells ----------------------------------------------------------------------


def plan(tasks: Sequence[str], seeds: Sequence[int]) -> dict[str, Callable[[Path], Any]]:
    """Name of a cell -> how to compute it, trainings first."""
    cells: dict[str, Callable[[Path], Any]] = {}

    def training(task: str, method: str, seed: int) -> None:
        cells[f"train/{task}/{method}/{seed}"] = partial(train_cell, task=task, method=method, seed=seed)

    def file(task: str, method: str, seed: int, how: str) -> None:
        known = {"task": task, "method": method, "seed": seed, "how": how}
        cells[f"file/{task}/{method}/{seed}/{how}"] = partial(file_cell, **known)
        if task == "demo" and seed == seeds[0]:
            cells[f"exact/{task}/{method}/{seed}/{how}"] = partial(exact_cell, **known)

    for seed in seeds:
        for task in tasks:
            for method in ("lora", "both") if task == "demo" else ("lora", "aware", "both"):
                training(task, method, seed)
                file(task, method, seed, "q4_0")
                if task == "demo":
                    cells[f"more/{task}/{method}/{seed}"] = partial(more_cell, task=task, method=method, seed=seed)
    for task in tasks:
        first = seeds[0]
        cells[f"runtime/{task}/{first}"] = partial(runtime_cell, task=task, seed=first)
        for method in ("aware", *(SINGLE if task == "text" else ())):
            training(task, method, first)
            file(task, method, first, "q4_0")
        for method in CHOICE if task == "text" else ():
            cells[f"valid/{task}/{method}/{first}"] = partial(valid_cell, task=task, method=method, seed=first)
        training(task, "qlora", first)
        for how in ("q4_k_m", "q4", "unmerged-q4_0"):
            file(task, "lora", first, how)
        for base in ("w16", "nf4"):
            for target in ("q4_0", "q4_k_m", "q4"):
                file(task, "qlora", first, f"{base}-{target}")
        file(task, "qlora", first, "unmerged-q4_0")
    # What one does not wait for comes last.
    return dict(sorted(cells.items(), key=lambda cell: cell[0].startswith(("exact/", "runtime/"))))


def read_cells(work: Path) -> Cells:
    file = work / "cells.json"
    cells: Cells = json.loads(file.read_text()) if file.is_file() else {}
    return cells


def keep(work: Path, name: str, value: Any) -> None:
    from edgeft.paths import write_json

    write_json(work / "cells.json", {**read_cells(work), name: value})


# --- Training -------------------------------------------------------------------


def train_cell(work: Path, task: str, method: str, seed: int) -> dict[str, Any]:
    from edgeft.train import TrainConfig, checkpoint, read_config, train

    out = work / "runs" / f"{task}-{method}-{seed}"
    settings: dict[str, Any] = {
        "rank": RANK, "learning_rate": RATE, "epochs": 1.0, "batch_tokens": STEP_TOKENS, "micro_tokens": STEP_TOKENS,
        "seed": seed, "save_every": 20, "keep": 1, **METHODS[method],
    }  # fmt: skip
    resume = (out / "config.toml").is_file()
    last = checkpoint.latest(out / "checkpoints") if resume else None
    begun = checkpoint.read_state(last)["step"] if last else 0
    started = time.process_time()
    config = read_config(out) if resume else TrainConfig(MODEL, str(work / task), out, **settings)
    outcome = train(config, resume=resume)
    spent, done = time.process_time() - started, outcome.steps - begun
    found = [line["loss"] for line in outcome.run.metrics() if "loss" in line]
    return {
        "steps": outcome.steps,
        "tokens": outcome.tokens,
        "seconds": round(outcome.seconds, 1),
        "cpu_s": round(spent / done * outcome.steps, 1) if done else None,
        "loss_last_10": round(statistics.mean(found[-10:]), 4),
        "nll_training_graph": outcome.manifest.evaluation["nll_training_graph"],
    }


# --- Files ----------------------------------------------------------------------


def file_cell(work: Path, task: str, method: str, seed: int, how: str) -> dict[str, Any]:
    """Export, and score the file against the graph it was trained as."""
    run = work / "runs" / f"{task}-{method}-{seed}"
    out, size, base = write(work, run, method, how)
    shipped = file_graph(base or out, run.joinpath("adapter") if base else None)
    return {"bytes": size, **scores(trained_graph(run), shipped, encoded(work / task))}


def more_cell(work: Path, task: str, method: str, seed: int) -> dict[str, Any]:
    """Losses of the Q4_0 file on more held-out examples, and as trained where that is another graph."""
    from edgeft.train.batch import learned_count

    run = work / "runs" / f"{task}-{method}-{seed}"
    examples = encoded(work / f"{task}-more")
    found = {"nll": losses(file_graph(write(work, run, method, "q4_0")[0], None), examples)}
    if "target" not in METHODS[method]:
        found["nll_trained"] = losses(trained_graph(run), examples)
    return {**found, "tokens": [learned_count(example) for example in examples]}


def valid_cell(work: Path, task: str, method: str, seed: int) -> dict[str, Any]:
    """Per validation example: the sum of the NLL of the Q4_0 file, and its tokens."""
    from edgeft.train.batch import learned_count

    out, _, _ = write(work, work / "runs" / f"{task}-{method}-{seed}", method, "q4_0")
    examples = encoded(work / f"{task}-validation", "valid")
    return {
        "nll": losses(file_graph(out, None), examples),
        "tokens": [learned_count(example) for example in examples],
    }


def exact_cell(work: Path, task: str, method: str, seed: int, how: str) -> dict[str, Any]:
    """Exact match of the file in llama.cpp."""
    from edgeft.data.load import load_split
    from edgeft.evaluate import predict
    from edgeft.plugins import AdapterScale
    from edgeft.sessions import open_session

    run = work / "runs" / f"{task}-{method}-{seed}"
    out, _, base = write(work, run, method, how)
    with open_session(str(base or out), adapters=(AdapterScale(out),) if base else ()).session as session:
        answers = list(predict(session, load_split(work / task, "test"), whole=False))
    return {"exact": [int(answer.exact) for answer in answers]}


def runtime_cell(work: Path, task: str, seed: int) -> dict[str, Any]:
    """The quantization-aware file in llama.cpp against the trained graph in float32, and equal blocks."""
    from edgeft import export as workflow
    from edgeft.progress import Silent
    from edgeft.sessions import open_session
    from edgeft.verify.check import compare_all
    from edgeft.verify.codes import check_codes
    from edgeft.verify.torch_reference import load_reference

    run = work / "runs" / f"{task}-aware-{seed}"
    out, _, _ = write(work, run, "aware", "q4_0")
    source = workflow.find(str(run), None, Silent()).source
    (codes,) = check_codes(source, out)
    reference = load_reference(source.base, source.adapter, packed=source.packed)
    with open_session(str(out)).session as session:
        total = compare_all(reference, session, encoded(work / task))
    return {
        "codes": codes.detail, "equal": codes.value, "kl": total.kl, "same": total.top1, "tokens": total.tokens,
        "nll_graph_float32": total.nll_reference, "nll_llama_cpp": total.nll_file,
    }  # fmt: skip


if __name__ == "__main__":
    main()
