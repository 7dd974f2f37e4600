"""What a PEFT adapter changes in its base, read from `adapter_config.json` and `adapter_model.safetensors`.

Key names and formulas follow PEFT (`tuners/lora/layer.py`, `variants.py`, `utils/save_and_load.py`): LoRA
(arXiv 2106.09685), rank-stabilized LoRA (2312.03732), DoRA (2402.09353), trainable tokens and `modules_to_save`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgeft.errors import ModelError, UnsupportedModel
from edgeft.models.weights import refuse_pickles
from edgeft.paths import parse_json

from .safetensors_rows import StoredTensor, check_dtype, read_header

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"


@dataclass
class Change:
    """What happens to one base tensor W, in this order; with nothing set, nothing.

    1. `base`, the W that training started from when it is not the base's own (a resized embedding), or
       `replacement` (a trained embedding, head, norm or bias) takes W's place.
    2. `down` A and `up` B add scale · B @ A; for an embedding, scale · (B @ A) transposed.
    3. `magnitude` m rescales every row to the norm m (DoRA); every column, for an embedding.
    4. `token_rows` replace the rows `tokens`.
    5. `offset` adds scale · offset (the bias of B, for `lora_bias`).
    """

    base: StoredTensor | None = None
    replacement: StoredTensor | None = None
    down: StoredTensor | None = None
    up: StoredTensor | None = None
    embedding: bool = False
    up_columns: slice = field(default_factory=lambda: slice(None))
    """Which columns of B belong to it, when B serves several experts."""
    scale: float = 1.0
    magnitude: StoredTensor | None = None
    tokens: tuple[int, ...] = ()
    token_rows: StoredTensor | None = None
    offset: StoredTensor | None = None


@dataclass(frozen=True)
class Adapter:
    path: Path
    config: Mapping[str, Any]
    changes: Mapping[str, Change] = field(default_factory=dict)
    """Name of a base tensor -> what happens to it."""

    @property
    def modules_to_save(self) -> tuple[str, ...]:
        return tuple(self.config.get("modules_to_save") or ())

    @property
    def ties_weights(self) -> bool:
        """Whether embedding and head were trained as one (`ensure_weight_tying`)."""
        return bool(self.config.get("ensure_weight_tying"))


def read_adapter(path: Path) -> Adapter:
    """Read an adapter directory; headers only, no weights.

    Raises:
        ModelError: files missing or damaged, or tensors that do not belong together.
        UnsupportedModel: a method that cannot be merged exactly, or a tensor edgeft does not know.
    """
    config = _config(path)
    _refuse_unsupported(path, config)
    tensors = read_header(_weights(path))
    changes: dict[str, Change] = {}
    for key, tensor in tensors.items():
        check_dtype(tensor)
        _place(changes, config, key, tensor)
    for name, change in changes.items():
        _check_pair(path, config, name, change)
    return Adapter(path, config, changes)


def _config(path: Path) -> dict[str, Any]:
    file = path / CONFIG
    try:
        config = parse_json(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path} is not an adapter: it has no {CONFIG}") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise ModelError(f"{file} is not an adapter configuration")
    reason = next(_wrong_settings(config), None)
    if reason is not None:
        raise ModelError(f"{file}: {reason}", "Copy or download the adapter again.")
    return config


_REPEATS = re.compile(r"[*+{]")
_MOST_REPEATS = 3
"""Of a pattern for names; more of them, or one behind a group, can take for ever to match."""


def _wrong_settings(config: Mapping[str, Any]) -> Iterator[str]:
    """What cannot be the rank, the scale or a pattern of names."""
    for name, whole in (("r", True), ("lora_alpha", False)):
        if name in config and not _is_number(config[name], whole):
            yield f"{name} is {config[name]!r:.40}"
    for name, whole in (("rank_pattern", True), ("alpha_pattern", False)):
        patterns = config.get(name) or {}
        if not isinstance(patterns, Mapping):
            yield f"{name} is {patterns!r:.40}"
            return
        for pattern, value in patterns.items():
            if not _is_number(value, whole):
                yield f"{name} says {value!r:.40} for {pattern[:60]!r}"
            if len(_REPEATS.findall(pattern)) > _MOST_REPEATS or re.search(r"\)[*+{]", pattern):
                yield f"{name} has a pattern that repeats too much: {pattern[:60]!r}"
            try:
                re.compile(pattern)
            except re.error as error:
                yield f"{name} has {pattern[:60]!r}, which is no pattern: {error}"


def _is_number(value: Any, whole: bool) -> bool:
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
        return False
    return 0 < value < 1 << 20 if whole else math.isfinite(value)


def _weights(path: Path) -> Path:
    if (path / WEIGHTS).is_file():
        return path / WEIGHTS
    refuse_pickles(path)
    raise ModelError(f"{path} has no {WEIGHTS}")


_NOT_MERGEABLE = {
    "fan_in_fan_out": "weights stored transposed",
    "use_qalora": "QA-LoRA",
    "use_bdlora": "block-diagonal LoRA",
    "layer_replication": "replicated layers",
    "alora_invocation_tokens": "activated LoRA, which works from a certain token on only",
    "arrow_config": "Arrow routing",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "megatron_config": "Megatron layers",
}
_MOVES_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")
"""Initializations that also change the base; the adapter then belongs to a base that is not the one on disk."""


def _refuse_unsupported(path: Path, config: Mapping[str, Any]) -> None:
    file = path / CONFIG
    method = config.get("peft_type")
    if method != "LORA":
        raise UnsupportedModel(
            f"{file}: peft_type {method!r:.40} cannot be exported", "LoRA, rank-stabilized LoRA and DoRA can."
        )
    for key, meaning in _NOT_MERGEABLE.items():
        if config.get(key):
            raise UnsupportedModel(f"{file}: {key} ({meaning}) cannot be merged into the weights")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(_MOVES_BASE):
        raise UnsupportedModel(
            f"{file}: init_lora_weights {start!r:.40} also changed the base, which is not in the adapter",
            "Save it with PEFT's path_initial_model_for_weight_conversion, which makes it an ordinary LoRA.",
        )


_SUFFIXES = (
    "lora_A.weight",
    "lora_B.weight",
    "lora_B.bias",
    "lora_embedding_A",
    "lora_embedding_B",
    "lora_magnitude_vector",
    "lora_magnitude_vector.weight",
    "token_adapter.trainable_tokens_delta",
    "base_layer.weight",
    "base_layer.bias",
    "weight",
    "bias",
)
"""Endings of an adapter's keys; what stands before is the module."""


