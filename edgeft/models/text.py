"""The text side of a Hugging Face directory: tokenizer, chat template and end tokens, without transformers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeft.chat import ChatTemplate
from edgeft.errors import ModelError, require
from edgeft.paths import parse_json


@dataclass(frozen=True)
class TextSide:
    """How a model reads and writes text."""

    folder: Path
    tokenizer: Any
    """A `tokenizers.Tokenizer`."""
    template: ChatTemplate | None
    eos_tokens: tuple[str, ...]
    """Text of every token that ends a turn, the tokenizer's own EOS first."""

    def tokenize(self, text: str) -> list[int]:
        """Token ids; special tokens in the text are recognised, none is added."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def need_template(self) -> ChatTemplate:
        """Raises: ModelError when the model has no chat template."""
        if self.template is None:
            raise ModelError(
                f"{self.folder} has no chat template",
                "Use a model with one (an instruct model), or add chat_template.jinja to the folder.",
            )
        return self.template


def load_text_side(folder: Path, chat_template: str | None = None) -> TextSide:
    """Read tokenizer.json, the chat template and every end token of a model.

    Args:
        chat_template: used instead of the model's own.

    Raises:
        ModelError: no tokenizer.json, or a file that cannot be read.
    """
    tokenizers = require("tokenizers", "export")
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise ModelError(f"{folder} has no tokenizer.json", "edgeft needs the fast tokenizer's file.")
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises bare Exception for whatever it cannot parse
        raise ModelError(f"{file} cannot be read: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    settings = read_object(folder / "tokenizer_config.json")
    source = chat_template or own_template(folder)
    bos, eos = _token(settings.get("bos_token")), _token(settings.get("eos_token"))
    template = ChatTemplate(source, bos, eos) if source else None
    ends = dict.fromkeys(token for token in (eos, *_generation_ends(folder, tokenizer)) if token)
    return TextSide(folder, tokenizer, template, tuple(ends))


def own_template(folder: Path) -> str | None:
    """The chat template of a directory: chat_template.jinja, or the older place in tokenizer_config.json."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return read_template(file)
    template = read_object(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(template, list):
        named = {entry["name"]: entry["template"] for entry in template}
        template = named.get("default")
    return template if isinstance(template, str) else None


def read_template(file: Path) -> str:
    """Raises: ModelError when it cannot be read."""
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{file} cannot be read: {error}", "Save it as UTF-8.") from error


def _generation_ends(folder: Path, tokenizer: Any) -> Iterator[str]:
    """Ends that only generation_config.json or config.json name (Llama 3: <|eom_id|>, <|eot_id|>)."""
    for name in ("generation_config.json", "config.json"):
        ids = read_object(folder / name).get("eos_token_id")
        for token in ids if isinstance(ids, list) else [ids]:
            if isinstance(token, int) and 0 <= token < 1 << 32 and (text := tokenizer.id_to_token(token)) is not None:
                yield text


def _token(value: Any) -> str:
    """A special token as it may be written: a string, an object with `content`, or null."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else ""


def read_object(file: Path) -> dict[str, Any]:
    """A JSON object; {} when there is no such file. Raises: ModelError."""
    if not file.is_file():
        return {}
    try:
        content = parse_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{file} is not a JSON object")
    return content
