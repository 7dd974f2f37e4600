"""What a training run will take, and every automatic choice with its reason; made before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeft.data.example import Encoded
from edgeft.errors import ModelError, UsageError
from edgeft.paths import parse_json
from edgeft.train.batch import learned_count, shared_prefix
from edgeft.train.config import TrainConfig
from edgeft.train.cross_entropy import CHUNK_BYTES
from edgeft.train.hardware import Hardware, matmul_rate
from edgeft.train.packing import Schedule, schedule
from edgeft.train.ternary_settings import effective_ramp, is_ternary

# torch, transformers, peft, trl and bitsandbytes, imported and idle (measured: 0.51 GB).
LIBRARIES_BYTES = 550_000_000
# Share of the matrix-product rate that a whole step reaches (measured with SmolLM2-135M: 0.1 to 0.13 where AMX makes
# the products fast and the rest of a step long, up to 0.3 without).
_EFFICIENCY = 0.12
# Weights summed with their adapter and rounded per second (measured: SmolLM2-135M's layers in 0.37 s on 2 cores).
_ROUNDED_PER_S = 3e8
# Memory per token and layer, in units of the dtype: of hidden width, and of the MLP's. Autograd keeps about half of
# that (counted); the rest is what malloc and oneDNN hold back (measured: SmolLM2-135M peaks at 2.5 GB).
_KEPT_HIDDEN, _KEPT_MLP = 20, 10
# The same without fused layers (DoRA, full fine-tuning), where float32 copies are kept too.
_UNFUSED = 2.5


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder, from its config.json."""

    layers: int
    hidden: int
    mlp: int
    vocabulary: int
    context: int
    body: int
    """Weights of all linear layers between embedding and head."""
    tied: bool
    packed: int | None = None
    """Bytes of those as a GGUF has them, for the method "gguf"."""

    @property
    def parameters(self) -> int:
        return self.body + self.vocabulary * self.hidden * (1 if self.tied else 2)


@dataclass(frozen=True)
class TrainPlan:
    device: str
    dtype: str
    autocast: bool
    micro_tokens: int
    per_step: int
    steps: int
    gradient_checkpointing: bool
    eval_every: int
    save_every: int
    examples: int
    tokens_per_epoch: int
    learned_per_epoch: int
    memory_bytes: int
    """Estimated peak, libraries included."""
    available_bytes: int
    seconds: float
    """Estimated, validations included."""
    reasons: dict[str, str]
    """Choice -> why."""


def read_shape(model: Path) -> Shape:
    """Raises: ModelError when config.json is missing or does not describe a decoder."""
    file = model / "config.json"
    try:
        raw: dict[str, Any] = parse_json(file.read_text(encoding="utf-8"))
        raw = raw.get("text_config", raw)
        hidden, layers, mlp = (_size(raw, name) for name in ("hidden_size", "num_hidden_layers", "intermediate_size"))
        heads, vocabulary = _size(raw, "num_attention_heads"), _size(raw, "vocab_size")
        width = _size(raw, "head_dim", hidden // heads)
        attention = hidden * width * (2 * heads + 2 * _size(raw, "num_key_value_heads", heads))
        body = layers * (attention + 3 * hidden * mlp)
        context, tied = _size(raw, "max_position_embeddings", 2048), bool(raw.get("tie_word_embeddings", True))
        return Shape(layers, hidden, mlp, vocabulary, context, body, tied)
    except OSError as error:
        raise ModelError(f"{model} holds no model: {error.strerror}: config.json") from error
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError) as error:
        raise ModelError(f"{file} does not describe a language model: {error!r}") from error


def _size(raw: dict[str, Any], name: str, default: int | None = None) -> int:
    value = raw.get(name) or default
    if not isinstance(value, int) or not 0 < value < 1 << 31:
        raise ValueError(f"{name} is {value!r:.40}")
    return value


