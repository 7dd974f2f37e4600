"""A model's vocabulary as GGUF stores it, read from the tokenizer's own files.

Two kinds: byte-level BPE ("gpt2" in GGUF: Llama 3, SmolLM2, Qwen) and SentencePiece BPE ("llama" in GGUF: Llama 2,
TinyLlama, Mistral). Neither needs transformers or the sentencepiece package.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from edgeft.errors import ModelError, UnsupportedModel
from edgeft.paths import parse_json

from . import sentencepiece_model


class TokenType(enum.IntEnum):
    """`tokenizer.ggml.token_type`; the numbers are SentencePiece's."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class TokenizerFiles:
    """What a model folder says about its tokenizer; files that are missing are empty."""

    folder: Path
    tokenizer: Mapping[str, Any]
    """tokenizer.json"""
    config: Mapping[str, Any]
    """tokenizer_config.json"""
    added: tuple[Mapping[str, Any], ...]
    """Added tokens as in tokenizer.json: id, content, special, …; by id."""

    @cached_property
    def added_ids(self) -> Mapping[str, int]:
        return {token["content"]: token["id"] for token in self.added}


@dataclass(frozen=True)
class Vocabulary:
    """Tokens by id. `merges` belong to "gpt2", `scores` to "llama"."""

    model: str
    """`tokenizer.ggml.model`: "gpt2" or "llama"."""
    tokens: Sequence[str]
    types: Sequence[TokenType]
    merges: Sequence[str] = ()
    scores: Sequence[float] = ()
    add_space_prefix: bool | None = None
    """None: llama.cpp's default for the kind, which is right."""


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object, or {} when there is no such file. Raises: ModelError when it cannot be read."""
    if not file.is_file():
        return {}
    try:
        content = parse_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} cannot be read: {error}", "Fetch the model again.") from error
    if not isinstance(content, dict):
        raise ModelError(f"{file} is not a JSON object", "Fetch the model again.")
    return content


def read_files(folder: Path) -> TokenizerFiles:
    """Raises: ModelError when the folder has no tokenizer or a file cannot be read."""
    tokenizer = read_json(folder / "tokenizer.json")
    if not tokenizer and not (folder / "tokenizer.model").is_file():
        raise ModelError(
            f"{folder} has no tokenizer (neither tokenizer.json nor tokenizer.model)",
            "Copy the tokenizer files of the base model into it.",
        )
    config = read_json(folder / "tokenizer_config.json")
    return TokenizerFiles(folder, tokenizer, config, _added_tokens(folder, tokenizer, config))


def _added_tokens(
    folder: Path, tokenizer: Mapping[str, Any], config: Mapping[str, Any]
) -> tuple[Mapping[str, Any], ...]:
    # Oldest file first: the newer ones know more about a token and win.
    found: dict[int, Mapping[str, Any]] = {
        id_: {"id": id_, "content": content, "special": False}
        for content, id_ in read_json(folder / "added_tokens.json").items()
    }
    for id_, token in (config.get("added_tokens_decoder") or {}).items():
        found[int(id_)] = {**token, "id": int(id_)}
    for token in tokenizer.get("added_tokens") or ():
        found[token["id"]] = token
    return tuple(found[id_] for id_ in sorted(found))


def read_vocabulary(files: TokenizerFiles, rows: int) -> Vocabulary:
    """The vocabulary, padded to the embedding's number of rows.

    Raises:
        UnsupportedModel: the tokenizer is of a kind llama.cpp cannot express for these architectures.
        ModelError: more tokens than `rows`, or two tokens with one text (llama.cpp aborts on those).
    """
    model = files.tokenizer.get("model") or {}
    kind, byte_fallback = model.get("type"), model.get("byte_fallback")
    if files.tokenizer and kind == "BPE" and not byte_fallback:
        vocabulary = _byte_level(files, rows)
    elif (files.folder / "tokenizer.model").is_file():
        vocabulary = _sentencepiece(files, rows)
    elif kind == "BPE":
        vocabulary = _byte_fallback(files, rows)
    else:
        raise UnsupportedModel(
            f"{files.folder / 'tokenizer.json'} is a {kind or 'nameless'} tokenizer; edgeft exports BPE tokenizers only"
        )
    _refuse_duplicates(vocabulary, files.folder)
    return vocabulary


# --- Byte-level BPE -----------------------------------------------------------


def _byte_level(files: TokenizerFiles, rows: int) -> Vocabulary:
    model = files.tokenizer["model"]
    tokens, types = _table(files, model["vocab"], rows)
    return Vocabulary("gpt2", tokens, types, merges=_merges(model["merges"]))


def _table(files: TokenizerFiles, vocab: Mapping[str, int], rows: int) -> tuple[list[str], list[TokenType]]:
    """Texts and types by id: rows that nothing names become [PADn], unused."""
    last = max(max(vocab.values(), default=-1), max((token["id"] for token in files.added), default=-1))
    if last >= rows:
        raise ModelError(
            f"the tokenizer in {files.folder} has ids up to {last}, but the embedding has only {rows} rows",
            "The tokenizer belongs to another model, or the embedding was not resized when tokens were added.",
        )
    tokens, types = [f"[PAD{id_}]" for id_ in range(rows)], [TokenType.UNUSED] * rows
    for text, id_ in vocab.items():
        tokens[id_], types[id_] = text, TokenType.NORMAL
    for token in files.added:
        tokens[token["id"]], types[token["id"]] = _added(token)
    return tokens, types


def _added(token: Mapping[str, Any]) -> tuple[str, TokenType]:
    text: str = token["content"]
    if token.get("special") or _looks_special(text):
        return text, TokenType.CONTROL
    # llama.cpp matches these against raw text, where SentencePiece's mark is still a space.
    return text.replace("▁", " "), TokenType.USER_DEFINED


def _looks_special(text: str) -> bool:
    """Tokens that publishers forgot to mark as special; llama.cpp's converter promotes the same ones."""
    return (
        (text.startswith("<|") and text.endswith("|>"))
        or (text.startswith("<｜") and text.endswith("｜>"))
        or (text.startswith("<unused") and text.endswith(">"))
        or text in ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
    )


