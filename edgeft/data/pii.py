"""Personal data in text, found by the datafog library: patterns alone, no model, no network.

Names and addresses need a language model and are not found. Dates and postal codes are left alone: as patterns they are
any number, and numbers are what many data sets are about.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from edgeft.chat import Message
from edgeft.data.example import Example, Preference
from edgeft.errors import require

ENTITIES = ("EMAIL", "PHONE", "SSN", "CREDIT_CARD", "IP_ADDRESS", "DE_IBAN")


class Scrubber:
    """Replaces personal data by its kind in brackets, such as [EMAIL], and counts what it found."""

    def __init__(self) -> None:
        """Raises: MissingDependency."""
        # The library's usage reports are off unless asked for; here nobody can ask.
        os.environ["DATAFOG_NO_TELEMETRY"] = "1"
        self._scan: Callable[..., Any] = require("datafog", "pii").scan
        self.found: Counter[str] = Counter()

    def text(self, text: str) -> str:
        found = self._scan(text, engine="regex", entity_types=list(ENTITIES), locales=["de"]).entities
        for entity in sorted(found, key=lambda entity: entity.start, reverse=True):
            self.found[entity.type] += 1
            text = f"{text[: entity.start]}[{entity.type}]{text[entity.end :]}"
        return text

    def item(self, item: Example | Preference) -> Example | Preference:
        if isinstance(item, Preference):
            return Preference(self._turns(item.prompt), self._turns(item.chosen), self._turns(item.rejected))
        if item.text is not None:
            return replace(item, text=self.text(item.text))
        return replace(item, messages=self._turns(item.messages))

    def _turns(self, messages: tuple[Message, ...]) -> tuple[Message, ...]:
        return tuple(_mapped(message, self.text) for message in messages)


_TEXT_FIELDS = ("content", "reasoning_content", "tool_calls")


def _mapped(message: Message, scrub: Callable[[str], str]) -> Message:
    return {name: _deep(value, scrub) if name in _TEXT_FIELDS else value for name, value in message.items()}


def _deep(value: Any, scrub: Callable[[str], str]) -> Any:
    """Every string inside a value: the arguments of tool calls are objects, or JSON as text."""
    if isinstance(value, str):
        return scrub(value)
    if isinstance(value, list):
        return [_deep(entry, scrub) for entry in value]
    return {name: _deep(entry, scrub) for name, entry in value.items()} if isinstance(value, dict) else value
