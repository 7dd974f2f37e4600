"""The same function in other weights: channels in another order, and more of them.

A model that was read from a quantized file has weights on that file's grid, and a type with the same blocks stores
them without loss. Shuffling channels puts other weights into each block and so ends that; the model answers as before.
Channels can also be doubled (each copy and its readers divided by √2), which makes rows of any length.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

Tensor = torch.Tensor


def write(base: Path, out: Path, hidden: int | None = None, heads: int | None = None, seed: int = 0) -> Path:
    """A shuffled copy of a Llama or Gemma 3 in `out`; nothing is done when it is there already.

    Args:
        hidden: width of the copy; None: as it is. Only without Gemma's scaled embedding.
        heads: query heads of the copy; key-value heads are doubled with their query heads.
    """
    if (out / "model.safetensors").is_file():
        return out
    out.mkdir(parents=True, exist_ok=True)
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    for file in base.iterdir():
        if file.suffix == ".json" or file.suffix == ".jinja":
            shutil.copy(file, out)
    save_file(dict(_tensors(base, config, hidden or config["hidden_size"], heads, seed)), out / "model.safetensors")
    _write_config(out, config, hidden or config["hidden_size"], heads or config["num_attention_heads"])
    return out


def _write_config(out: Path, config: dict[str, Any], hidden: int, heads: int) -> None:
    group = config["num_attention_heads"] // config["num_key_value_heads"]
    changed = {"hidden_size": hidden, "num_attention_heads": heads, "num_key_value_heads": heads // group}
    # Doubled channels carry half of the square each: the mean square shrinks as the width grows.
    changed["rms_norm_eps"] = config["rms_norm_eps"] * config["hidden_size"] / hidden
    (out / "config.json").write_text(json.dumps({**config, **changed}), encoding="utf-8")


def _tensors(
    base: Path, config: dict[str, Any], hidden: int, heads: int | None, seed: int
) -> Iterator[tuple[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    width = _Copies(config["hidden_size"], hidden, generator)
    gain = (config["hidden_size"] / hidden) ** 0.5
    plus = 1.0 if config["model_type"].startswith("gemma") else 0.0
    layers: dict[str, _Layer] = {}
    with safe_open(base / "model.safetensors", "pt") as stored:
        for name in stored.keys():  # noqa: SIM118
            weight = stored.get_tensor(name).float()
            layer, part = name.rpartition(".layers.")[2].split(".")[0], name.split(".")[-2]
            if layer not in layers:
                layers[layer] = _Layer(config, heads or config["num_attention_heads"], generator)
            change = layers[layer].changes(width).get(part)
            if change:
                weight = change(weight)
            elif part.endswith("layernorm") or part == "norm":
                weight = (weight[width.of] + plus) * gain - plus
            elif part in ("embed_tokens", "lm_head"):
                weight = width.columns(weight)
            yield name, weight.to(torch.bfloat16).contiguous()


class _Copies:
    """Which old channel every new one is, and how strong."""

    def __init__(self, old: int, new: int, generator: torch.Generator) -> None:
        extra = torch.randperm(old, generator=generator)[: new - old]
        every = torch.cat([torch.arange(old), extra])
        self.of = every[torch.randperm(new, generator=generator)]
        self.scale = torch.bincount(self.of, minlength=old)[self.of].float().rsqrt()

    def columns(self, weight: Tensor) -> Tensor:
        return weight[:, self.of] * self.scale

    def rows(self, weight: Tensor) -> Tensor:
        return weight[self.of] * self.scale[:, None]


class _Layer:
    """Orders inside one layer: its FFN, its heads, and the values of each head."""

    def __init__(self, config: dict[str, Any], heads: int, generator: torch.Generator) -> None:
        old = config["num_key_value_heads"]
        group, self._size = config["num_attention_heads"] // old, config["head_dim"]
        ffn, keys = config["intermediate_size"], heads // group
        self._ffn = _Copies(ffn, ffn, generator)
        kept = _Copies(old, keys, generator)
        inside = torch.stack([torch.randperm(self._size, generator=generator) for _ in range(keys)])
        self._keys = _heads(kept.of, self._size)
        self._values = (kept.of[:, None] * self._size + inside).reshape(-1)
        queries = (kept.of[:, None] * group + torch.arange(group)).reshape(-1)
        self._queries = _heads(queries, self._size)
        self._outputs = (queries[:, None] * self._size + inside.repeat_interleave(group, 0)).reshape(-1)
        self._value_scale = kept.scale.repeat_interleave(self._size)[:, None]
        self._output_scale = kept.scale.repeat_interleave(group * self._size)

    def changes(self, width: _Copies) -> dict[str, Callable[[Tensor], Tensor]]:
        ffn = self._ffn.of
        return {
            "q_proj": lambda weight: width.columns(weight)[self._queries],
            "k_proj": lambda weight: width.columns(weight)[self._keys],
            "v_proj": lambda weight: width.columns(weight)[self._values] * self._value_scale,
            "o_proj": lambda weight: width.rows(weight[:, self._outputs] * self._output_scale),
            "gate_proj": lambda weight: width.columns(weight)[ffn],
            "up_proj": lambda weight: width.columns(weight)[ffn],
            "down_proj": lambda weight: width.rows(weight[:, ffn]),
            "q_norm": lambda weight: weight,
            "k_norm": lambda weight: weight,
        }


def _heads(heads: Tensor, size: int) -> Tensor:
    """Rows of whole heads."""
    return (heads[:, None] * size + torch.arange(size)).reshape(-1)
