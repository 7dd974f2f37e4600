"""Quantization-aware adapters against LoRA -> merge -> quantize, and what becomes of an adapter trained on NF4.

    python benchmarks/quantization_aware.py --work FOLDER [--only REGEX] [--seeds 0,1,2] [--json]

SmolLM2-135M, rank 16, the same data in the same order, the same number of steps for every method. Two tasks: the demo's
commands, and general text (the Python language reference as `pydoc_data.topics` has it, cut at paragraphs; the losses
are of its held-out parts). Every cell (a training, a file with its scores) is kept in FOLDER/cells.json as soon as it
is known, so the benchmark can be stopped and run in pieces; --only names the cells to compute. With all cells that the
report needs, it is printed.

Losses are nats per learned token, of the file's own values in the arithmetic of training (bfloat16); "as trained" is
the trained graph. KL and the same next token compare the file with the graph it was trained as. Exact match is
llama.cpp's, and the cells "runtime" compare llama.cpp with the trained graph in float32. The recovered share is
(NLL of LoRA's Q4_0 file - NLL of the quantization-aware Q4_0 file) / (NLL of LoRA's Q4_0 file - NLL of LoRA as
trained), with a paired bootstrap over held-out examples and seeds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import re
import signal
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

MODEL, RANK, RATE, STEP_TOKENS = "smollm2-135m", 16, 3e-3, 512
TASKS = ("text", "demo")
TRAIN = {"text": 300, "demo": 920}
"""Examples: about 160 and 80 steps."""
TEST = {"text": 57, "demo": 200}
VALIDATION = {"text": 24, "demo": 40}
"""Examples that settings are chosen on: neither trained on nor tested on."""
PIECE = 800
"""Characters of a piece of general text, about 200 tokens."""
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
    figures = report(read_cells(options.work), tasks, seeds)
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
        cells[f"train/{task}/{method}/{seed}"] = lambda work: train_cell(work, task, method, seed)

    def file(task: str, method: str, seed: int, how: str) -> None:
        cells[f"file/{task}/{method}/{seed}/{how}"] = lambda work: file_cell(work, task, method, seed, how)
        if task == "demo" and seed == seeds[0]:
            cells[f"exact/{task}/{method}/{seed}/{how}"] = lambda work: exact_cell(work, task, method, seed, how)

    for seed in seeds:
        for task in tasks:
            for method in ("lora", "aware", "both"):
                training(task, method, seed)
                file(task, method, seed, "q4_0")
    for task in tasks:
        first = seeds[0]
        cells[f"runtime/{task}/{first}"] = partial(runtime_cell, task=task, seed=first)
        for method in ("lora-r64", "aware-r64", "aware50", "scales"):
            training(task, method, first)
            file(task, method, first, "q4_0")
        for method in CHOICE:
            cells[f"valid/{task}/{method}/{first}"] = partial(valid_cell, task=task, method=method, seed=first)
        training(task, "qlora", first)
        for how in ("q4_k_m", "q4", "unmerged-q4_0"):
            file(task, "lora", first, how)
        for base in ("w16", "nf4"):
            for target in ("q4_0", "q4_k_m", "q4"):
                file(task, "qlora", first, f"{base}-{target}")
    # What one does not wait for comes last.
    return dict(sorted(cells.items(), key=lambda cell: cell[0].startswith(("exact/", "runtime/"))))


def read_cells(work: Path) -> Cells:
    file = work / "cells.json"
    cells: Cells = json.loads(file.read_text()) if file.is_file() else {}
    return cells


def keep(work: Path, name: str, value: Any) -> None:
    from edgeft.paths import write_json

    write_json(work / "cells.json", {**read_cells(work), name: value})


# --- Data -----------------------------------------------------------------------


def prepare_data(work: Path) -> None:
    """Validation lies beside the folders of the tasks: training would stop early by it, or keep other weights."""
    if (work / "demo" / "test.jsonl").is_file():
        return
    from edgeft.data.load import resolve_dataset

    pieces = iter(text_pieces())
    for folder, split, counts in (
        ("text-validation", "valid", VALIDATION), ("text", "train", TRAIN), ("text", "test", TEST)
    ):  # fmt: skip
        lines = [json.dumps({"text": piece}) for piece in itertools.islice(pieces, counts["text"])]
        write_lines(work / folder, split, lines)
    demo = Path(resolve_dataset("smart-home"))
    for folder, split, counts in (
        ("demo-validation", "valid", VALIDATION), ("demo", "train", TRAIN), ("demo", "test", TEST)
    ):  # fmt: skip
        write_lines(work / folder, split, (demo / f"{split}.jsonl").read_text().splitlines()[: counts["demo"]])


def text_pieces() -> list[str]:
    """The Python language reference in pieces, shuffled."""
    from pydoc_data.topics import topics

    pieces = []
    for name in sorted(topics):
        piece = ""
        for paragraph in topics[name].split("\n\n"):
            piece += paragraph + "\n\n"
            if len(piece) >= PIECE:
                pieces.append(piece[: 2 * PIECE].strip())
                piece = ""
    # Topics share paragraphs: without this, two of the held-out pieces were trained on.
    pieces = list(dict.fromkeys(pieces))
    random.Random(0).shuffle(pieces)
    return pieces


def write_lines(folder: Path, split: str, lines: Sequence[str]) -> None:
    folder.mkdir(exist_ok=True)
    (folder / f"{split}.jsonl").write_text("".join(line + "\n" for line in lines))


def encoded(folder: Path, split: str = "test") -> list[Any]:
    from edgeft.data.encode import encode_all
    from edgeft.data.load import load_split
    from edgeft.models import resolve
    from edgeft.models.text import load_text_side

    text = load_text_side(resolve(MODEL, want="hf").path)
    return encode_all(load_split(folder, split), text.need_template(), text.tokenize, text.eos_tokens).encoded


# --- Training -------------------------------------------------------------------


def train_cell(work: Path, task: str, method: str, seed: int) -> dict[str, Any]:
    from edgeft.train import TrainConfig, read_config, train

    out = work / "runs" / f"{task}-{method}-{seed}"
    settings: dict[str, Any] = {
        "rank": RANK, "learning_rate": RATE, "epochs": 1.0, "batch_tokens": STEP_TOKENS, "micro_tokens": STEP_TOKENS,
        "seed": seed, "save_every": 20, "keep": 1, **METHODS[method],
    }  # fmt: skip
    resume = (out / "config.toml").is_file()
    started = time.perf_counter()
    config = read_config(out) if resume else TrainConfig(MODEL, str(work / task), out, **settings)
    outcome = train(config, resume=resume)
    losses = [line["loss"] for line in outcome.run.metrics() if "loss" in line]
    return {
        "steps": outcome.steps,
        "tokens": outcome.tokens,
        "seconds": round(outcome.seconds, 1),
        "wall_s": round(time.perf_counter() - started, 1),
        "loss_last_10": round(statistics.mean(losses[-10:]), 4),
        "nll_training_graph": outcome.manifest.evaluation["nll_training_graph"],
    }


# --- Files ----------------------------------------------------------------------


def file_cell(work: Path, task: str, method: str, seed: int, how: str) -> dict[str, Any]:
    """Export, and score the file against the graph it was trained as."""
    run = work / "runs" / f"{task}-{method}-{seed}"
    out, size, base = write(work, run, method, how)
    trained = trained_graph(run, method)
    shipped = file_graph(base or out, run.joinpath("adapter") if base else None)
    return {"bytes": size, **scores(trained, shipped, encoded(work / task))}


def valid_cell(work: Path, task: str, method: str, seed: int) -> dict[str, Any]:
    """Per validation example: the sum of the NLL of the Q4_0 file, and its tokens."""
    out, _, _ = write(work, work / "runs" / f"{task}-{method}-{seed}", method, "q4_0")
    graph = file_graph(out, None)
    found = [log_probs(graph, example) for example in encoded(work / f"{task}-validation", "valid")]
    return {
        "nll": [-float(after.gather(1, targets).sum()) for after, targets in found],
        "tokens": [len(targets) for _, targets in found],
    }


def exact_cell(work: Path, task: str, method: str, seed: int, how: str) -> dict[str, Any]:
    """Exact match of the file in llama.cpp, and its distance from the trained graph in float32."""
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


def write(work: Path, run: Path, method: str, how: str) -> tuple[Path, int, Path | None]:
    """The file of a run, its bytes, and the base that it lies beside, if it is an adapter."""
    out, base, merge = work / "files" / f"{run.name}-{how}.gguf", None, None
    out.parent.mkdir(exist_ok=True)
    if how.startswith("unmerged-"):
        target = how.removeprefix("unmerged-")
        base = work / "files" / f"base-{target}.gguf"
        export(MODEL, f"gguf-{target}", base)
        export(str(run), "gguf-lora", out)
        return out, out.stat().st_size + base.stat().st_size, base
    if method == "qlora":
        merge, how = how.split("-", 1)
    export(str(run), f"gguf-{how}", out, merge)
    return out, out.stat().st_size, None


def export(model: str, target: str, out: Path, merge: str | None = None) -> None:
    from edgeft import export as workflow
    from edgeft.progress import Silent

    if not out.is_file():
        bases: dict[str | None, Any] = {None: None, "w16": "w16", "nf4": "nf4-roundtrip"}
        workflow.export(workflow.prepare(model, target, out=out, merge_base=bases[merge]), Silent())


def trained_graph(run: Path, method: str) -> Any:
    """What training computed with, in its own arithmetic."""
    import torch

    from edgeft.models import resolve
    from edgeft.models.packed import fill, read_packed
    from edgeft.train import read_config
    from edgeft.train.hardware import detect
    from edgeft.train.loading import load_base

    base, hardware, config = resolve(MODEL, want="hf").path, detect(), read_config(run)
    model = load_base(base, config, hardware)
    if (run / "packed").is_dir():
        with torch.no_grad():
            fill(model, read_packed(run / "packed"))
        return fused(model)
    return fused(model, run / "adapter")


def file_graph(file: Path, adapter: Path | None) -> Any:
    """The file's own values in the same arithmetic."""
    import torch

    from edgeft.models import resolve
    from edgeft.models.gguf_torch import load_packed
    from edgeft.train import attention

    attention.register()
    folder = resolve(MODEL, want="hf").path
    return fused(load_packed(file, folder, torch.bfloat16, attention=attention.NAME), adapter)