def _merges(merges: Sequence[str | Sequence[str]]) -> list[str]:
    """Merges as "left right"; a space inside a part takes its byte-level form, as everywhere in such a vocabulary."""
    return [
        merge if isinstance(merge, str) else " ".join(part.replace(" ", chr(ord(" ") + 256)) for part in merge)
        for merge in merges
    ]


# --- SentencePiece BPE --------------------------------------------------------

_ADDED_SCORE = -1000.0
_PAD_SCORE = -10000.0
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


def _sentencepiece(files: TokenizerFiles, rows: int) -> Vocabulary:
    spm = sentencepiece_model.read(files.folder / "tokenizer.model")
    tokens, types = _table(files, {piece.text: id_ for id_, piece in enumerate(spm.pieces)}, rows)
    scores = [_PAD_SCORE] * rows
    added = {token["id"] for token in files.added}
    for id_, piece in enumerate(spm.pieces):
        if id_ not in added:
            types[id_] = TokenType(piece.type)
            tokens[id_] = piece.text
        scores[id_] = piece.score
    for id_ in added:
        scores[id_] = _ADDED_SCORE
    return Vocabulary(
        "llama", tokens, types, scores=scores, add_space_prefix=_space_prefix(files, spm.add_dummy_prefix)
    )


def _byte_fallback(files: TokenizerFiles, rows: int) -> Vocabulary:
    """A SentencePiece BPE of which only tokenizer.json is left: the scores follow from the order of the merges."""
    model = files.tokenizer["model"]
    tokens, types = _table(files, model["vocab"], rows)
    added = {token["id"] for token in files.added}
    merged = _merge_order(model["merges"])
    scores = [_PAD_SCORE] * rows
    for text, id_ in model["vocab"].items():
        if id_ in added:
            scores[id_] = _ADDED_SCORE
            continue
        if _BYTE.fullmatch(text):
            types[id_] = TokenType.BYTE
        elif text == model.get("unk_token"):
            types[id_] = TokenType.UNKNOWN
        # Characters are never the result of a merge; SentencePiece gives them the lowest scores.
        scores[id_] = 0.0 if types[id_] is not TokenType.NORMAL else -float(merged.get(text, len(merged)))
    return Vocabulary("llama", tokens, types, scores=scores, add_space_prefix=_space_prefix(files, None))


def _merge_order(merges: Sequence[str | Sequence[str]]) -> dict[str, int]:
    """Token -> how many other tokens are merged before it."""
    order: dict[str, int] = {}
    for merge in merges:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        order.setdefault(left + right, len(order))
    return order


def _space_prefix(files: TokenizerFiles, dummy_prefix: bool | None) -> bool | None:
    """Whether text gets a space in front; None when that is llama.cpp's default (yes)."""
    said = files.config.get("add_prefix_space")
    if isinstance(said, bool):
        return said
    if dummy_prefix is False:
        return False
    steps = [files.tokenizer.get("normalizer") or {}, files.tokenizer.get("pre_tokenizer") or {}]
    flat = [inner for step in steps for inner in (step.get("normalizers") or step.get("pretokenizers") or [step])]
    prepends = any(
        step.get("type") == "Prepend" or (step.get("type") == "Metaspace" and step.get("prepend_scheme") != "never")
        for step in flat
    )
    return None if prepends or not files.tokenizer else False


def _refuse_duplicates(vocabulary: Vocabulary, folder: Path) -> None:
    seen: dict[str, int] = {}
    for id_, text in enumerate(vocabulary.tokens):
        other = seen.setdefault(text, id_)
        if other != id_:
            raise ModelError(
                f"the tokenizer in {folder} gives the ids {other} and {id_} the same text {text!r}",
                "llama.cpp cannot load such a vocabulary. Remove the token that was added twice.",
            )
