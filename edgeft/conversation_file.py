"""A conversation as a file that says how it was made: Markdown to read, JSON to use, JSONL to train on."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from edgeft.chat import SAMPLING, Sampling
from edgeft.history import Conversation, StoredConversation, StoredMessage
from edgeft.paths import write_text

_CODE = re.compile(r"^ {0,3}(```+|~~~+)[^\n]*\n(.*?)(?:^ {0,3}\1|\Z)", re.DOTALL | re.MULTILINE)


def write_conversation(conversation: Conversation | StoredConversation, file: Path) -> None:
    """As the ending says: .jsonl and .json are data that `edgeft train` takes, .json with all parameters besides.

    Raises: WriteError.
    """
    kind = file.suffix.lower()
    if kind == ".jsonl":
        text = json.dumps({"messages": _plain(conversation)}, ensure_ascii=False) + "\n"
    elif kind == ".json":
        text = json.dumps([as_json(conversation)], ensure_ascii=False, indent=2) + "\n"
    else:
        text = as_markdown(conversation)
    write_text(file, text)


def as_json(conversation: Conversation | StoredConversation) -> dict[str, Any]:
    """ "messages" as data is, and under "edgeft" what each message was made with."""
    head = {name: getattr(conversation, name) for name in ("id", "model", "runtime", "system")}
    details = [_details(one) for one in conversation.messages]
    return {"messages": _plain(conversation), "edgeft": {**head, "messages": details}}


def as_markdown(conversation: Conversation | StoredConversation) -> str:
    """What was said, with who said it, when, and what one needs to know to repeat it where that changes."""
    head = {"model": conversation.model, "runtime": conversation.runtime, "system": conversation.system}
    lines = [*(f"* {name}: {value}" for name, value in head.items() if value), ""]
    return "\n".join([*lines, *_sections(conversation.messages)])


def made_with(sampling: Sampling, adapters: Sequence[tuple[str, float]]) -> dict[str, Any]:
    """What the history keeps of how an answer is made."""
    values = {name: getattr(sampling, name.replace("-", "_")) for name in SAMPLING}
    return {"sampling": values, **({"adapters": [list(one) for one in adapters]} if adapters else {})}


def route_of(session: object) -> dict[str, Any] | None:
    """Who wrote the last answer of a cascade, why, and what it cost; None of a model."""
    record = getattr(session, "record", None)
    if record is None:
        return None
    kept = ("author", "authors", "reason", "cost", "left_device", "redacted", "cached", "error")
    attempts = [attempt.outcome for attempt in record.attempts]
    currency = session.cascade.settings.budget.currency  # type: ignore[attr-defined]
    return {**{name: getattr(record, name) for name in kept}, "attempts": attempts, "currency": currency}


def said_of(route: Mapping[str, Any]) -> str:
    """Who of a cascade wrote an answer, why, and what it cost."""
    authors = route.get("authors") or [route["author"]]
    who = " and ".join("the device" if author == "local" else author for author in authors)
    parts = [who, route.get("reason", "")]
    if "cost" in route:
        parts.append(f"{route['cost']:.6f} {route['currency']}" if route["cost"] else "free")
        parts.append(_left(route))
    return " · ".join(filter(None, parts))


def code_blocks(text: str) -> list[str]:
    """What is in the fenced code blocks of a Markdown text."""
    return [found.group(2) for found in _CODE.finditer(text)]


def _left(route: Mapping[str, Any]) -> str:
    if not route.get("left_device"):
        return "nothing left the device"
    replaced = sum(route.get("redacted", {}).values())
    return f"sent with {replaced} replaced" if replaced else ""


def _plain(conversation: Conversation | StoredConversation) -> list[dict[str, str]]:
    system = [{"role": "system", "content": conversation.system}] if conversation.system else []
    return [*system, *({"role": one.role, "content": one.content} for one in conversation.messages)]


def _details(one: StoredMessage) -> dict[str, Any]:
    told = {"role": one.role, "created": one.created, "state": one.state, "usage": one.usage, **(one.made or {})}
    return {name: value for name, value in told.items() if value is not None}


def _sections(messages: Iterable[StoredMessage]) -> Iterator[str]:
    before = ""
    for one in messages:
        made = one.made or {}
        stopped = "" if one.state == "done" else ", stopped"
        yield f"## {one.role}, {one.created}{stopped}\n"
        if route := made.get("route"):
            yield f"*{said_of(route)}*\n"
        if (how := _how(made)) and how != before:
            yield f"*{how}*\n"
            before = how
        yield one.content + "\n"


def _how(made: Mapping[str, Any]) -> str:
    values = [f"{name} {value:g}" for name, value in made.get("sampling", {}).items()]
    values += [f"adapter {Path(name).name} x {scale:g}" for name, scale in made.get("adapters", ())]
    return ", ".join(values)