def fused(model: Any, adapter: Path | None = None) -> Any:
    from edgeft.train import fused as layers

    if adapter is not None:
        import peft

        model = peft.PeftModel.from_pretrained(model, str(adapter))
    layers.install(model)
    return model.eval()


def scores(trained: Any, shipped: Any, examples: Sequence[Any]) -> dict[str, Any]:
    """Per example: sums of NLL as trained and by the file, of KL, tokens with the same next one, tokens."""
    rows: dict[str, list[float]] = {"nll_trained": [], "nll": [], "kl": [], "same": [], "tokens": []}
    for example in examples:
        (before, targets), (after, _) = log_probs(trained, example), log_probs(shipped, example)
        rows["nll_trained"].append(-float(before.gather(1, targets).sum()))
        rows["nll"].append(-float(after.gather(1, targets).sum()))
        rows["kl"].append(float((before.exp() * (before - after)).sum()))
        rows["same"].append(int((before.argmax(1) == after.argmax(1)).sum()))
        rows["tokens"].append(len(targets))
    return rows


def log_probs(model: Any, example: Any) -> tuple[Any, Any]:
    """Of the learned tokens: (tokens, vocabulary), and those tokens (tokens, 1)."""
    import torch

    from edgeft.train.batch import collate

    batch = collate([example])
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    with torch.no_grad():
        hidden = inner.base_model(
            input_ids=batch["input_ids"],
            position_ids=batch["position_ids"],
            documents=batch["documents"],
            use_cache=False,
        ).last_hidden_state[0][batch["rows"]]
        logits = (hidden @ inner.get_output_embeddings().weight.to(hidden.dtype).t()).float()
    return torch.log_softmax(logits, 1), batch["targets"][:, None]


