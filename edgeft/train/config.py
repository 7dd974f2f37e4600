"""TrainConfig: everything that decides what a training run computes; stored in the run as config.toml."""

from __future__ import annotations

import dataclasses
import json
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from edgeft.errors import ConfigError, UsageError
from edgeft.paths import write_text

Method = Literal["qlora", "lora", "full", "gguf"]
"""gguf: an adapter over the very file that will ship, its quantized weights as they are."""

Scheduler = Literal["cosine", "linear", "constant"]

Tune = Literal["adapter", "scales", "both"]
"""What a run for a target trains: an adapter that is merged and rounded, the scales of the rounded base's blocks, or an
adapter and the scales of what it is rounded to."""

# All weights of a small model can move little before it forgets; a fresh adapter has to move far. Scales are trained as
# factors: half a percent per step.
LEARNING_RATES: dict[str, float] = {"qlora": 1e-3, "lora": 1e-3, "full": 2e-5, "gguf": 1e-3, "scales": 5e-3}

# Latent weights must move far to change a ternary code, and random ones have everything to learn.
_TERNARY_RATE, _SCRATCH_RATE = 5e-4, 2e-3


@dataclass(frozen=True)
class TrainConfig:
    """What to train, on what, and how. Zero (or None) means: chosen when training starts, with a reason."""

    model: str
    data: str
    out: Path
    method: Method = "qlora"
    rank: int = 16
    alpha: float | None = None
    """Scale numerator; None: 2 x rank."""
    dropout: float = 0.0
    target_modules: tuple[str, ...] = ("all-linear",)
    rslora: bool = False
    dora: bool = False
    epochs: float = 3.0
    learning_rate: float = 0.0
    scheduler: Scheduler = "cosine"
    warmup: float = 0.05
    """Share of all steps."""
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    batch_tokens: int = 0
    """Tokens per optimizer step."""
    micro_tokens: int = 0
    """Tokens per forward and backward pass; a step accumulates gradients over several."""
    max_length: int = 0
    """Longest example in tokens; 0: the model's context."""
    gradient_checkpointing: bool | None = None
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    eval_every: int = 0
    """Steps between validations."""
    patience: int = 3
    """Validations without improvement before training stops; 0: never."""
    save_every: int = 0
    """Steps between checkpoints."""
    keep: int = 2
    """Checkpoints kept, besides the best weights."""
    seed: int = 0
    samples: int = 0
    """Held-out prompts that are answered at each validation; see edgeft.train.samples."""
    target: str | None = None
    """The export target whose rounding the forward pass computes with; see edgeft.train.grids."""
    quantize_after: float = 0.0
    """Share of the steps before it does."""
    tune: Tune = "adapter"
    teacher: float = 0.0
    """Share of the loss that is the divergence from the unrounded model; in ternary training from the base."""
    from_scratch: str = ""
    """Random weights: "base" in the shape of the base, or a JSON file with a shape; see edgeft.train.scratch."""
    ramp: float | None = None
    """Ternary: share of the steps in which rounding grows from none to whole."""
    ternary_scale: Literal["row", "tensor", "block"] = "row"
    """Ternary: which weights have one mean magnitude."""
    activations: int = 16
    """Ternary: bits of the layers' inputs in training."""

    def __post_init__(self) -> None:
        for name, smallest in (
            ("rank", 1),
            ("patience", 0),
            ("keep", 1),
            ("samples", 0),
            ("eval_every", 0),
            ("save_every", 0),
        ):
            if getattr(self, name) < smallest:
                raise UsageError(f"{name.replace('_', '-')} must be at least {smallest}, not {getattr(self, name)}")
        if self.epochs <= 0:
            raise UsageError(f"epochs must be above 0, not {self.epochs}")
        if not 0 <= self.dropout < 1:
            raise UsageError(f"dropout must be from 0 to below 1, not {self.dropout}")
        if self.method not in get_args(Method):
            raise UsageError(f"no method {self.method!r}", f"There are: {', '.join(get_args(Method))}.")
        if self.method == "full" and (self.dora or self.rslora):
            raise UsageError("full fine-tuning has no adapter: --dora and --rslora do not apply")
        if self.method == "gguf" and self.dora:
            raise UsageError(
                "an adapter file for llama.cpp cannot hold DoRA's magnitudes", "Leave out --dora, or --method qlora."
            )

        self._check_target()
        from edgeft.train.ternary_settings import check_ternary

        check_ternary(self)

    def _check_target(self) -> None:
        if self.tune not in get_args(Tune):
            raise UsageError(f"nothing to tune is called {self.tune!r}", f"There are: {', '.join(get_args(Tune))}.")
        if self.target is None:
            if self.tune != "adapter":
                raise UsageError(f"--tune {self.tune} needs the file whose scales are meant", "Add --for gguf-q4_0.")
            if self.teacher or self.quantize_after:
                raise UsageError("nothing is rounded in training without a target", "Add --for gguf-q4_0.")
            return
        from edgeft.train.grids import check_target

        check_target(self)

    @property
    def effective_alpha(self) -> float:
        return 2.0 * self.rank if self.alpha is None else self.alpha

    @property
    def effective_learning_rate(self) -> float:
        if self.learning_rate:
            return self.learning_rate
        if self.from_scratch:
            return _SCRATCH_RATE
        if self.method == "full" and self.target:
            return _TERNARY_RATE
        return LEARNING_RATES["scales" if self.tune == "scales" else self.method]


def write_config(file: Path, config: TrainConfig) -> None:
    lines = []
    for name, value in dataclasses.asdict(config).items():
        if value is not None and name != "out":
            # Strings, numbers, booleans and lists of strings are written alike in JSON and TOML.
            lines.append(f"{name} = {json.dumps(value, ensure_ascii=False)}")
    write_text(file, "\n".join(lines) + "\n")


def read_config(run: Path) -> TrainConfig:
    """The configuration of an existing run.

    Raises:
        ConfigError: there is none, or it cannot be read.
    """
    file = run / "config.toml"
    if not file.is_file():
        raise ConfigError(f"{run} is not a training run: it has no config.toml", "Give the folder --out named.")
    try:
        raw: dict[str, Any] = tomllib.loads(file.read_text(encoding="utf-8"))
        raw["target_modules"] = tuple(raw["target_modules"])
        return TrainConfig(**raw, out=run)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{file} cannot be read: {error}") from error
