"""Training against the usual recipe: speed at the same validation loss, and peak memory at equal tokens per step.

    python benchmarks/train.py [--json] [--rounds 3] [--examples 640]

The rival is what a tutorial does: TRL's SFTTrainer with its defaults (batch 4, padding, gradient checkpointing) on
the same base in NF4 with double quantization, an adapter of the same rank on the same layers, the same learning
rate, the completions only. Both see the same examples of the demo data once, so the useful (unpadded) tokens are the
same. Every measurement is a process of its own; the two take turns, so that other load on the machine hits both. Each
round has a seed of its own (order of the examples, the adapter's first weights).

speed   useful tokens per second, median over the steps after the first three; loss on one validation set afterwards.
        Useful are the tokens of the examples: padding is not, and a prompt that edgeft reads once for all examples of
        a pass counts in each of them, as it does for the rival
memory  one optimizer step of 4 x 512 learned tokens; largest resident set minus that of an idle process that has
        imported the same libraries
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RANK, RATE = 16, 1e-3
LIBRARIES = "import torch, transformers, peft, trl, datasets, bitsandbytes"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--examples", type=int, default=640)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--worker", nargs=2, metavar=("WHO", "WHAT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(WORKERS[options.worker[0]](options.worker[1], options.examples, options.seed)))
        return
    figures = measure(options.rounds, options.examples)
    if options.json:
        print(json.dumps(figures))
    else:
        print("\n".join(f"{name:<32} {value}" for name, value in figures.items()))


def measure(rounds: int, examples: int) -> dict[str, Any]:
    speed = [(worker("edgeft", "speed", examples, k), worker("trl", "speed", examples, k)) for k in range(rounds)]
    memory = [(worker("edgeft", "memory", examples, k), worker("trl", "memory", examples, k)) for k in range(rounds)]
    speed_ratios = [mine["tokens_per_s"] / theirs["tokens_per_s"] for mine, theirs in speed]
    memory_ratios = [mine["peak_bytes"] / theirs["peak_bytes"] for mine, theirs in memory]
    middle = statistics.median
    return {
        "tokens_per_s_ratio": round(middle(speed_ratios), 2),
        "tokens_per_s_ratio_min": round(min(speed_ratios), 2),
        "tokens_per_s_ratio_max": round(max(speed_ratios), 2),
        "tokens_per_s_edgeft": round(middle(mine["tokens_per_s"] for mine, _ in speed)),
        "tokens_per_s_trl": round(middle(theirs["tokens_per_s"] for _, theirs in speed)),
        "validation_loss_edgeft": round(middle(mine["loss"] for mine, _ in speed), 4),
        "validation_loss_trl": round(middle(theirs["loss"] for _, theirs in speed), 4),
        "validation_losses_edgeft": " ".join(f"{mine['loss']:.4f}" for mine, _ in speed),
        "validation_losses_trl": " ".join(f"{theirs['loss']:.4f}" for _, theirs in speed),
        "peak_memory_ratio": round(middle(memory_ratios), 3),
        "peak_memory_ratio_min": round(min(memory_ratios), 3),
        "peak_memory_ratio_max": round(max(memory_ratios), 3),
        "peak_memory_mb_edgeft": round(middle(mine["peak_bytes"] for mine, _ in memory) / 1e6),
        "peak_memory_mb_trl": round(middle(theirs["peak_bytes"] for _, theirs in memory) / 1e6),
        "rounds": rounds,
        "useful_tokens": speed[0][0]["tokens"],
        "cores": os.cpu_count(),
    }


def worker(who: str, what: str, examples: int, seed: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--worker", who, what, "--examples", str(examples), "--seed", str(seed)]
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    figures: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return figures


def start() -> int:
    """Import what both need, and return the idle resident set; the high-water mark counts from here."""
    import psutil

    from edgeft.openmp import TRAINING, short_spins

    with short_spins(TRAINING):  # for both: without it other load on the machine would stall one of them only
        exec(LIBRARIES)
    idle = int(psutil.Process().memory_info().rss)
    Path("/proc/self/clear_refs").write_text("5")
    return idle


def data(what: str, examples: int) -> tuple[Path, list[Any], list[Any]]:
    """The base model's folder, what is trained on and what is scored, encoded alike for both."""
    from edgeft.data.encode import encode_all
    from edgeft.data.example import Encoded
    from edgeft.data.load import load_split
    from edgeft.models import resolve
    from edgeft.models.text import load_text_side

    base = resolve("smollm2-135m", want="hf").path
    if what == "memory":
        generator = random.Random(0)
        rows = [[generator.randrange(1000, 40000) for _ in range(512)] for _ in range(8)]
        return base, [Encoded(row, [True] * 512) for row in rows], []
    text = load_text_side(base)
    splits = []
    for split, count in (("train", examples), ("valid", 100)):
        chosen = load_split("smart-home", split)[:count]
        splits.append(encode_all(chosen, text.need_template(), text.tokenize, text.eos_tokens).encoded)
    return base, splits[0], splits[1]


