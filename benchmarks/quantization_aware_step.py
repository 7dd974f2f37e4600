"""What a quantization-aware step costs beside a plain LoRA step: one process, one model, the two by turns.

    python benchmarks/quantization_aware_step.py [--json] [--target gguf-q4_0] [--tokens 512] [--pairs 12]

SmolLM2-135M on the demo's commands, rank 16, as `edgeft train` sets it up. The same layers compute both ways, so one
model alternates between them: forward, backward, clipping and AdamW on the same batch, first as LoRA, then rounded, and
the other way around in the next pair. The figure is the median of the pairs' ratios; what else the machine does hits
both alike.
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
    parser.add_argument("--tokens", type=int, default=512, help="tokens per optimizer step")
    parser.add_argument("--pairs", type=int, default=12)
    options = parser.parse_args()
    figures = measure(options.target, options.tokens, options.pairs)
    print(json.dumps(figures) if options.json else "\n".join(f"{key:<24} {value}" for key, value in figures.items()))


def measure(target: str, tokens: int, pairs: int) -> dict[str, Any]:
    from edgeft.models.quiet import quiet_libraries

    with tempfile.TemporaryDirectory() as folder, quiet_libraries():
        trainer, batches = prepare(target, tokens, Path(folder))
        plain, aware, ratios = [], [], []
        for pair in range(-2, pairs):
            batch = batches[pair % len(batches)]
            order = (False, True) if pair % 2 else (True, False)
            seconds = {rounded: step(trainer, batch, rounded) for rounded in order}
            if pair >= 0:  # the first ones compile and allocate
                plain.append(seconds[False])
                aware.append(seconds[True])
                ratios.append(seconds[True] / seconds[False])
        rounding = min(round_all(trainer) for _ in range(3))
    return {
        "ratio": round(statistics.median(ratios), 3),
        "ratio_min": round(min(ratios), 3),
        "ratio_max": round(max(ratios), 3),
        "plain_step_s": round(statistics.median(plain), 3),
        "aware_step_s": round(statistics.median(aware), 3),
        "rounding_s": round(rounding, 3),
        "target": target,
        "tokens_per_step": tokens,
        "pairs": pairs,
        "cores": os.cpu_count(),
    }


def prepare(target: str, tokens: int, folder: Path) -> tuple[Any, list[Any]]:
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
    config = TrainConfig(
        str(base), "-", folder, method="lora", epochs=1, batch_tokens=tokens, micro_tokens=tokens, target=target
    )
    trainer = workflow.trainer_for(config, base, examples)
    trainer.create_optimizer()
    trainer.model.train()
    batches = list(trainer.get_train_dataloader())
    trainer.aware.at_step(0)
    return trainer, batches


def step(trainer: Any, batch: Any, rounded: bool) -> float:
    """Seconds of one optimizer step."""
    import torch

    trainer.aware.ships = rounded
    started = time.perf_counter()
    trainer.aware.moved()
    trainer.compute_loss(trainer.model, batch).backward()
    torch.nn.utils.clip_grad_norm_([p for p in trainer.model.parameters() if p.requires_grad], 1.0)
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    return time.perf_counter() - started


def round_all(trainer: Any) -> float:
    """Seconds that rounding every layer takes."""
    started = time.perf_counter()
    trainer.aware.moved()
    for layer in trainer.aware.layers.values():
        layer.rounded()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
