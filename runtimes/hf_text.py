"""The text side of a session on a model whose tokenizer is a Hugging Face `tokenizer.json`."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from edgeft.chat import ChatTemplate, TokenIds
from edgeft.errors import ModelError, UsageError, require
from edgeft.models.text import load_text_side
from edgeft.paths import parse_json


class HfText:
    """Tokens of text, text of tokens, and which tokens end an answer."""

    def __init__(self, folder: Path, *, shown: Path | None = None) -> None:
        """
        Args:
            shown: the file that errors name, when `folder` only holds what was unpacked from it.

        Raises: ModelError when a file is missing or damaged; MissingDependency without `tokenizers`.
        """
        require("tokenizers", "onnx")
        self._folder = shown or folder
        self._side = load_text_side(folder)
        self._tokenizer = self._side.tokenizer
        self._special = {
            token_id for token_id, token in self._tokenizer.get_added_tokens_decoder().items() if token.special
        }
        self._added = set(self._tokenizer.get_added_tokens_decoder())
        self._byte_level = _is_byte_level(folder / "tokenizer.json")
        self._prefix = self._bos()
        self.ends = frozenset(self._tokenizer.token_to_id(text) for text in self._side.eos_tokens) - {None}
        """Ids of the tokens that end an answer."""

    def template(self) -> ChatTemplate:
        """Raises: ModelError when the folder has none."""
        if self._side.template is None:
            raise ModelError(
                f"{self._folder} has no chat template, and edgeft does not guess one",
                "Export the model again from a base that has one, or use a plain-text prompt.",
            )
        return self._side.template

    def tokenize(self, text: str, *, special: bool = False, bos: bool = False) -> TokenIds:
        try:
            text.encode()
        except UnicodeEncodeError as error:  # halves of a surrogate pair: arguments and files that were not UTF-8
            raise UsageError(f"the text is not valid Unicode: {error.reason} at character {error.start}") from error
        self._tokenizer.encode_special_tokens = not special
        tokens: TokenIds = self._tokenizer.encode(text, add_special_tokens=False).ids
        # A template may already have written the token: two of them make a model worse.
        return self._prefix + tokens if bos and tokens[: len(self._prefix)] != self._prefix else tokens

    def _bos(self) -> TokenIds:
        """What the tokenizer itself puts before a text."""
        whole = self._tokenizer.encode("a", add_special_tokens=True).ids
        plain = self._tokenizer.encode("a", add_special_tokens=False).ids
        at = next((at for at in range(len(whole)) if whole[at : at + len(plain)] == plain), 0)
        return list(whole[:at])

    def detokenize(self, tokens: Sequence[int]) -> str:
        return b"".join(self.piece(token) for token in tokens).decode("utf-8", "replace")

    @property
    def size(self) -> int:
        """Tokens of the vocabulary, those added to it included."""
        return int(self._tokenizer.get_vocab_size())

    def spell(self, tokens: Sequence[int]) -> str:
        """The text of tokens with control tokens written out."""
        return b"".join(
            str(self._tokenizer.id_to_token(token)).encode() if token in self._special else self.piece(token)
            for token in tokens
        ).decode("utf-8", "replace")

    def piece(self, token: int) -> bytes:
        """Bytes of one token; a control token has none."""
        text = self._tokenizer.id_to_token(token)
        if text is None or token in self._special:
            return b""
        if token in self._added:
            return str(text).encode()
        return _byte_level_piece(text) if self._byte_level else _sentencepiece_piece(text)


def _is_byte_level(file: Path) -> bool:
    decoder = parse_json(file.read_text(encoding="utf-8")).get("decoder")
    return any(part.get("type") == "ByteLevel" for part in _decoders(decoder))


def _decoders(decoder: Any) -> Iterator[dict[str, Any]]:
    if isinstance(decoder, dict):
        yield decoder
        for part in decoder.get("decoders") or ():
            yield from _decoders(part)


def _byte_level_piece(text: str) -> bytes:
    table = _bytes_of_characters()
    return b"".join(bytes([table[char]]) if char in table else char.encode() for char in text)


def _sentencepiece_piece(text: str) -> bytes:
    """`<0x0A>` is a byte, `▁` a space (SentencePiece's byte fallback and its meta symbol)."""
    if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
        return bytes([int(text[3:5], 16)])
    return text.replace("▁", " ").encode()


@functools.cache
def _bytes_of_characters() -> dict[str, int]:
    """GPT-2's printable stand-ins for bytes: printable Latin-1 stands for itself, the others for 256, 257, …"""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + at): byte for at, byte in enumerate(hidden)}