def edgeft_worker(what: str, examples: int, seed: int) -> dict[str, Any]:
    idle = start()
    from edgeft.models.quiet import quiet_libraries
    from edgeft.train import memory, workflow
    from edgeft.train.batch import shared_prefix
    from edgeft.train.config import TrainConfig
    from edgeft.train.evaluation import evaluate

    base, train, valid = data(what, examples)
    tokens = sum(len(example.tokens) for example in train)
    with tempfile.TemporaryDirectory() as folder, quiet_libraries():
        # Memory: two steps of 4 x 512 tokens. Speed: as many steps as the rival, four examples each; their shared
        # prompt is read once.
        shared = 0 if what == "memory" else shared_prefix(train)
        per_step = 2048 if what == "memory" else shared + 4 * (tokens // len(train) - shared)
        config = TrainConfig(
            str(base), "-", Path(folder), rank=RANK, learning_rate=RATE, epochs=1, scheduler="linear", warmup=0.0,
            batch_tokens=per_step, micro_tokens=0 if what == "memory" else per_step, save_every=10**6, patience=0,
            seed=seed,
        )  # fmt: skip
        trainer = workflow.trainer_for(config, base, train)
        trainer.train()
        peak = memory.peak() - idle
        loss = evaluate(trainer.model, valid, 1024, None).nll if valid else 0.0
        speeds = [line["tokens_per_s"] for line in trainer.session.recorder.run.metrics() if "loss" in line]
    return {"tokens": tokens, "peak_bytes": peak, "loss": loss, "tokens_per_s": statistics.median(speeds[3:] or [0])}


def trl_worker(what: str, examples: int, seed: int) -> dict[str, Any]:
    idle = start()
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    base, train, valid = data(what, examples)
    moments: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            moments.append(time.perf_counter())

        def on_train_end(self, *_: Any, **__: Any) -> None:
            moments.append(time.perf_counter())

    def columns(rows: list[Any]) -> Any:
        labels = [[t if k else -100 for t, k in zip(row.tokens, row.learned, strict=True)] for row in rows]
        return Dataset.from_dict({"input_ids": [row.tokens for row in rows], "labels": labels})

    torch.manual_seed(seed)  # the adapter is made before TRL sets its seed
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            str(base),
            args=SFTConfig(
                folder, per_device_train_batch_size=4, num_train_epochs=1, learning_rate=RATE, use_cpu=True,
                report_to=[], save_strategy="no", disable_tqdm=True, seed=seed,
            ),
            train_dataset=columns(train),
            quantization_config=BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=torch.bfloat16,
            ),
            peft_config=LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM"),
            callbacks=[Clock()],
        )  # fmt: skip
        trainer.train()
    from edgeft.train import memory

    peak = memory.peak() - idle
    tokens = sum(len(row.tokens) for row in train)
    seconds = [end - begin for begin, end in itertools.pairwise(moments)]
    per_step = 4 * tokens / len(train)
    speed = per_step / statistics.median(seconds[3:]) if len(seconds) > 3 else 0.0
    return {"tokens": tokens, "peak_bytes": peak, "loss": plain_loss(trainer.model, valid), "tokens_per_s": speed}


def plain_loss(model: Any, rows: list[Any]) -> float:
    """Nats per learned token through the model's own forward, in training's mixed precision."""
    import torch

    # In training mode, where bitsandbytes keeps its weights as they were trained on; there is no dropout.
    total, count = 0.0, 0
    for row in rows:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=torch.tensor([row.tokens])).logits[0, :-1].float()
        labels = torch.where(torch.tensor(row.learned), torch.tensor(row.tokens), -100)[1:]
        total += float(torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum"))
        count += int((labels != -100).sum())
    return total / max(count, 1)


WORKERS = {"edgeft": edgeft_worker, "trl": trl_worker}

if __name__ == "__main__":
    main()
