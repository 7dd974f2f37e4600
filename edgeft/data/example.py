"""Example: the canonical form of one training example, and its tokens with the mask of what is learned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from edgeft.chat import Message

Note = Literal["history-rewritten", "generation-prompt-rewritten", "end-token-added", "turns-cut"]
"""What encoding had to do with an example, when it was not the plain case; explained in edgeft.data.encode."""


@dataclass(frozen=True)
class Example:
    """A conversation that ends with an assistant turn (`messages`), or plain text (`text`), never both."""

    messages: tuple[Message, ...] = ()
    text: str | None = None
    tools: tuple[Mapping[str, Any], ...] = ()
    """Tool definitions the conversation's template is told about."""


@dataclass(frozen=True)
class Preference:
    """Two answers to one conversation, the first preferred."""

    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]


@dataclass(frozen=True)
class Encoded:
    """Token ids of an example and, of the same length, whether each one is learned (and scored).

    A token is predicted from those before it: the first token of plain text is marked, but nothing can score it.
    """

    tokens: list[int]
    learned: list[bool]
    notes: tuple[Note, ...] = ()