# --- Report ---------------------------------------------------------------------


def report(cells: Cells, tasks: Sequence[str], seeds: Sequence[int]) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for task in tasks:
        found = [
            (cells[f"file/{task}/lora/{seed}/q4_0"], cells[f"file/{task}/aware/{seed}/q4_0"])
            for seed in seeds
            if f"file/{task}/lora/{seed}/q4_0" in cells and f"file/{task}/aware/{seed}/q4_0" in cells
        ]
        if found:
            figures[f"{task}_recovered"] = {"seeds": len(found), **recovered(found)}
        figures[f"{task}_validation"] = {
            name: round(sum(cell["nll"]) / sum(cell["tokens"]), 5)
            for name, cell in cells.items()
            if name.startswith(f"valid/{task}/")
        }
        figures[f"{task}_runtime"] = {name: cells[name] for name in cells if name.startswith(f"runtime/{task}/")}
        figures[task] = {
            name.removeprefix(f"file/{task}/"): line(cells, name) for name in cells if name.startswith(f"file/{task}/")
        }
    return figures


def line(cells: Cells, name: str) -> dict[str, Any]:
    cell = cells[name]
    tokens = sum(cell["tokens"])
    method, seed = name.split("/")[2:4]
    known = {key: round(sum(cell[key]) / tokens, 5) for key in ("nll_trained", "nll", "kl", "same")}
    answered = cells.get(name.replace("file/", "exact/"))
    if answered:
        known["exact_match"] = round(sum(answered["exact"]) / len(answered["exact"]), 4)
    trained = cells.get(f"train/{name.split('/')[1]}/{method}/{seed}", {})
    return {**known, "bytes": cell["bytes"], "train_s": trained.get("seconds"), "tokens": tokens}


def recovered(pairs: Sequence[tuple[Any, Any]], rounds: int = 10_000) -> dict[str, Any]:
    """The share with a 95 % interval: seeds and held-out examples drawn with replacement, the same for all three."""
    import numpy as np

    trained, plain, aware = (
        np.array([pair[0]["nll_trained"] for pair in pairs]),
        np.array([pair[0]["nll"] for pair in pairs]),
        np.array([pair[1]["nll"] for pair in pairs]),
    )
    generator = np.random.default_rng(0)
    seeds, examples = trained.shape

    def share(rows: Any, columns: Any) -> float:
        added = plain[np.ix_(rows, columns)].sum() - trained[np.ix_(rows, columns)].sum()
        return float((plain[np.ix_(rows, columns)].sum() - aware[np.ix_(rows, columns)].sum()) / added)

    drawn = [
        share(generator.integers(0, seeds, seeds), generator.integers(0, examples, examples)) for _ in range(rounds)
    ]
    low, high = np.percentile(drawn, [2.5, 97.5])
    per_seed = [round(share([seed], range(examples)), 4) for seed in range(seeds)]
    whole = share(range(seeds), range(examples))
    return {"share": round(whole, 4), "low": round(low, 4), "high": round(high, 4), "by_seed": per_seed}


if __name__ == "__main__":
    main()