def make_plan(
    config: TrainConfig, shape: Shape, hardware: Hardware, train: Sequence[Encoded], valid: Sequence[Encoded]
) -> tuple[TrainPlan, Schedule]:
    """Choose what was left open, estimate memory and time, and lay out every step.

    Raises:
        UsageError: it cannot fit into memory; the hint says what to change.
    """
    reasons = {
        "precision": f"{hardware.dtype}: {hardware.reason}",
        "packing": "documents lie end to end without padding; attention runs per document",
    }
    lengths = [len(example.tokens) for example in train]
    step_tokens = config.batch_tokens or max(256, min(8192, sum(lengths) // 300))
    micro, recompute = _fit_memory(config, shape, hardware, max(lengths), step_tokens, reasons)
    per_step = max(1, round(step_tokens / micro))
    if not config.batch_tokens:
        reasons["batch"] = f"{per_step * micro} tokens per step: enough steps per epoch, and steady gradients"
    prefix = shared_prefix(train)
    if prefix:
        reasons["shared prefix"] = f"all examples begin with the same {prefix} tokens: read once per pass"
    plan = schedule(lengths, micro, per_step, config.epochs, config.seed, prefix)
    if config.target:
        begin = f"after {config.quantize_after:.0%} of the steps" if config.quantize_after else "from the first step"
        begin += " and gradually" if is_ternary(config) and effective_ramp(config) else ""
        reasons["rounding"] = f"as {config.target} stores weights, {begin}: the file will be what is trained"
    tokens, learned = sum(lengths), sum(map(learned_count, train))
    rate = matmul_rate(hardware, min(micro, 1024), shape.mlp, shape.hidden)
    per_token = _flops_per_token(config, shape, recompute, learned / tokens)
    reasons["time"] = f"a matrix product runs at {rate / 1e9:.0f} GFLOP/s here; {per_token / 1e6:.0f} MFLOP per token"
    read = tokens - prefix * (len(train) - plan.packs_per_epoch)
    train_s = per_token * read * config.epochs / rate / _EFFICIENCY
    if config.target:
        train_s += plan.steps * shape.body / _ROUNDED_PER_S
    valid_s = sum(len(example.tokens) for example in valid) * per_token / 3 / rate / _EFFICIENCY
    eval_every = config.eval_every or _eval_every(plan, train_s, valid_s)
    if valid and not config.eval_every:
        reasons["validation"] = f"every {eval_every} steps: four times per epoch, or less where it would take long"
    made = TrainPlan(
        device=hardware.device,
        dtype=hardware.dtype,
        autocast=config.method == "full" and not config.target and hardware.dtype == "bfloat16",
        micro_tokens=micro,
        per_step=per_step,
        steps=plan.steps,
        gradient_checkpointing=recompute,
        eval_every=eval_every,
        save_every=config.save_every or max(1, min(eval_every, plan.steps // 10)),
        examples=len(train),
        tokens_per_epoch=tokens,
        learned_per_epoch=learned,
        memory_bytes=memory_bytes(config, shape, hardware, micro, recompute),
        available_bytes=hardware.available_bytes,
        seconds=train_s + valid_s * math.ceil(plan.steps / eval_every),
        reasons=reasons,
    )
    return made, plan


def _fit_memory(
    config: TrainConfig, shape: Shape, hardware: Hardware, longest: int, step_tokens: int, reasons: dict[str, str]
) -> tuple[int, bool]:
    """Tokens per pass, and whether activations are recomputed: the fastest that fits."""
    fast = min(step_tokens // 64 * 64, 1024 if hardware.device == "cpu" else 4096)
    wanted = max(config.micro_tokens or fast, longest)
    sizes = [wanted] if config.micro_tokens else sorted({wanted, max(wanted // 2, longest), longest}, reverse=True)
    modes = [False, True] if config.gradient_checkpointing is None else [config.gradient_checkpointing]
    for recompute in modes:
        for micro in sizes:
            need = memory_bytes(config, shape, hardware, micro, recompute)
            if need < 0.9 * hardware.available_bytes:
                if not config.micro_tokens:
                    enough = "a whole step" if micro >= step_tokens // 64 * 64 else "more is no faster"
                    reasons["tokens per pass"] = f"{micro}: {enough if micro == wanted else 'fits'}"
                if config.gradient_checkpointing is None:
                    kept = "kept: they fit, and recomputing them costs a third more time"
                    reasons["activations"] = "recomputed: they would not fit" if recompute else kept
                return micro, recompute
    smallest = memory_bytes(config, shape, hardware, min(sizes), modes[-1])
    raise UsageError(
        f"training needs about {smallest / 1e9:.1f} GB of memory; "
        f"{hardware.available_bytes / 1e9:.1f} GB are available on the {hardware.device}",
        _advice(config, longest),
    )


def _advice(config: TrainConfig, longest: int) -> str:
    options = []
    if config.method != "qlora":
        options.append("--method qlora")
    if config.gradient_checkpointing is False:
        options.append("--gradient-checkpointing")
    if config.micro_tokens > longest:
        options.append(f"--micro-tokens {longest}")
    options += [f"--max-length {longest // 2}", "a smaller base model"]
    return f"Try {', '.join(options[:-1])} or {options[-1]}."


def memory_bytes(config: TrainConfig, shape: Shape, hardware: Hardware, micro: int, recompute: bool) -> int:
    """Peak of a step: weights, what is trained (value, gradient, two moments), kept activations, logits, libraries."""
    size = 2 if hardware.dtype == "bfloat16" else 4
    embeddings = shape.parameters - shape.body
    if config.method == "full":
        weights, trained = 4 * shape.parameters, 12 * shape.parameters
        if config.target:  # the values of the file beside latent weights, and a teacher, in the compute dtype
            weights += size * (2 if config.teacher else 1) * shape.parameters
    else:
        # NF4: 4 bits, and a scale of 8 bits per 64 weights with a float32 per 256 scales.
        per_weight = 0.516 if config.method == "qlora" else size
        layers = round(per_weight * shape.body) if shape.packed is None else shape.packed
        rounded = size * shape.body if config.target else 0
        weights = layers + size * embeddings + rounded
        trained = 16 * _adapter_parameters(config, shape)
    per_layer = micro * size * (_KEPT_HIDDEN * shape.hidden + _KEPT_MLP * shape.mlp)
    if config.dora or (config.method == "full" and not config.target):
        per_layer = round(per_layer * _UNFUSED)
    inputs = shape.layers * micro * size * shape.hidden
    activations = 2 * per_layer + inputs if recompute else shape.layers * per_layer
    libraries = LIBRARIES_BYTES if hardware.device == "cpu" else 0
    return weights + trained + activations + 3 * CHUNK_BYTES + libraries


def _adapter_parameters(config: TrainConfig, shape: Shape) -> int:
    """Upper estimate: rank x (in + out) over the seven linear layers of a block."""
    return shape.layers * config.rank * (8 * shape.hidden + 3 * (shape.hidden + shape.mlp))


def _flops_per_token(config: TrainConfig, shape: Shape, recompute: bool, learned: float) -> float:
    """Forward, gradient of the inputs, of the weights if they are trained; the head only where a token is learned."""
    passes = 2 + (config.method == "full") + recompute
    return 2.0 * shape.body * passes + 4.0 * shape.vocabulary * shape.hidden * learned


def _eval_every(plan: Schedule, train_s: float, valid_s: float) -> int:
    """Four validations per epoch, but no more than a twentieth of the training time, and at least one per run."""
    per_epoch = plan.packs_per_epoch / plan.per_step
    affordable = plan.steps * valid_s / (0.05 * train_s) if train_s else 1.0
    return max(1, min(plan.steps, math.ceil(max(per_epoch / 4, affordable))))
