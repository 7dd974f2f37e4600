"""How text is split before byte-pair merging, by llama.cpp's name of the rule (`tokenizer.ggml.pre`).

transformers gives every byte-pair tokenizer it reads from a GGUF the rule of GPT-2. SmolLM2 splits each digit off
first, so "2026" would become other tokens than the model was trained on; Llama 3 and Qwen differ in more than digits.
The rules here are those of the models' own tokenizer.json files.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgeft.errors import UnsupportedModel

_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_BYTES_ONLY = {**_BYTES, "use_regex": False}

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _sequence(*steps: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(steps)}


_GPT2: dict[str, Any] = {"pre_tokenizer": _BYTES}
_RULES: Mapping[str, dict[str, Any]] = {
    "gpt-2": _GPT2,
    "smollm": {"pre_tokenizer": _sequence({"type": "Digits", "individual_digits": True}, _BYTES)},
    "llama-bpe": {
        "pre_tokenizer": _sequence(_split(_WORDS.format(digits="{1,3}")), _BYTES_ONLY),
        "model": {"ignore_merges": True},
    },
    "qwen2": {
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": _sequence(_split(_WORDS.format(digits="")), _BYTES_ONLY),
    },
}


def apply_rule(tokenizer: dict[str, Any], model: str, rule: str | None) -> dict[str, Any]:
    """A tokenizer.json document with the pre-tokenizer that the GGUF names.

    Args:
        tokenizer: as transformers made it from the GGUF.
        model: `tokenizer.ggml.model`; only "gpt2" (byte-level BPE) has such rules.
        rule: `tokenizer.ggml.pre`.

    Raises:
        UnsupportedModel: an unknown rule; guessing would train on wrong tokens without a sign.
    """
    if model != "gpt2":
        return tokenizer
    if rule is None or rule not in _RULES:
        raise UnsupportedModel(
            f"the tokenizer splits text by the rule {rule!r}, which edgeft cannot import",
            f"It can import {', '.join(_RULES)}; for other models give the original Hugging Face directory.",
        )
    changes = _RULES[rule]
    return {**tokenizer, **changes, "model": {**tokenizer["model"], **changes.get("model", {})}}