def _place(changes: dict[str, Change], config: Mapping[str, Any], key: str, tensor: StoredTensor) -> None:
    path = key.removeprefix("base_model.model.")
    suffix = next((suffix for suffix in _SUFFIXES if path.endswith(f".{suffix}")), None)
    if suffix is None or path == key:
        raise UnsupportedModel(f"{tensor.file}: edgeft does not know the adapter tensor {key}")
    module = path.removesuffix(f".{suffix}")
    target = f"{module}.bias" if suffix.endswith("bias") else f"{module}.weight"
    change = changes.setdefault(target, Change())
    change.scale = scale_of(config, module)
    match suffix:
        case "lora_A.weight" | "lora_embedding_A":
            change.down = tensor
            change.embedding = suffix == "lora_embedding_A"
        case "lora_B.weight" | "lora_embedding_B":
            change.up = tensor
        case "lora_B.bias":
            change.offset = tensor
        case "lora_magnitude_vector" | "lora_magnitude_vector.weight":
            change.magnitude = tensor
        case "token_adapter.trainable_tokens_delta":
            change.token_rows = tensor
            change.tokens = _tokens(config, module, tensor)
        case "base_layer.weight":
            change.base = tensor
        case _:
            change.replacement = tensor


def rank_of(config: Mapping[str, Any], module: str) -> int:
    return int(_pattern(config.get("rank_pattern"), module, config.get("r", 8)))


