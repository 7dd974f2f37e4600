"""Example: the canonical form of one training example, and its tokens with the mask of what is learned."""

from __future__ import annotations

from dataclasses import dataclass

from edgeft.chat import Message


@dataclass(frozen=True)
class Example:
    """A conversation that ends with an assistant turn (`messages`), or plain text (`text`), never both."""

    messages: tuple[Message, ...] = ()
    text: str | None = None


@dataclass(frozen=True)
class Preference:
    """Two answers to one conversation, the first preferred."""

    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]


@dataclass(frozen=True)
class Encoded:
    """Token ids of an example and, of the same length, whether each one is learned (and scored)."""

    tokens: list[int]
    learned: list[bool]
