"""The six shapes of a record that edgeft reads, and their one canonical form.

messages           {"messages": [{"role", "content"}, …], "tools": […]}
prompt-completion  {"prompt", "completion"}; text becomes one question and one answer, lists of messages stay
instruction        {"instruction", "input", "output"} with optional "system" and "history" (alpaca)
sharegpt           {"conversations": [{"from", "value"}, …], "system"}
text               {"text"}
preference         {"prompt", "chosen", "rejected"}; without "prompt", what both conversations begin with
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from edgeft.chat import Message
from edgeft.data.example import Example, Preference
from edgeft.paths import parse_json

Format = Literal["messages", "prompt-completion", "instruction", "sharegpt", "text", "preference"]
FORMATS: tuple[Format, ...] = ("messages", "prompt-completion", "instruction", "sharegpt", "text", "preference")

_ROLES = frozenset({"system", "developer", "user", "assistant", "tool"})
_SHAREGPT_ROLES = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant",
    "function_call": "assistant", "function": "tool", "observation": "tool",
}  # fmt: skip
_KEPT = ("name", "tool_calls", "tool_call_id", "reasoning_content", "weight")


class BadRecord(Exception):
    """Why a record cannot be used; the reader adds file and line."""


def detect(record: Mapping[str, Any]) -> Format | None:
    """The format of a record by its keys, or None."""
    keys = {key for key, value in record.items() if value is not None}
    return next((found for found, needed in _SIGNATURES if needed <= keys), None)


# First match wins: a preference pair also has a prompt.
_SIGNATURES: tuple[tuple[Format, frozenset[str]], ...] = (
    ("preference", frozenset({"chosen", "rejected"})),
    ("messages", frozenset({"messages"})),
    ("sharegpt", frozenset({"conversations"})),
    ("sharegpt", frozenset({"conversation"})),
    ("prompt-completion", frozenset({"prompt", "completion"})),
    ("prompt-completion", frozenset({"prompt", "response"})),
    ("instruction", frozenset({"instruction", "output"})),
    ("instruction", frozenset({"instruction", "response"})),
    ("text", frozenset({"text"})),
)


def parse(record: Any, as_format: Format | None = None) -> Example | Preference:
    """Canonical form of a record.

    Raises:
        BadRecord: with the reason.
    """
    if not isinstance(record, Mapping):
        raise BadRecord(f"expected an object, found {_kind(record)}")
    chosen = as_format or detect(record)
    if chosen is None:
        keys = ", ".join(sorted(map(str, record))) or "none"
        raise BadRecord(f"no known format has these keys: {keys}")
    return _PARSERS[chosen](record)


def as_record(item: Example | Preference) -> dict[str, Any]:
    """The record that `parse` reads back as this item."""
    if isinstance(item, Preference):
        return {name: list(getattr(item, name)) for name in ("prompt", "chosen", "rejected")}
    if item.text is not None:
        return {"text": item.text}
    record: dict[str, Any] = {"messages": list(item.messages)}
    return {**record, "tools": list(item.tools)} if item.tools else record


def chosen_answer(pair: Preference) -> Example:
    """The preferred conversation of a pair as an ordinary example."""
    return Example((*pair.prompt, *pair.chosen))


# --- One parser per format ------------------------------------------------------------


def _parse_messages(record: Mapping[str, Any]) -> Example:
    messages = _conversation(_decoded(_need(record, "messages")), "messages")
    tools = _decoded(record.get("tools")) or []
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise BadRecord(f'"tools" must be a list of objects, not {_kind(tools)}')
    return Example(_answered(messages), tools=tuple(tools))


def _parse_prompt_completion(record: Mapping[str, Any]) -> Example:
    prompt = _turns(_need(record, "prompt"), "prompt", "user")
    completion = _turns(_need(record, "completion", "response"), "completion", "assistant")
    return Example(_answered((*_system(record), *prompt, *completion)))


def _parse_instruction(record: Mapping[str, Any]) -> Example:
    question = _text(_need(record, "instruction"), "instruction")
    addition = record.get("input")
    if addition is not None and str(addition).strip():
        question += "\n\n" + _text(addition, "input")
    history: list[Message] = []
    for pair in _decoded(record.get("history")) or []:
        if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
            raise BadRecord('"history" must be a list of [question, answer] pairs')
        history += [_message("user", pair[0]), _message("assistant", pair[1])]
    answer = _message("assistant", _need(record, "output", "response"))
    return Example((*_system(record), *history, _message("user", question), answer))


def _parse_sharegpt(record: Mapping[str, Any]) -> Example:
    turns = _decoded(_need(record, "conversations", "conversation"))
    messages = _conversation(turns, "conversations")
    return Example(_answered((*_system(record), *messages)))


def _parse_text(record: Mapping[str, Any]) -> Example:
    return Example(text=_text(_need(record, "text"), "text"))


def _parse_preference(record: Mapping[str, Any]) -> Preference:
    chosen = _turns(_need(record, "chosen"), "chosen", "assistant")
    rejected = _turns(_need(record, "rejected"), "rejected", "assistant")
    if record.get("prompt") is not None:
        prompt = (*_system(record), *_turns(record["prompt"], "prompt", "user"))
    else:
        shared = next((at for at, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), len(chosen))
        prompt, chosen, rejected = (*_system(record), *chosen[:shared]), chosen[shared:], rejected[shared:]
        if not prompt:
            raise BadRecord('"chosen" and "rejected" begin with no common turn, and there is no "prompt"')
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        if not answer:
            raise BadRecord(f'"{name}" adds nothing to the prompt')
        _answered(answer, f'"{name}"')
    if chosen == rejected:
        raise BadRecord('"chosen" and "rejected" are the same')
    return Preference(prompt, chosen, rejected)


_PARSERS: Mapping[Format, Callable[[Mapping[str, Any]], Example | Preference]] = {
    "messages": _parse_messages,
    "prompt-completion": _parse_prompt_completion,
    "instruction": _parse_instruction,
    "sharegpt": _parse_sharegpt,
    "text": _parse_text,
    "preference": _parse_preference,
}


# --- Parts ------------------------------------------------------------------------------


def _need(record: Mapping[str, Any], *names: str) -> Any:
    for name in names:
        if record.get(name) is not None:
            return record[name]
    raise BadRecord(f'"{names[0]}" is missing')


def _decoded(value: Any) -> Any:
    """CSV and Parquet columns may hold lists as JSON text."""
    if not isinstance(value, str):
        return value
    try:
        return parse_json(value)
    except ValueError:
        return value


def _system(record: Mapping[str, Any]) -> tuple[Message, ...]:
    system = record.get("system")
    return (_message("system", system),) if system is not None and str(system).strip() else ()


def _turns(value: Any, name: str, role: str) -> tuple[Message, ...]:
    """Text as one turn of `role`, or a conversation."""
    decoded = _decoded(value)
    if isinstance(decoded, list):
        return _conversation(decoded, name)
    return (_message(role, value, name),)


def _conversation(turns: Any, name: str) -> tuple[Message, ...]:
    if not isinstance(turns, Sequence) or isinstance(turns, str):
        raise BadRecord(f'"{name}" must be a list of turns, not {_kind(turns)}')
    if not turns:
        raise BadRecord(f'"{name}" is empty')
    return tuple(_turn(turn, f"turn {number} of {name}") for number, turn in enumerate(turns, 1))


def _turn(turn: Any, where: str) -> Message:
    if not isinstance(turn, Mapping):
        raise BadRecord(f"{where} is {_kind(turn)}, not an object")
    role = turn.get("role", turn.get("from"))
    role = _SHAREGPT_ROLES.get(role, role) if isinstance(role, str) else role
    if role not in _ROLES:
        raise BadRecord(f"{where} has the role {role!r}; known are {', '.join(sorted(_ROLES))}")
    extra = {name: turn[name] for name in _KEPT if turn.get(name) is not None}
    content = turn.get("content", turn.get("value"))
    if not content and extra.get("tool_calls"):
        return {"role": role, "content": "", **extra}
    return {**_message(role, content, where), **extra}


def _message(role: str, content: Any, where: str | None = None) -> Message:
    return {"role": role, "content": _text(content, where or role)}


def _text(value: Any, where: str) -> str:
    """Text of a field; numbers (CSV reads "42" as text, JSON does not) and lists of text parts are taken as text.

    Raises:
        BadRecord: anything else, blank text, and characters that no tokenizer or UTF-8 file can carry.
    """
    if isinstance(value, list) and all(isinstance(part, Mapping) and part.get("type") == "text" for part in value):
        value = "".join(str(part.get("text", "")) for part in value)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        raise BadRecord(f"{where} must be text, not {_kind(value)}")
    if not value.strip():
        raise BadRecord(f"{where} is empty")
    if "\0" in value:
        raise BadRecord(f"{where} contains a NUL character")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise BadRecord(f"{where} contains half of a surrogate pair, which is not a character") from None
    return value


def _answered(messages: tuple[Message, ...], where: str = "the conversation") -> tuple[Message, ...]:
    if messages[-1]["role"] != "assistant":
        raise BadRecord(f"{where} ends with a {messages[-1]['role']} turn: there is no answer to learn")
    return messages


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "a truth value", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, (int, float)) else type(value).__name__)
