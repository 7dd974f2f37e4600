"""What a forecast must know of a model, from its header alone: sizes by role, layers, heads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from edgeft.errors import ModelError, UnsupportedModel
from edgeft.models.gguf_header import GgufHeader

Role = Literal["layer", "expert", "embedding", "head", "norm"]

_WINDOW_EVERY = {"gemma2": 2, "gemma3": 6, "gemma3_text": 6, "gemma3n": 5, "gpt-oss": 2, "gpt_oss": 2, "cohere2": 4}
"""Architecture -> of how many layers one sees the whole context, the others a window (llama.cpp's llama-model.cpp)."""


@dataclass(frozen=True)
class Part:
    """All tensors of one role and type."""

    role: Role
    type: str
    weights: int
    bytes: int


@dataclass(frozen=True)
class ModelFacts:
    name: str
    format: Literal["gguf", "safetensors"]
    architecture: str
    parts: tuple[Part, ...]
    kv_values: tuple[int, ...]
    """Values of keys and values that each layer keeps per token."""
    windowed: tuple[bool, ...]
    """Whether a layer sees only a window of the context."""
    window: int
    heads: int
    kv_heads: int
    """The most of any layer."""
    width: int
    inner: int
    vocabulary: int
    context: int
    """Tokens it was trained for."""
    experts: int = 0
    experts_used: int = 0

    @property
    def bytes(self) -> int:
        return sum(part.bytes for part in self.parts)

    @property
    def parameters(self) -> int:
        return sum(part.weights for part in self.parts)

    @property
    def tied(self) -> bool:
        return all(part.role != "head" for part in self.parts)

    @property
    def layers(self) -> int:
        return len(self.kv_values)

    def streamed(self) -> float:
        """Bytes read for every token: layers and head, of experts those used; an untied embedding is a row look-up."""
        return sum(self.read(part) for part in self.parts)

    def read(self, part: Part) -> float:
        """Bytes of a part that are read for every token."""
        return part.bytes * self._share(part)

    def active(self) -> float:
        """Weights that every token is multiplied with, the embedding's among them as published figures count them."""
        return sum(self.used(part) for part in self.parts)

    def used(self, part: Part) -> float:
        """Weights of a part that a token is multiplied with."""
        share = self.experts_used / self.experts if self.experts and part.role == "expert" else 1.0
        return part.weights * share

    def _share(self, part: Part) -> float:
        if part.role == "expert" and self.experts:
            return self.experts_used / self.experts
        return 1.0 if part.role != "embedding" or self.tied else 0.0


def of_gguf(header: GgufHeader, name: str) -> ModelFacts:
    """Raises: UnsupportedModel when it is no language model; ModelError when its header is incomplete."""
    kind = header.architecture
    if not any(tensor.name == "token_embd.weight" for tensor in header.tensors):
        raise UnsupportedModel(f"{name} has no token embedding: it is no language model on its own")

    def number(key: str, default: int | None = None) -> int:
        value = header.metadata.get(f"{kind}.{key}")
        if isinstance(value, list):
            value = max(value, default=0)
        return _whole(value, default, f"{name}: {kind}.{key}")

    layers = number("block_count")
    heads = number("attention.head_count", 1)
    each = header.metadata.get(f"{kind}.attention.head_count_kv", heads)
    kv_heads = [_whole(value, None, f"{name}: head_count_kv") for value in (each if isinstance(each, list) else [each])]
    kv_heads = kv_heads * layers if len(kv_heads) == 1 else kv_heads
    width = number("embedding_length")
    head = width // heads
    values = number("attention.key_length", head) + number("attention.value_length", head)
    window, every = number("attention.sliding_window", 0), _WINDOW_EVERY.get(kind, 0)
    embedding = next(tensor for tensor in header.tensors if tensor.name == "token_embd.weight")
    return ModelFacts(
        name=name,
        format="gguf",
        architecture=kind,
        parts=_summed((_gguf_role(t.name, t.shape), t.type, t.elements, t.bytes) for t in header.tensors),
        kv_values=tuple(count * values for count in kv_heads),
        windowed=_windowed(layers, window, every),
        window=window,
        heads=heads,
        kv_heads=max(kv_heads, default=1),
        width=width,
        inner=number("feed_forward_length", 4 * width),
        vocabulary=embedding.shape[-1],
        context=number("context_length", 4096),
        experts=number("expert_count", 0),
        experts_used=number("expert_used_count", 0),
    )


def _gguf_role(name: str, shape: tuple[int, ...]) -> Role:
    if name in ("token_embd.weight", "per_layer_token_embd.weight"):
        return "embedding"
    if name == "output.weight":
        return "head"
    if len(shape) < 2:
        return "norm"
    return "expert" if "_exps." in name else "layer"


def of_safetensors(config: Mapping[str, Any], tensors: Iterable[tuple[str, str, int, int]], name: str) -> ModelFacts:
    """Facts of a Hugging Face directory.

    Args:
        tensors: (name, type, weights, bytes) of every tensor.

    Raises:
        ModelError: config.json lacks a size.
    """
    text = config.get("text_config") if isinstance(config.get("text_config"), Mapping) else config
    assert isinstance(text, Mapping)

    def number(key: str, default: int | None = None) -> int:
        return _whole(text.get(key), default, f"{name}: config.json: {key}")

    layers, width, heads = number("num_hidden_layers"), number("hidden_size"), number("num_attention_heads")
    kv_heads = number("num_key_value_heads", heads)
    head = number("head_dim", width // heads)
    kind = str(text.get("model_type", "unknown"))
    used = number("num_experts_per_tok", 0)
    window = number("sliding_window", 0) if text.get("use_sliding_window", True) else 0
    tied = bool(text.get("tie_word_embeddings", config.get("tie_word_embeddings", False)))
    kept = [entry for entry in tensors if not entry[0].startswith(_OTHER_SENSES)]
    return ModelFacts(
        name=name,
        format="safetensors",
        architecture=kind,
        parts=_summed(
            (_hf_role(key), dtype, weights, size)
            for key, dtype, weights, size in kept
            if not (tied and _hf_role(key) == "head")
        ),
        kv_values=(kv_heads * 2 * head,) * layers,
        windowed=_windowed(layers, window, _WINDOW_EVERY.get(kind, 0)),
        window=window,
        heads=heads,
        kv_heads=kv_heads,
        width=width,
        inner=number("intermediate_size", 4 * width),
        vocabulary=number("vocab_size"),
        context=number("max_position_embeddings", 4096),
        experts=number("num_local_experts", number("num_experts", 0)) if used else 0,
        experts_used=used,
    )


_OTHER_SENSES = ("vision_tower.", "visual.", "multi_modal_projector.", "model.vision", "audio_tower.", "model.visual.")


def _hf_role(name: str) -> Role:
    if name.endswith(("embed_tokens.weight", "wte.weight", "embed_tokens_per_layer.weight")):
        return "embedding"
    if name.endswith("lm_head.weight"):
        return "head"
    if "norm" in name or name.endswith(".bias"):
        return "norm"
    return "expert" if ".experts." in name else "layer"


def _windowed(layers: int, window: int, every: int) -> tuple[bool, ...]:
    return tuple(bool(window and every and (at + 1) % every) for at in range(layers))


def _whole(value: Any, default: int | None, what: str) -> int:
    if value is None and default is not None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 40:
        raise ModelError(f"{what} is {'missing' if value is None else repr(value)[:40]}", "Fetch or export it again.")
    return value


def _summed(entries: Iterable[tuple[Role, str, int, int]]) -> tuple[Part, ...]:
    found: dict[tuple[Role, str], Part] = {}
    for role, kind, weights, size in entries:
        before = found.get((role, kind), Part(role, kind, 0, 0))
        found[role, kind] = replace(before, weights=before.weights + weights, bytes=before.bytes + size)
    return tuple(found.values())


_EXPORTED: Mapping[str, tuple[str, float, float]] = {
    # target -> type of most layers, bits per weight of the layers, of the embedding or head that is read
    "gguf-q8_0": ("Q8_0", 8.5, 8.5),
    "gguf-q6_k": ("Q6_K", 6.5625, 6.5625),
    "gguf-q5_k_m": ("Q5_K", 5.67, 6.5625),
    "gguf-q4": ("Q4_K", 4.83, 6.5625),
    "gguf-q4_k_m": ("Q4_K", 4.83, 6.5625),
    "gguf-q4_0": ("Q4_0", 4.5, 6.5625),
    "gguf-q3_k_m": ("Q3_K", 3.89, 6.5625),
    "gguf-q2_k": ("Q2_K", 2.96, 6.5625),
    "gguf-f16": ("F16", 16.0, 16.0),
}
"""The mixtures of llama.cpp's quantizer on a Llama of 8B, layers and head apart."""
TARGETS = tuple(_EXPORTED)


def as_exported(facts: ModelFacts, target: str) -> ModelFacts:
    """The file that an export of this checkpoint will make, nearly: its own plan knows every tensor.

    Raises: UnsupportedModel for targets without a known mixture.
    """
    if target not in _EXPORTED:
        raise UnsupportedModel(f"no forecast for {target}", f"There are forecasts for {', '.join(TARGETS)}.")
    kind, bits, outer = _EXPORTED[target]
    parts = []
    for part in facts.parts:
        plain = part.role == "norm"
        each = 32.0 if plain else outer if part.role in ("head", "embedding") else bits
        stored = "F32" if plain else "Q6_K" if each == 6.5625 else kind
        parts.append(Part(part.role, stored, part.weights, round(part.weights * each / 8)))
    return replace(facts, format="gguf", parts=tuple(parts), name=f"{facts.name} as {target}")
