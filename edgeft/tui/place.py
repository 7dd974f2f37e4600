"""Where one was: kept while the screen is used, so that a lost connection or a killed process loses nothing typed."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgeft.errors import EdgeftError
from edgeft.paths import home, parse_json, write_json


@dataclass(frozen=True)
class ChatPlace:
    """A conversation on the screen."""

    model: str
    adapters: tuple[tuple[str, float], ...] = ()
    """Files and scales."""
    conversation: int | None = None
    """Its number in the history; None while nothing was said."""
    draft: str = ""
    """Typed and not sent."""
    against: str = ""
    """The model beside it, if there is one."""
    other: int | None = None
    """That model's conversation."""
    by: str = "policy"
    """Who of a cascade is to answer."""


def remembered() -> Mapping[str, Any]:
    """What `remember` kept; nothing where it cannot be read."""
    try:
        value = parse_json(_file().read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def remember(**values: object) -> None:
    """Keep values by name; None forgets one. A full disk does not end the screen."""
    kept = {name: value for name, value in {**remembered(), **values}.items() if value is not None}
    with contextlib.suppress(EdgeftError):
        write_json(_file(), kept)


def keep_chat(place: ChatPlace) -> None:
    remember(chat=asdict(place))


def leave_chat() -> None:
    """It was left, not cut off."""
    if "chat" in remembered():
        remember(chat=None)


def last_chat() -> ChatPlace | None:
    """The conversation that was on the screen when it was cut off."""
    found = remembered().get("chat")
    try:
        assert isinstance(found, dict)
        return ChatPlace(
            str(found["model"]),
            tuple((str(name), float(scale)) for name, scale in found["adapters"]),
            _number(found["conversation"]),
            str(found["draft"]),
            str(found.get("against", "")),
            _number(found.get("other")),
            str(found.get("by", "policy")),
        )
    except (AssertionError, KeyError, TypeError, ValueError):
        return None


def last_item() -> tuple[str, str] | None:
    """Kind and name of the thing that the cursor was on."""
    found = remembered().get("item")
    return (str(found[0]), str(found[1])) if isinstance(found, list) and len(found) == 2 else None


def _number(value: Any) -> int | None:
    return None if value is None else int(value)


def _file() -> Path:
    return home() / "tui.json"
