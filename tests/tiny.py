"""Tiny models with everything a real one has, built in a fraction of a second."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

TOKENS = 260
"""All bytes and four special tokens."""

TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"

_CLASSES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}


def write_model(folder: Path, kind: str = "llama", *, dtype: str = "float32", seed: int = 0, **settings: Any) -> Path:
    """A randomly initialised model of two layers with a byte-level tokenizer, as a Hugging Face directory."""
    import torch
    import transformers

    torch.manual_seed(seed)
    chosen = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": TOKENS,
        "tie_word_embeddings": True,
        "bos_token_id": 256,
        "eos_token_id": 257,
        "max_position_embeddings": 256,
        **settings,
    }
    config = getattr(transformers, f"{_CLASSES[kind]}Config")(**chosen)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.1)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def write_loadable(folder: Path, kind: str = "llama", **settings: Any) -> Path:
    """The same with a tokenizer that also merges: llama.cpp loads no byte-pair vocabulary without merges."""
    write_model(folder, kind, vocab_size=TOKENS + 2, **settings)
    document = json.loads((folder / "tokenizer.json").read_text())
    document["model"]["vocab"] |= {"th": TOKENS, "12": TOKENS + 1}
    document["model"]["merges"] = ["t h", "1 2"]
    (folder / "tokenizer.json").write_text(json.dumps(document))
    return folder


def write_tokenizer(folder: Path) -> None:
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]
    characters = sorted(_byte_characters())
    tokenizer = {
        "version": "1.0",
        "added_tokens": [_added(256 + at, text) for at, text in enumerate(special)],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, _byte_level(use_regex=True)],
        },
        "post_processor": None,
        "decoder": _byte_level(use_regex=True),
        "model": {
            "type": "BPE",
            "ignore_merges": False,
            "vocab": {text: at for at, text in enumerate([*characters, *special])},
            "merges": [],
        },
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"}
        )
    )


def _byte_level(*, use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _added(id_: int, text: str) -> Mapping[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": id_, "content": text, **flags, "special": True}


def _byte_characters() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + at) for at in range(len(hidden))]


def write_adapter(base: Path, folder: Path, *, seed: int = 1, **settings: Any) -> Any:
    """A PEFT adapter with every part random, saved as training would.

    Returns:
        The adapted model, in float32.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapted = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 6, **settings}))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape) * 0.05)
    adapted.save_pretrained(folder)
    return adapted
