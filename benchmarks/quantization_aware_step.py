"""What a quantization-aware step costs beside a plain LoRA step: one process, the two by turns.

    python benchmarks/quantization_aware_step.py [--json] [--target gguf-q4_0] [--tune both] [--tokens 512]

SmolLM2-135M on the demo's commands, rank 16, as `edgeft train` sets it up with `--for` and without: two trainers,
forward, backward, clipping and AdamW on the same batch, first the one, then the other, and the other way around in
the next pair. The figure is the median of the pairs' ratios; what else the machine does hits both alike. `cpu_ratio` is
that of CPU seconds, for a machine that is busy: with OMP_NUM_THREADS=1, as threads that wait for others count too.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--target", default="gguf-q4_0")
    parser.add_argument("--tune", default="adapter")
    parser.add_argument("--tokens", type=int, default=512, help="tokens per optimizer step")
    parser.add_argument("--pairs", type=int, default=12)
    options = parser.parse_args()
    figures = measure(options.target, options.tune, options.tokens, options.pairs)
    print(json.dumps(figures) if options.json else "\n".join(f"{key:<24} {value}" for key, value in figures.items()))


def measure(target: str, tune: str, tokens: int, pairs: int) -> dict[str, Any]:
    from edgeft.models.quiet import quiet_libraries

    with tempfile.TemporaryDirectory() as folder, quiet_libraries():
        trainers = {name: trainer_for(name, tune, tokens, Path(folder) / str(name)) for name in (None, target)}
        batches = {name: list(trainer.get_train_dataloader()) for name, trainer in trainers.items()}
        plain, aware, pairs_cpu = [], [], []
        for pair in range(-2, pairs):
            order = (None, target) if pair % 2 else (target, None)
            seconds = {name: step(trainers[name], batches[name][pair % len(batches[name])]) for name in order}
            if pair >= 0:  # the first ones compile and allocate
                plain.append(seconds[None][0])
                aware.append(seconds[target][0])
                pairs_cpu.append(seconds[target][1] / seconds[None][1])
        rounding = min(round_all(trainers[target]) for _ in range(3))
    ratios = [one / other for one, other in zip(aware, plain, strict=True)]
    return {
        "ratio": round(statistics.median(ratios), 3),
        "ratio_min": round(min(ratios), 3),
        "ratio_max": round(max(ratios), 3),
        "cpu_ratio": round(statistics.median(pairs_cpu), 3),
        "plain_step_s": round(statistics.median(plain), 3),
        "aware_step_s": round(statistics.median(aware), 3),
        "rounding_s": round(rounding, 3),
        "target": target,
        "tune": tune,
        "tokens_per_step": tokens,
        "pairs": pairs,
        "cores": os.cpu_count(),
    }


def trainer_for(target: str | None, tune: str, tokens: int, folder: Path) -> Any:
    from edgeft.openmp import TRAINING, short_spins

    with short_spins(TRAINING):
        import torch  # noqa: F401
    from edgeft.data.encode import encode_all
    from edgeft.data.load import load_split
    from edgeft.models import resolve
    from edgeft.models.text import load_text_side
    from edgeft.train import TrainConfig, workflow

    base = resolve("smollm2-135m", want="hf").path
    text = load_text_side(base)
    chosen = load_split("smart-home", "train")[: 8 * tokens // 40]
    examples = encode_all(chosen, text.need_template(), text.tokenize, text.eos_tokens).encoded
    sizes: dict[str, Any] = {"epochs": 1, "batch_tokens": tokens, "micro_tokens": tokens}
    wanted = {"target": target, "tune": tune} if target else {}
    config = TrainConfig(str(base), "-", folder, method="lora", **sizes, **wanted)
    trainer = workflow.trainer_for(config, base, examples)
    trainer.create_optimizer()
    trainer.model.train()
    return trainer


def step(trainer: Any, batch: Any) -> tuple[float, float]:
    """Seconds of one optimizer step, and CPU seconds."""
    import torch

    started, cpu = time.perf_counter(), time.process_time()
    if trainer.aware is not None:
        trainer.aware.moved()
    trainer.compute_loss(trainer.model, batch).backward()
    torch.nn.utils.clip_grad_norm_([p for p in trainer.model.parameters() if p.requires_grad], 1.0)
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    return time.perf_counter() - started, time.process_time() - cpu


def round_all(trainer: Any) -> float:
    """Seconds that rounding every layer takes."""
    started = time.perf_counter()
    trainer.aware.moved()
    for layer in trainer.aware.layers.values():
        layer.rounded()  # the first of them rounds all
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
