"""OpenAI's requests as work for a model. What would change the answer and cannot be done is refused, never ignored."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from edgeft.chat import Sampling
from edgeft.serve.work import Failed, Work

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
_TOP_LOGPROBS = 20
_STOPS = 4
MANY = (1 << 31) - 1
"""Largest count a runtime's 32-bit integers hold."""
_NEUTRAL = {"frequency_penalty": (0, None), "presence_penalty": (0, None), "logit_bias": ({}, None), "n": (1, None)}
"""Members of a request that do nothing at these values; at others they are refused."""


@dataclass(frozen=True)
class Asked:
    """A request that was understood."""

    model: str
    work: Work
    stream: bool
    usage_in_stream: bool
    logprobs: int | None
    """Alternatives per token; None: no log-probabilities."""
    user: str | None
    echo: bool = False
    """Legacy completions: the prompt comes before the answer."""


def refuse(param: str, message: str) -> NoReturn:
    raise Failed(400, f"{param}: {message}", param=param)


def chat_request(body: Any, defaults: Sampling) -> Asked:
    """A body of /v1/chat/completions. Raises: Failed with status 400."""
    body = _object(body)
    messages = _messages(body.get("messages"))
    tools, forced = _tools(body)
    schema = _response_schema(body.get("response_format"))
    if forced is not None:
        if schema is not None:
            refuse("tool_choice", "a call that must be made and response_format exclude each other")
        schema = forced
    logprobs = _chat_logprobs(body)
    sampling = _sampling(body, defaults, ("max_completion_tokens", "max_tokens"))
    sampling = replace(sampling, json_schema=schema, top_logprobs=0 if logprobs is None else max(logprobs, 1))
    return _asked(body, Work(sampling, messages=messages, tools=tools), logprobs)


def text_request(body: Any, defaults: Sampling) -> Asked:
    """A body of /v1/completions. Raises: Failed with status 400."""
    body = _object(body)
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1:
        prompt = prompt[0]
    if not isinstance(prompt, str) or not prompt:
        refuse("prompt", "one text that is not empty")
    if body.get("suffix") not in ("", None):
        refuse("suffix", "not supported")
    if _number(body, "best_of", 1, int, 1, 20) != 1:
        refuse("best_of", "only 1 is supported")
    logprobs = _number(body, "logprobs", None, int, 0, 5)
    sampling = _sampling(body, defaults, ("max_tokens",))
    sampling = replace(sampling, top_logprobs=0 if logprobs is None else max(logprobs, 1))
    return replace(_asked(body, Work(sampling, prompt=prompt), logprobs), echo=_flag(body, "echo"))


def _object(body: Any) -> Mapping[str, Any]:
    if not isinstance(body, Mapping):
        raise Failed(400, "the body must be a JSON object")
    for name, neutral in _NEUTRAL.items():
        if name in body and (isinstance(body[name], bool) or body[name] not in neutral):
            refuse(name, f"not supported; only {json.dumps(neutral[0])} is")
    return body


def _asked(body: Mapping[str, Any], work: Work, logprobs: int | None) -> Asked:
    model = body.get("model")
    if not isinstance(model, str) or not model:
        refuse("model", "the name of a model; GET /v1/models lists them")
    options = body.get("stream_options")
    if options is not None and not isinstance(options, Mapping):
        refuse("stream_options", "must be an object")
    user = body.get("user")
    if user is not None and not isinstance(user, str):
        refuse("user", "must be a text")
    in_stream = _flag(options, "include_usage") if options else False
    return Asked(model, work, _flag(body, "stream"), in_stream, logprobs, user)


# --- Sampling -----------------------------------------------------------------


def _sampling(body: Mapping[str, Any], defaults: Sampling, lengths: Sequence[str]) -> Sampling:
    longest = [_number(body, name, None, int, 1, MANY) for name in lengths]
    return replace(
        defaults,
        max_tokens=next((length for length in longest if length), defaults.max_tokens),
        temperature=_number(body, "temperature", defaults.temperature, float, 0, 2),
        top_p=_number(body, "top_p", defaults.top_p, float, 0, 1),
        top_k=_number(body, "top_k", defaults.top_k, int, 0, MANY),
        min_p=_number(body, "min_p", defaults.min_p, float, 0, 1),
        repeat_penalty=_number(body, "repeat_penalty", defaults.repeat_penalty, float, 0, 10),
        seed=_number(body, "seed", defaults.seed, int, -(1 << 63), (1 << 63) - 1) % (1 << 32),
        stop=_stop(body.get("stop")),
    )


def _number(body: Mapping[str, Any], name: str, default: Any, kind: type, least: float, most: float) -> Any:
    value = body.get(name)
    if value is None:
        return default
    if kind is int and isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else int):
        refuse(name, "must be a number" if kind is float else "must be a whole number")
    if not least <= value <= most:
        refuse(name, f"must be from {least:g} to {most:g}")
    return kind(value)


def _flag(body: Mapping[str, Any], name: str) -> bool:
    value = body.get(name)
    if value not in (True, False, None) or (isinstance(value, (int, float)) and not isinstance(value, bool)):
        refuse(name, "must be true or false")
    return bool(value)


