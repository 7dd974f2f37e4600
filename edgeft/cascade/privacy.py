"""What may leave the device, and in which words: rules that keep it here, personal data replaced and put back."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgeft.cascade.settings import PrivacySettings
from edgeft.chat import Message
from edgeft.errors import require

MARK = "local-only"
"""A message with a true member of this name, or a system prompt with [local-only] in it, stays on the device."""

Span = tuple[int, int, str]
"""Begin, end and kind of what is replaced."""


class Guard:
    """Rules and a finder of personal data.

    Raises:
        MissingDependency: personal data is to be replaced and the library that finds it is not installed.
    """

    def __init__(self, settings: PrivacySettings) -> None:
        self._rules = [(f"rule {number}", re.compile(text)) for number, text in enumerate(settings.local_only, 1)]
        self._rules += [(f"topic {word!r}", _whole_word(word)) for word in settings.topics]
        self._secrets = [re.compile(text) for text in settings.secrets]
        self._library = _library_finder() if settings.redact else None

    def pinned(self, messages: Sequence[Message]) -> str:
        """Why a conversation may not leave the device; "" when it may."""
        for message in messages:
            text = "\n".join(_strings(dict(message)))
            if message.get(MARK) or message.get("local_only"):
                return "marked local-only"
            if message.get("role") == "system" and f"[{MARK}]" in text:
                return "the system prompt says local-only"
            for name, pattern in self._rules:
                if pattern.search(text):
                    return name
        return ""

    def redaction(self) -> Redaction:
        """The replacements of one conversation."""
        return Redaction(self._find)

    def _find(self, text: str) -> list[Span]:
        spans = [(*match.span(), "SECRET") for pattern in self._secrets for match in pattern.finditer(text)]
        return spans + (self._library(text) if self._library else [])


@dataclass(frozen=True)
class Leaving:
    """What of a text would leave the device."""

    pinned: str
    """Why nothing would; "" when it may."""
    text: str
    """As it would be sent; "" when it stays."""
    replaced: Mapping[str, int]
    """Kind of personal data -> how many different ones."""


def leaving(guard: Guard, text: str) -> Leaving:
    """What would leave the device of a message of a user."""
    message: Message = {"role": "user", "content": text}
    if why := guard.pinned([message]):
        return Leaving(why, "", {})
    redaction = guard.redaction()
    sent = redaction.messages([message])[0]
    return Leaving("", str(sent["content"]), redaction.counts)


def _whole_word(word: str) -> re.Pattern[str]:
    return re.compile(rf"(?<!\w){re.escape(word)}(?!\w)", re.IGNORECASE)


def _library_finder() -> Callable[[str], list[Span]]:
    import os

    from edgeft.data.pii import ENTITIES

    os.environ["DATAFOG_NO_TELEMETRY"] = "1"
    scan = require("datafog", "pii").scan

    def find(text: str) -> list[Span]:
        found = scan(text, engine="regex", entity_types=list(ENTITIES), locales=["de"]).entities
        return [(entity.start, entity.end, str(entity.type)) for entity in found]

    return find


class Redaction:
    """Personal data of one conversation, each under a name such as [EMAIL_1], the same wherever it occurs."""

    def __init__(self, find: Callable[[str], list[Span]]) -> None:
        self._find = find
        self._names: dict[str, str] = {}
        """Original -> name."""
        self._kinds: Counter[str] = Counter()
        self._taken = ""

    @property
    def counts(self) -> Mapping[str, int]:
        return dict(self._kinds)

    def messages(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        """The conversation as it may be sent; marks of the privacy rules are left out."""
        self._taken = "\n".join(text for message in messages for text in _strings(dict(message)))
        for text in _strings([dict(message) for message in messages]):
            self.text(text)  # every name is known before the first is used
        plain = [{name: value for name, value in each.items() if name not in (MARK, "local_only")} for each in messages]
        return [{name: _deep(value, self.text) for name, value in each.items()} for each in plain]

    def text(self, text: str) -> str:
        """A text without personal data: again until a search finds none, since what touches may hide it."""
        for original, name in sorted(self._names.items(), key=lambda item: -len(item[0])):
            text = text.replace(original, name)
        for _ in range(8):
            spans = _apart([span for span in self._find(text) if not self._is_name(text, span)])
            if not spans:
                return text
            for begin, end, kind in reversed(spans):
                text = text[:begin] + self._name(text[begin:end], kind) + text[end:]
        return text

    def _is_name(self, text: str, span: Span) -> bool:
        return text[span[0] : span[1]] in self._names.values()

    def _name(self, original: str, kind: str) -> str:
        if original not in self._names:
            while True:
                self._kinds[kind] += 1
                name = f"[{kind}_{self._kinds[kind]}]"
                if name not in self._taken:
                    break
            self._names[original] = name
        return self._names[original]

    def restorer(self) -> Restorer:
        return Restorer({name: original for original, name in self._names.items()})


def _apart(spans: list[Span]) -> list[Span]:
    """Spans in order; where two overlap, they become one."""
    merged: list[Span] = []
    for begin, end, kind in sorted(spans):
        if merged and begin < merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]), merged[-1][2])
        elif end > begin:
            merged.append((begin, end, kind))
    return merged


class Restorer:
    """Puts the originals back into a stream; holds back only what may be the beginning of a name."""

    def __init__(self, originals: Mapping[str, str]) -> None:
        self._originals = originals
        self._longest = max(map(len, originals), default=0)
        self._pattern = re.compile("|".join(map(re.escape, originals))) if originals else None
        self._held = ""

    def push(self, text: str) -> str:
        if self._pattern is None:
            return text
        text = self._held + text
        text, self._held = self._split(text)
        return self._restore(text)

    def flush(self) -> str:
        text, self._held = self._held, ""
        return self._restore(text)

    def _restore(self, text: str) -> str:
        return self._pattern.sub(lambda match: self._originals[match.group()], text) if self._pattern else text

    def _split(self, text: str) -> tuple[str, str]:
        start = max(len(text) - self._longest + 1, 0)
        while (start := text.find("[", start)) >= 0:
            if any(name.startswith(text[start:]) and name != text[start:] for name in self._originals):
                return text[:start], text[start:]
            start += 1
        return text, ""


def _strings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        return [text for entry in value.values() for text in _strings(entry)]
    if isinstance(value, (list, tuple)):
        return [text for entry in value for text in _strings(entry)]
    return []


def _deep(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {name: _deep(entry, change) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_deep(entry, change) for entry in value]
    return value
