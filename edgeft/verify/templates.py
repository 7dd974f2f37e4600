"""Chat-template parity: the text the file's template writes, against the template that was trained with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from edgeft.chat import ChatTemplate, Message
from edgeft.errors import ModelError
from edgeft.verify.report import Finding

_SYSTEM = {"role": "system", "content": "You are brief.\nAnswer in one line."}
_ASK = {"role": "user", "content": "Turn on the lights"}
_ODD = {"role": "user", "content": "  é 👍 <|im_end|> {{ 7 * 7 }} {% raw %} 'x' \"y\"\n\n"}
_REPLY = {"role": "assistant", "content": '{"device": "light", "value": 40}'}
_CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "set", "arguments": {"room": "kitchen", "on": True}}}],
}
_RESULT = {"role": "tool", "name": "set", "content": '{"ok": true}'}

TOOLS: Sequence[Mapping[str, Any]] = (
    {
        "type": "function",
        "function": {
            "name": "set",
            "description": "Set a device <now> & here",
            "parameters": {"type": "object", "properties": {"room": {"type": "string"}}},
        },
    },
)

CASES: Mapping[str, Sequence[Message]] = {
    "user": (_ASK,),
    "system and user": (_SYSTEM, _ASK),
    "two turns": (_SYSTEM, _ASK, _REPLY, _ASK),
    "finished": (_ASK, _REPLY),
    "odd characters": (_SYSTEM, _ODD, _REPLY, _ODD),
    "tool call": (_SYSTEM, _ASK, _CALL, _RESULT),
}


def _rendered(template: ChatTemplate, messages: Sequence[Message], tools: bool) -> str | None:
    """The text, or None where the template refuses such a conversation."""
    prompt = messages[-1]["role"] != "assistant"
    try:
        return template.render(messages, add_generation_prompt=prompt, tools=TOOLS if tools else None)
    except ModelError:
        return None


def check_template(trained: ChatTemplate | None, file: ChatTemplate | None) -> Finding:
    """Render the same conversations with both templates; the text must be the same, byte for byte."""
    if trained is None or file is None:
        if trained is file:
            return Finding("template", True, "neither the model nor the file has a chat template", skipped=True)
        lacking = "the model" if trained is None else "the file"
        return Finding("template", False, f"{lacking} has no chat template, the other one has")
    parted, refused = [], 0
    for name, messages in CASES.items():
        for tools in (False, True):
            expected = _rendered(trained, messages, tools)
            refused += expected is None
            if expected != _rendered(file, messages, tools):
                parted.append(f"{name}{' with tools' if tools else ''}")
    if refused == 2 * len(CASES):
        return Finding("template", False, "the model's own template renders no conversation at all")
    if parted:
        return Finding(
            "template", False, f"the file's template writes other text for: {', '.join(parted)}", len(parted), 0
        )
    same = "the same template" if trained.source == file.source else "another template that writes the same text"
    return Finding("template", True, f"{same}; {2 * len(CASES)} conversations compared", 0, 0)
