"""Finding the calls of tools in what a model writes.

Models write a call as JSON with `name` and `arguments` (or `parameters`): alone, in a list, or between the tags
`<tool_call>` that Hermes, Qwen and SmolLM2 were trained on. Whatever could still become a call is held back; what is
none after all is handed out as text.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from typing import Any

from edgeft.paths import parse_json

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"


class CallReader:
    """Splits a streamed answer into text and calls."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = frozenset(names)
        self._held = ""
        self._begun = False
        self._holding = False

    def push(self, text: str) -> str:
        """The part of the text that cannot belong to a call."""
        if not self._names:
            return text
        self._held += text
        if self._holding:
            return ""
        if not self._begun:
            head = self._held.lstrip()
            if not head or _OPEN.startswith(head[: len(_OPEN)]):
                return ""
            if head[0] in "{[":
                self._holding = True
                return ""
            self._begun = True
        return self._until_tag()

    def _until_tag(self) -> str:
        at = self._held.find(_OPEN)
        if at >= 0:
            self._holding = True
        else:
            at = len(self._held) - _overlap(self._held)
        out, self._held = self._held[:at], self._held[at:]
        return out

    def finish(self) -> tuple[str, list[dict[str, Any]]]:
        """The text that was held back but is no call, and the calls in OpenAI's form."""
        calls = self._calls()
        return ("", calls) if calls else (self._held, [])

    def _calls(self) -> list[dict[str, Any]]:
        values: list[Any] = []
        for part in self._held.split(_OPEN):
            part = part.split(_CLOSE)[0].strip()
            if part:
                try:
                    value = parse_json(part)
                except ValueError:
                    return []
                values += value if isinstance(value, list) else [value]
        calls = [self._call(value) for value in values]
        return [call for call in calls if call] if all(calls) else []

    def _call(self, value: Any) -> dict[str, Any] | None:
        if isinstance(value, dict) and isinstance(value.get("function"), dict):
            value = value["function"]
        if not isinstance(value, dict) or value.get("name") not in self._names:
            return None
        arguments = value.get("arguments", value.get("parameters", {}))
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        identity = f"call_{uuid.uuid4().hex[:24]}"
        return {"id": identity, "type": "function", "function": {"name": value["name"], "arguments": text}}


def _overlap(text: str) -> int:
    """Length of the longest end of `text` that begins the tag."""
    return next((size for size in range(len(_OPEN) - 1, 0, -1) if text.endswith(_OPEN[:size])), 0)
