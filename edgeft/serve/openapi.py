"""The server's own description, OpenAPI 3.1, at /openapi.json. It says what is there: tests hold the server to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from edgeft import __version__
from edgeft.serve.requests import MANY

Schema = dict[str, Any]


def _object(required: tuple[str, ...] = (), **properties: Schema) -> Schema:
    return {"type": "object", "properties": properties, "required": list(required)}


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _number(least: float, most: float, text: str = "") -> Schema:
    return {"type": ["number", "null"], "minimum": least, "maximum": most, **({"description": text} if text else {})}


def _whole(least: int, most: int, text: str = "") -> Schema:
    return {**_number(least, most, text), "type": ["integer", "null"]}


def _either(*schemas: Schema) -> Schema:
    return {"anyOf": list(schemas)}


def _list(items: Schema, **more: Any) -> Schema:
    return {"type": "array", "items": items, **more}


_TEXT: Schema = {"type": "string"}
_SOME_TEXT: Schema = {"type": "string", "minLength": 1}
_NULL: Schema = {"type": "null"}
_FLAG: Schema = {"type": ["boolean", "null"]}
_ANY: Schema = {"type": "object"}
_COUNT: Schema = {"type": "integer", "minimum": 0}
_FINISH: Schema = {"type": ["string", "null"], "enum": ["stop", "length", "tool_calls", None]}

_SAMPLING: dict[str, Schema] = {
    "temperature": _number(0, 2, "0 is greedy; default: the server's."),
    "top_p": _number(0, 1),
    "top_k": _whole(0, MANY, "Not OpenAI's."),
    "min_p": _number(0, 1, "Not OpenAI's."),
    "repeat_penalty": _number(0, 10, "Not OpenAI's."),
    "seed": _whole(-(1 << 63), (1 << 63) - 1),
    "max_tokens": _whole(1, MANY),
    "stop": _either(_SOME_TEXT, _list(_SOME_TEXT, maxItems=4), _NULL),
    "n": {"enum": [1, None]},
    "frequency_penalty": {"enum": [0, None]},
    "presence_penalty": {"enum": [0, None]},
    "logit_bias": {"enum": [{}, None]},
    "stream": _FLAG,
    "stream_options": {"type": ["object", "null"], "properties": {"include_usage": _FLAG}},
    "user": {"type": ["string", "null"], "description": "Whose side of a split is kept."},
}

_CALL = _object(
    ("id", "type", "function"),
    id=_TEXT,
    type={"const": "function"},
    function=_object(("name", "arguments"), name=_TEXT, arguments={"type": "string", "description": "JSON."}),
)
_PARTS = _list(_object(("type", "text"), type={"const": "text"}, text=_TEXT), minItems=1)


def _message(roles: tuple[str, ...]) -> Schema:
    return _object(("role", "content"), role={"enum": list(roles)}, content=_either(_TEXT, _PARTS))


_MESSAGE = _either(
    _message(("system", "developer", "user", "assistant")),
    {**_message(("tool",)), "properties": {**_message(("tool",))["properties"], "tool_call_id": _TEXT}},
    _object(
        ("role", "tool_calls"),
        role={"const": "assistant"},
        content=_either(_TEXT, _PARTS, _NULL),
        tool_calls=_list(_CALL, minItems=1),
    ),
)
_TOOL = _object(
    ("type", "function"),
    type={"const": "function"},
    function=_object(("name",), name=_SOME_TEXT, description=_TEXT, parameters=_ANY),
)
_FORMAT = _either(
    _object(("type",), type={"enum": ["text", "json_object"]}),
    _object(("type", "json_schema"), type={"const": "json_schema"}, json_schema=_object(("schema",), schema=_ANY)),
    _NULL,
)
_CHOICE = _either(
    {"enum": ["none", "auto", "required", None]},
    _object(("type", "function"), type={"const": "function"}, function=_object(("name",), name=_SOME_TEXT)),
)

_TOKEN: dict[str, Schema] = {
    "token": _TEXT,
    "logprob": {"type": "number"},
    "bytes": {"type": ["array", "null"], "items": {"type": "integer", "minimum": 0, "maximum": 255}},
}
_LOGPROBS = _either(
    _NULL,
    _object(
        ("content",),
        content=_list(_object(tuple(_TOKEN), **_TOKEN, top_logprobs=_list(_object(tuple(_TOKEN), **_TOKEN)))),
    ),
)
_TEXT_LOGPROBS = _either(
    _NULL,
    _object(
        ("tokens", "token_logprobs", "top_logprobs", "text_offset"),
        tokens=_list(_TEXT),
        token_logprobs=_list({"type": "number"}),
        top_logprobs=_list(_ANY),
        text_offset=_list(_COUNT),
    ),
)
_FRAME: dict[str, Schema] = {"id": _TEXT, "created": {"type": "integer"}, "model": _TEXT}


def _answer(kind: str, choice: Schema) -> Schema:
    members = {**_FRAME, "object": {"const": kind}, "choices": _list(choice, minItems=1), "usage": _ref("Usage")}
    return _object(tuple(members), **members)


SCHEMAS: dict[str, Schema] = {
    "ChatRequest": _object(
        ("model", "messages"),
        model=_ref("Name"),
        messages=_list(_MESSAGE, minItems=1),
        tools=_either(_list(_TOOL), _NULL),
        tool_choice=_CHOICE,
        response_format=_FORMAT,
        max_completion_tokens=_whole(1, MANY),
        logprobs=_FLAG,
        top_logprobs=_whole(0, 20, "Needs logprobs."),
        **_SAMPLING,
    ),
    "TextRequest": _object(
        ("model", "prompt"),
        model=_ref("Name"),
        prompt=_either(_SOME_TEXT, _list(_SOME_TEXT, minItems=1, maxItems=1)),
        echo=_FLAG,
        best_of={"enum": [1, None]},
        logprobs=_whole(0, 5),
        suffix={"enum": ["", None]},
        **_SAMPLING,
    ),
    "EmbeddingRequest": _object(("model", "input"), model=_ref("Name"), input=_either(_TEXT, _list(_TEXT))),
    "Feedback": _object(
        ("id", "rating"), id=_TEXT, rating={"enum": ["up", "down"]}, comment={"type": ["string", "null"]}
    ),
    "Rated": _object(("id", "rating"), id=_TEXT, rating={"enum": ["up", "down"]}),
    "Usage": _object(
        ("prompt_tokens", "completion_tokens", "total_tokens"),
        prompt_tokens=_COUNT,
        completion_tokens=_COUNT,
        total_tokens=_COUNT,
        prompt_tokens_details=_object(("cached_tokens",), cached_tokens=_COUNT),
    ),
    "ChatAnswer": _answer(
        "chat.completion",
        _object(
            ("index", "message", "finish_reason"),
            index=_COUNT,
            message=_object(
                ("role", "content"),
                role={"const": "assistant"},
                content={"type": ["string", "null"]},
                refusal=_NULL,
                tool_calls=_list(_CALL),
            ),
            logprobs=_LOGPROBS,
            finish_reason=_FINISH,
        ),
    ),
    "TextAnswer": _answer(
        "text_completion",
        _object(
            ("index", "text", "finish_reason"), index=_COUNT, text=_TEXT, logprobs=_TEXT_LOGPROBS, finish_reason=_FINISH
        ),
    ),
    "Model": _object(
        ("id", "object", "created", "owned_by"),
        id=_TEXT,
        object={"const": "model"},
        created={"type": "integer"},
        owned_by=_TEXT,
    ),
    "Models": _object(("object", "data"), object={"const": "list"}, data=_list(_ref("Model"))),
    "Health": _object(("status",), status={"enum": ["ok", "loading"]}),
    "Error": _object(
        ("error",),
        error=_object(
            ("message", "type", "param", "code"),
            message=_TEXT,
            type=_TEXT,
            param={"type": ["string", "null"]},
            code={"type": ["string", "null"]},
        ),
    ),
}

_ERRORS = {
    400: "A request that cannot be done; `param` says which member",
    401: "No key, or a wrong one",
    403: "Without keys the server answers under loopback names only",
    404: "No such model or answer, or nothing here can do this",
    408: "The request came too slowly",
    413: "The request is too long",
    415: "The body is not application/json",
    429: "Too many wait, or this key asks too often; Retry-After says when to come back",
    499: "The client went away",
    500: "The model's process ended, or a fault in the server",
    503: "The model is being loaded, or the server is shutting down",
    504: "The answer took too long",
}
_ASKING = (400, 401, 403, 404, 408, 413, 415, 429, 499, 500, 503, 504)
_LOOKING = (401, 403, 500)


def _json(schema: Schema, text: str) -> dict[str, Any]:
    return {"description": text, "content": {"application/json": {"schema": schema}}}


def _responses(statuses: tuple[int, ...], **good: Any) -> dict[str, Any]:
    errors = {str(status): _json(_ref("Error"), _ERRORS[status]) for status in statuses}
    return {**{name.removeprefix("s"): value for name, value in good.items()}, **errors}


def _asks(summary: str, request: str, answer: dict[str, Any], statuses: tuple[int, ...] = _ASKING) -> dict[str, Any]:
    body = {"required": True, "content": {"application/json": {"schema": _ref(request)}}}
    return {"post": {"summary": summary, "requestBody": body, "responses": _responses(statuses, **answer)}}


def _looks(summary: str, answer: dict[str, Any], statuses: tuple[int, ...] = _LOOKING, **more: Any) -> dict[str, Any]:
    return {"get": {"summary": summary, "responses": _responses(statuses, **answer), **more}}


def _streamed(schema: str, text: str) -> dict[str, Any]:
    good = _json(_ref(schema), text)
    # No schema: in OpenAPI 3.1 it is that of the whole text, and readers take it for that of every event.
    good["content"]["text/event-stream"] = {}
    return good


def _paths() -> Mapping[str, Any]:
    name = {"name": "model", "in": "path", "required": True, "schema": _ref("Name")}
    page = {"description": "Prometheus text", "content": {"text/plain": {"schema": _TEXT}}}
    return {
        "/v1/chat/completions": _asks(
            "Answer a conversation", "ChatRequest", {"s200": _streamed("ChatAnswer", "The answer, whole or in events")}
        ),
        "/v1/completions": _asks(
            "Go on with a text", "TextRequest", {"s200": _streamed("TextAnswer", "The text, whole or in events")}
        ),
        "/v1/embeddings": _asks("Embeddings, where a runtime makes them", "EmbeddingRequest", {}),
        "/v1/feedback": _asks(
            "Say whether an answer was good", "Feedback", {"s200": _json(_ref("Rated"), "Stored beside the request")}
        ),
        "/v1/models": _looks("What can be asked", {"s200": _json(_ref("Models"), "All names")}),
        "/v1/models/{model}": _looks(
            "One of them", {"s200": _json(_ref("Model"), "It is there")}, (*_LOOKING, 404), parameters=[name]
        ),
        "/metrics": _looks("Counters and histograms", {"s200": page}),
        "/openapi.json": _looks("This description", {"s200": _json(_ANY, "OpenAPI 3.1")}),
        "/health": _looks(
            "Whether models are loaded; needs no key",
            {"s200": _json(_ref("Health"), "Ready"), "s503": _json(_ref("Health"), "Loading")},
            (),
            security=[],
        ),
    }


def description(names: Sequence[str] = ()) -> dict[str, Any]:
    """The whole description.

    Args:
        names: of the models that are served.
    """
    model: Schema = {"enum": list(names)} if names else _SOME_TEXT
    return {
        "openapi": "3.1.0",
        "info": {"title": "edgeft serve", "version": __version__, "summary": "Models on this machine."},
        "security": [{"key": []}, {}],
        "paths": _paths(),
        "components": {
            "schemas": {**SCHEMAS, "Name": model},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer", "description": "Where keys are set."}},
        },
    }