def scale_of(config: Mapping[str, Any], module: str) -> float:
    """alpha / r, or alpha / sqrt(r) when rank-stabilized, with the patterns that override r and alpha."""
    rank = rank_of(config, module)
    alpha = _pattern(config.get("alpha_pattern"), module, config.get("lora_alpha", 8))
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """First pattern that matches the module's name or its end, as PEFT's `get_pattern_key`."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _tokens(config: Mapping[str, Any], module: str, tensor: StoredTensor) -> tuple[int, ...]:
    indices = config.get("trainable_token_indices") or {}
    if isinstance(indices, Mapping):
        indices = next((value for name, value in indices.items() if module.endswith(name)), ())
    if len(indices) != tensor.shape[0]:
        raise ModelError(f"{tensor.file}: {tensor.name} has {tensor.shape[0]} rows for {len(indices)} tokens")
    return tuple(int(index) for index in indices)


def _check_pair(path: Path, config: Mapping[str, Any], name: str, change: Change) -> None:
    down, up = change.down, change.up
    if (down is None and up is None) or (config.get("target_parameters") and ".experts" in name):
        # The names of nested parameters do not say which they are for; see expert_adapters.
        return
    if down is None or up is None:
        raise ModelError(f"{path / WEIGHTS}: only one of the two LoRA matrices of {name} is there")
    rank = rank_of(config, name.removesuffix(".weight"))
    if len(down.shape) != 2 or len(up.shape) != 2 or (down.shape[0], up.shape[1]) != (rank, rank):
        raise ModelError(
            f"{path / WEIGHTS}: the LoRA matrices of {name} have shapes {down.shape} and {up.shape}, "
            f"{CONFIG} says rank {rank}"
        )


def check_fit(adapter: Adapter, changes: Mapping[str, Change], base: Mapping[str, StoredTensor]) -> None:
    """Every change has a base tensor of its shape.

    Raises:
        ModelError: the adapter belongs to another base.
    """
    for name, change in changes.items():
        tensor = base.get(name)
        if tensor is None:
            raise _no_target(adapter, name, change)
        for expected, found, label in _shapes(name, tensor, change):
            if expected != found:
                raise ModelError(
                    f"the adapter {adapter.path} does not fit {tensor.file.parent}: {label} has shape {found}, "
                    f"{name} asks for {expected}",
                    "Give the base model the adapter was trained on.",
                )


def _no_target(adapter: Adapter, name: str, change: Change) -> ModelError:
    if change.offset is not None:
        return UnsupportedModel(
            f"{adapter.path}: lora_bias trains a bias for {name.removesuffix('.bias')}, where the base has none"
        )
    return ModelError(
        f"the adapter {adapter.path} changes {name}, which the base does not have",
        "Give the base model the adapter was trained on.",
    )


def _shapes(name: str, tensor: StoredTensor, change: Change) -> list[tuple[tuple[int, ...], tuple[int, ...], str]]:
    """(expected, found, what it is) for each part of a change."""
    shape = tensor.shape
    checks = []
    substitute = change.replacement or change.base
    if substitute is not None:
        # Added tokens make the embedding and the head longer; nothing else may change its shape.
        grown = name in (EMBEDDING, HEAD) and substitute.shape[1:] == shape[1:]
        shape = substitute.shape if grown else shape
        checks.append((shape, substitute.shape, substitute.name))
    if change.down is not None and change.up is not None:
        product = (change.up.shape[0], change.down.shape[1])
        checks.append((shape, product[::-1] if change.embedding else product, "B @ A"))
    if change.magnitude is not None:
        length = shape[-1] if change.embedding else shape[0]
        checks.append(((length,), change.magnitude.shape, change.magnitude.name))
    if change.token_rows is not None:
        checks.append(((len(change.tokens), *shape[1:]), change.token_rows.shape, change.token_rows.name))
    if change.offset is not None:
        checks.append((shape, change.offset.shape, change.offset.name))
    return checks
