"""Special tokens of a model: their ids, whether BOS and EOS are added to text, and every id that ends an answer."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeft.errors import ModelError

from .gguf_vocab import TokenizerFiles, TokenType, Vocabulary, read_files, read_json

_ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")

_END_BY_NAME = frozenset({
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<end_of_turn>", "<|endoftext|>", "</s>",
    "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>", "<end_of_utterance>", "<eos>",
    "<｜end▁of▁sentence｜>",
})  # fmt: skip
"""Texts that llama.cpp takes for an end of generation whatever the metadata says (`llama-vocab.cpp`)."""

_CONTROL_BY_NAME = _END_BY_NAME | {
    "<PRE>", "<SUF>", "<MID>", "<PAD>", "[PAD]", "<REPO>", "<reponame>", "<turn|>", "<|tool_response>", "[e~[",
    "<fim-prefix>", "<fim-suffix>", "<fim-middle>", "<fim-pad>", "<fim-repo>",
    "<fim_prefix>", "<fim_suffix>", "<fim_middle>", "<fim_pad>",
}  # fmt: skip
"""Texts that llama.cpp reads as control tokens, also where they are ordinary ones."""


@dataclass(frozen=True)
class SpecialTokens:
    ids: Mapping[str, int]
    """Role ("bos", "eos", "eot", …) -> id, as `tokenizer.ggml.<role>_token_id`."""
    add: Mapping[str, bool]
    """"bos" or "eos" -> whether the tokenizer adds it, as `tokenizer.ggml.add_<role>_token`."""
    stop_ids: tuple[int, ...]
    """Every id that ends an answer, EOS first."""
    unmarked: tuple[int, ...]
    """Stop ids that found no place in the file; only edgeft's manifest knows them."""


def read_special_tokens(files: TokenizerFiles, model_config: Mapping[str, Any], tokens: Sequence[str]) -> SpecialTokens:
    """Special tokens of a model folder whose vocabulary is `tokens`.

    Raises:
        ModelError: an id is outside the vocabulary, or nothing says which token ends an answer.
    """
    by_text = {text: id_ for id_, text in enumerate(tokens)}
    add, bos, eos = _from_post_processor(files)
    ids = dict(_ids(files, model_config, by_text, {"bos": bos, "eos": eos}))
    stops = tuple(dict.fromkeys((*_present(ids.get("eos")), *_stop_ids(files.folder, model_config))))
    _check_range({**ids, **{f"stop {id_}": id_ for id_ in stops}}, len(tokens), files.folder)
    if not stops:
        raise ModelError(
            f"nothing in {files.folder} says which token ends an answer",
            "Set eos_token in tokenizer_config.json; llama.cpp would take token 11 for it.",
        )
    ids.setdefault("eos", stops[0])
    unmarked = _place_stops(ids, stops, tokens)
    for role in ("bos", "eos"):
        said = files.config.get(f"add_{role}_token")
        if role not in add and isinstance(said, bool):
            add[role] = said
    # Never left to llama.cpp, whose default depends on the name of the pre-tokenizer. SentencePiece models of
    # these families start with BOS unless something says otherwise.
    add.setdefault("bos", not files.tokenizer)
    return SpecialTokens(ids, add, stops, unmarked)


def without_false_control(vocabulary: Vocabulary, special: SpecialTokens) -> Vocabulary:
    """The vocabulary without ordinary tokens that llama.cpp would take for control tokens because of their text.

    Qwen has such a token, "</s>" (128247). Its own split rules never produce it, but llama.cpp would read "</s>" in
    a prompt as that control token and end an answer there. Its row stays, under a name that no text has.
    """
    if vocabulary.model != "gpt2":
        return vocabulary
    meant = {*special.ids.values(), *special.stop_ids}
    tokens, types = list(vocabulary.tokens), list(vocabulary.types)
    for id_, text in enumerate(vocabulary.tokens):
        if text in _CONTROL_BY_NAME and types[id_] is TokenType.NORMAL and id_ not in meant:
            tokens[id_], types[id_] = f"[PAD{id_}]", TokenType.UNUSED
    return dataclasses.replace(vocabulary, tokens=tokens, types=types)


def stop_token_ids(model_dir: Path) -> tuple[int, ...]:
    """Every id that ends an answer, EOS first: from the tokenizer, generation_config.json and config.json.

    Raises:
        ModelError: the folder has no tokenizer, or a file cannot be read.
    """
    files = read_files(model_dir)
    config = read_json(model_dir / "config.json")
    eos = _named(files, "eos", files.added_ids)
    return tuple(dict.fromkeys((*_present(eos), *_stop_ids(model_dir, config))))


def _present(id_: int | None) -> tuple[int, ...]:
    return () if id_ is None else (id_,)


def _stop_ids(folder: Path, model_config: Mapping[str, Any]) -> Iterator[int]:
    for config in (read_json(folder / "generation_config.json"), model_config):
        said = config.get("eos_token_id")
        yield from (said if isinstance(said, list) else _present(said))


def _ids(
    files: TokenizerFiles, model_config: Mapping[str, Any], by_text: Mapping[str, int], seen: Mapping[str, str | None]
) -> Iterator[tuple[str, int]]:
    """The tokenizer's word counts before the model's: config.json is often left over from the base."""
    for role in _ROLES:
        id_ = _named(files, role, by_text)
        if id_ is None and (text := seen.get(role)):
            id_ = by_text.get(text)
        if id_ is None and isinstance(said := model_config.get(f"{role}_token_id"), int):
            id_ = said
        if id_ is not None:
            yield role, id_


def _named(files: TokenizerFiles, role: str, by_text: Mapping[str, int]) -> int | None:
    token = files.config.get(f"{role}_token")
    text = token.get("content") if isinstance(token, dict) else token
    return by_text.get(text) if isinstance(text, str) else None


def _from_post_processor(files: TokenizerFiles) -> tuple[dict[str, bool], str | None, str | None]:
    """Whether BOS and EOS are added, and their texts, as far as tokenizer.json's post-processor says."""
    node = files.tokenizer.get("post_processor") or {}
    add: dict[str, bool] = {}
    bos = eos = None
    for step in node.get("processors") or [node]:
        if step.get("type") == "ByteLevel":
            add = {"bos": False, "eos": False} | add
        elif step.get("type") == "TemplateProcessing":
            single = step.get("single") or []
            bos, eos = _special(single[:1]), _special(single[1:][-1:])
            add |= {role: True for role, text in (("bos", bos), ("eos", eos)) if text}
            if _special((step.get("pair") or [])[1:-1]):
                # Pairs of texts are for classifiers; nothing here makes one.
                add["sep"] = False
    return add, bos, eos


def _special(part: Sequence[Mapping[str, Any]]) -> str | None:
    return next((node["SpecialToken"]["id"] for node in part if "SpecialToken" in node), None)


def _check_range(ids: Mapping[str, int], size: int, folder: Path) -> None:
    for role, id_ in ids.items():
        if not 0 <= id_ < size:
            raise ModelError(f"{folder}: the {role} token has id {id_}, but the vocabulary has {size} tokens")


def _place_stops(ids: dict[str, int], stops: Iterable[int], tokens: Sequence[str]) -> tuple[int, ...]:
    """Give stop ids that llama.cpp would not recognise the end-of-turn and end-of-message places."""
    missing = [id_ for id_ in stops if id_ != ids["eos"] and tokens[id_] not in _END_BY_NAME]
    for role, id_ in zip(("eot", "eom"), missing, strict=False):
        ids[role] = id_
    return tuple(missing[2:])
