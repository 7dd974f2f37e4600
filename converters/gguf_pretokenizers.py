"""Which of llama.cpp's pre-tokenizers a `tokenizer.json` asks for, recognised by its structure.

llama.cpp's own converter hashes the token ids of one test string, so a fine-tune that adds a single token becomes
unknown to it. The split rules do not change when tokens are added; they are what is compared here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from edgeft.errors import UnsupportedModel

_LETTER_CASE = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _LETTER_CASE + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*" + _TAIL
_QWEN2 = _LETTER_CASE + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*" + _TAIL
_QWEN35 = _LETTER_CASE + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*" + _TAIL
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_WORDS = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
_TEKKEN = "|".join(_WORDS) + r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*" + _TAIL
_GPT4O = "|".join(f"{word}{_LETTER_CASE}?" for word in _WORDS) + r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*" + _TAIL

_GPT2 = "<gpt-2>"
"""ByteLevel with its built-in expression."""
_DIGITS = "<digits>"
"""Every digit on its own."""

_KNOWN: Mapping[tuple[tuple[str, ...], bool], str] = {
    # (split rules in order, ignore_merges) -> tokenizer.ggml.pre
    ((_DIGITS, _GPT2), False): "smollm",
    ((_GPT2,), False): "gpt-2",
    ((_LLAMA3,), True): "llama-bpe",
    ((_LLAMA3,), False): "smaug-bpe",
    ((_QWEN2,), False): "qwen2",
    ((_QWEN35,), False): "qwen35",
    ((_TEKKEN,), True): "tekken",
    ((_GPT4O,), False): "gpt-4o",
}

OVERRIDE_HINT = "If you know llama.cpp's name for it, give it with --tokenizer-pre NAME."


def recognise(tokenizer: Mapping[str, Any], where: str) -> str:
    """The value of `tokenizer.ggml.pre` for a byte-level BPE `tokenizer.json`.

    Raises:
        UnsupportedModel: llama.cpp has no pre-tokenizer known to edgeft that splits like this one.
    """
    rules = tuple(_rules(tokenizer.get("pre_tokenizer") or {}))
    normalizations = set(_normalizations(tokenizer.get("normalizer") or {}))
    ignore_merges = bool(tokenizer["model"].get("ignore_merges"))
    name = _KNOWN.get((rules, ignore_merges))
    if normalizations - {"NFC"}:
        raise UnsupportedModel(
            f"{where} changes text before it splits ({', '.join(sorted(normalizations))}), which llama.cpp cannot do",
            OVERRIDE_HINT,
        )
    if name == "qwen2" and not normalizations:
        # The same rules in llama.cpp; the name tells runtimes whether to compose characters first.
        return "deepseek-r1-qwen"
    if name is None:
        raise UnsupportedModel(
            f"{where} splits text by rules that no known llama.cpp pre-tokenizer has: {' then '.join(rules) or 'none'}",
            OVERRIDE_HINT,
        )
    return name


def _normalizations(node: Mapping[str, Any]) -> Iterator[str]:
    if node.get("type") == "Sequence":
        for child in node["normalizers"]:
            yield from _normalizations(child)
    elif "type" in node:
        yield node["type"]


def _rules(node: Mapping[str, Any]) -> Iterator[str]:
    """The splitting steps of a pre-tokenizer, flattened; what it cannot name, it yields as its type."""
    kind = node.get("type")
    if kind == "Sequence":
        for child in node["pretokenizers"]:
            yield from _rules(child)
    elif kind == "ByteLevel":
        if node.get("use_regex", True):
            yield _GPT2
    elif kind == "Digits" and node.get("individual_digits"):
        yield _DIGITS
    elif kind == "Split" and _isolates(node):
        pattern = node["pattern"].get("Regex", "")
        # As a rule of its own this is what Digits does.
        yield _DIGITS if pattern == r"\p{N}" else pattern
    elif kind is not None:
        yield f"<{kind}>"


def _isolates(node: Mapping[str, Any]) -> bool:
    # "Removed" with inversion is how older exports spell "Isolated" for expressions that match everything.
    return node.get("behavior") == "Isolated" or (node.get("behavior") == "Removed" and bool(node.get("invert")))