def _stop(value: Any) -> tuple[str, ...]:
    stops = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or len(stops) > _STOPS or not all(isinstance(stop, str) and stop for stop in stops):
        refuse("stop", f"a text, or at most {_STOPS} of them; none empty")
    return tuple(stops)


def _chat_logprobs(body: Mapping[str, Any]) -> int | None:
    top = _number(body, "top_logprobs", None, int, 0, _TOP_LOGPROBS)
    if not _flag(body, "logprobs"):
        if top:
            refuse("top_logprobs", "needs logprobs: true")
        return None
    return top or 0


# --- Messages -----------------------------------------------------------------


def _messages(value: Any) -> tuple[dict[str, Any], ...]:
    if not isinstance(value, list) or not value:
        refuse("messages", "at least one message")
    return tuple(_message(message, f"messages[{index}]") for index, message in enumerate(value))


def _message(message: Any, place: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        refuse(place, "must be an object")
    role = message.get("role")
    if role not in ROLES:
        refuse(f"{place}.role", f"one of {', '.join(ROLES)}")
    calls = message.get("tool_calls")
    plain: dict[str, Any] = {"role": _as_templates_say(role), "content": _content(message.get("content"), place, calls)}
    if calls:
        plain["tool_calls"] = _calls(calls, place)
    for name in ("name", "tool_call_id"):
        if isinstance(message.get(name), str):
            plain[name] = message[name]
    return plain


def _as_templates_say(role: str) -> str:
    return {"developer": "system", "function": "tool"}.get(role, role)


def _content(content: Any, place: str, calls: Any) -> str:
    """Text of a message; text parts are put together. Pictures and sound are refused."""
    if isinstance(content, str):
        return content
    if content is None and calls:
        return ""
    if not isinstance(content, list) or not content:
        refuse(f"{place}.content", "a text, or text parts")
    texts = []
    for part in content:
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            refuse(f"{place}.content", "only parts of type text are supported")
        texts.append(part["text"])
    return "".join(texts)


def _calls(calls: Any, place: str) -> list[dict[str, Any]]:
    """An assistant's earlier calls, with arguments as objects: templates write them with `tojson`."""
    if not isinstance(calls, list):
        refuse(f"{place}.tool_calls", "must be a list")
    plain = []
    for call in calls:
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            refuse(f"{place}.tool_calls", "each needs function.name")
        try:
            arguments = json.loads(function.get("arguments") or "{}")
        except (TypeError, ValueError, RecursionError):
            refuse(f"{place}.tool_calls", "function.arguments must be a text of JSON")
        plain.append(
            {"id": call.get("id"), "type": "function", "function": {"name": function["name"], "arguments": arguments}}
        )
    return plain


# --- Shapes of the answer -----------------------------------------------------


def _tools(body: Mapping[str, Any]) -> tuple[tuple[Mapping[str, Any], ...], Mapping[str, Any] | None]:
    """The tools that may be called, and the schema of the answer when one must be."""
    tools, choice = body.get("tools"), body.get("tool_choice")
    if tools is not None and not isinstance(tools, list):
        refuse("tools", "must be a list")
    for index, tool in enumerate(tools or ()):
        function = tool.get("function") if isinstance(tool, Mapping) and tool.get("type") == "function" else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
            refuse(f"tools[{index}]", "must have type function and function.name")
        if not isinstance(function.get("parameters", {}), Mapping):
            refuse(f"tools[{index}]", "function.parameters must be a JSON schema")
    if choice in (None, "auto"):
        return tuple(tools or ()), None
    if choice == "none":
        return (), None
    if not tools:
        refuse("tool_choice", "there are no tools")
    if choice == "required":
        return tuple(tools), _call_schema(tools)
    name = choice.get("function") if isinstance(choice, Mapping) and choice.get("type") == "function" else None
    name = name.get("name") if isinstance(name, Mapping) else None
    chosen = [tool for tool in tools if tool["function"]["name"] == name]
    if not chosen:
        refuse("tool_choice", 'none, auto, required, or {"type": "function", "function": {"name": one of the tools}}')
    return tuple(tools), _call_schema(chosen)


def _call_schema(tools: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """A call of one of the tools, as JSON schema. References inside parameters are lifted to its root."""
    branches, shared = [], {}
    for tool in tools:
        function = tool["function"]
        parameters = dict(function.get("parameters") or {"type": "object", "properties": {}})
        shared.update(parameters.pop("$defs", {}))
        branches.append(
            {
                "type": "object",
                "properties": {"name": {"const": function["name"]}, "arguments": parameters},
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
        )
    schema: dict[str, Any] = branches[0] if len(branches) == 1 else {"anyOf": branches}
    return {**schema, "$defs": shared} if shared else schema


def _response_schema(value: Any) -> Mapping[str, Any] | None:
    if value is None:
        return None
    kind = value.get("type") if isinstance(value, Mapping) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return {"type": "object"}
    inner = value.get("json_schema") if kind == "json_schema" else None
    schema = inner.get("schema") if isinstance(inner, Mapping) else None
    if not isinstance(schema, Mapping):
        refuse("response_format", "type text, json_object, or json_schema with json_schema.schema")
    return schema
