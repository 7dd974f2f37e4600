"""GGUF files that load in milliseconds: one whose answer is known in advance, and one with random weights.

Both have a vocabulary of all bytes (token id = byte), four special tokens and one merge.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray
from tiny import _byte_characters

END_OF_TEXT, IM_START, IM_END, TURN = 256, 257, 258, 259
TWO_SPACES = 260
VOCABULARY = 261
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|turn|>")

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ANSWER = "Hé😀!"
"""No byte of it occurs twice, so that a table of successors can say it."""

Array = NDArray[np.float32]
Chain = Mapping[int, Mapping[int, float]]
"""Token -> its successors' logits; all other logits are 0."""


def chain_of(text: str, *, start: str = "\n", end: int = IM_END, logit: float = 12.0) -> Chain:
    """After `start` comes `text`, then `end`."""
    tokens = [*start.encode()[-1:], *text.encode(), end]
    return {token: {after: logit} for token, after in pairwise(tokens)}


def write_scripted(path: Path, chain: Chain, *, template: str | None = TEMPLATE, add_bos: bool = False) -> Path:
    """A Llama whose next token depends on the last one alone: one-hot embeddings, nothing in between, and a head that
    is the table of successors."""
    width = 288
    zeros = {name: np.zeros_like(value) for name, value in _layers(width, 32, seed=0).items()}
    norms = {name: np.ones(width, np.float32) for name in zeros if "norm" in name}
    head = np.zeros((VOCABULARY, width), np.float32)
    # The final norm turns a one-hot row into one of length sqrt(width).
    for token, successors in chain.items():
        for after, logit in successors.items():
            head[after, token] = logit / np.sqrt(width)
    tensors = {**zeros, **norms, "token_embd.weight": np.eye(VOCABULARY, width, dtype=np.float32)}
    return write_gguf(path, {**tensors, "output.weight": head}, template=template, add_bos=add_bos)


def write_babbler(path: Path, **likely: float) -> Path:
    """Says anything in ASCII, every byte as likely as any other, but for those given with another logit."""
    successors = dict.fromkeys(range(128, 256), -60.0) | {ord(byte): logit for byte, logit in likely.items()}
    return write_scripted(path, dict.fromkeys(range(VOCABULARY), successors))


def write_random(path: Path, *, seed: int = 0, context: int = 2048, changes: Mapping[str, Array] | None = None) -> Path:
    """A Llama of two layers with random weights; `changes` are added to the named tensors."""
    tensors = _layers(64, 96, seed)
    for name, change in (changes or {}).items():
        tensors[name] = tensors[name] + change
    return write_gguf(path, tensors, context=context)


def _layers(width: int, inner: int, seed: int) -> dict[str, Array]:
    random = np.random.default_rng(seed)
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (VOCABULARY, width), "output_norm.weight": (width,)}
    for layer in range(2):
        names = {"attn_q": (width, width), "attn_k": (width // 2, width), "attn_v": (width // 2, width)}
        names |= {"attn_output": (width, width), "ffn_gate": (inner, width), "ffn_up": (inner, width)}
        names |= {"ffn_down": (width, inner), "attn_norm": (width,), "ffn_norm": (width,)}
        shapes |= {f"blk.{layer}.{name}.weight": shape for name, shape in names.items()}
    shapes["output.weight"] = (VOCABULARY, width)
    return {name: (random.standard_normal(shape) * 0.2 + 0.05).astype(np.float32) for name, shape in shapes.items()}


def write_gguf(
    path: Path,
    tensors: Mapping[str, Array],
    *,
    template: str | None = TEMPLATE,
    add_bos: bool = False,
    context: int = 2048,
) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    width = tensors["token_embd.weight"].shape[1]
    writer.add_context_length(context)
    writer.add_embedding_length(width)
    writer.add_block_count(2)
    writer.add_feed_forward_length(tensors["blk.0.ffn_up.weight"].shape[0])
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(width // 4)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    characters = _byte_characters_in_order()
    writer.add_token_list([*characters, *SPECIAL, characters[ord(" ")] * 2])
    normal, control = int(gguf.TokenType.NORMAL), int(gguf.TokenType.CONTROL)
    writer.add_token_types([normal] * 256 + [control] * len(SPECIAL) + [normal])
    writer.add_token_merges([f"{characters[ord(' ')]} {characters[ord(' ')]}"])
    writer.add_bos_token_id(END_OF_TEXT)
    writer.add_eos_token_id(IM_END)
    writer.add_add_bos_token(add_bos)
    if template is not None:
        writer.add_chat_template(template)
    _finish(writer, tensors)
    return path


def write_adapter(path: Path, tensor: str, a: Array, b: Array, *, alpha: float, architecture: str = "llama") -> Path:
    """A LoRA adapter for one tensor: `a` (rank, columns), `b` (rows, rank); it adds alpha/rank * b @ a."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", alpha)
    _finish(writer, {f"{tensor}.lora_a": a, f"{tensor}.lora_b": b})
    return path


def _finish(writer: gguf.GGUFWriter, tensors: Mapping[str, Array]) -> None:
    for name, value in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(value, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _byte_characters_in_order() -> list[str]:
    """GPT-2's stand-in for byte i at place i."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    order = dict(zip([*shown, *hidden], _byte_characters(), strict=True))
    return [order[byte] for byte in range(256)]
