"""The HTTP application: routes, and the way of a request from its body to the last chunk of its answer."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field, replace
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route

from edgeft.chat import Sampling
from edgeft.serve.answers import Exchange, stream, whole
from edgeft.serve.catalogue import Catalogue
from edgeft.serve.engine import Engine
from edgeft.serve.gate import Gate
from edgeft.serve.incoming import json_body
from edgeft.serve.metrics import CONTENT_TYPE, Metrics
from edgeft.serve.openapi import description
from edgeft.serve.recorder import Recorder
from edgeft.serve.replies import ChatReply, Reply, TextReply, encode
from edgeft.serve.requests import Asked, chat_request, refuse, text_request
from edgeft.serve.work import Failed, Work

Handler = Callable[["Server", HttpRequest, str], Awaitable[Response]]


@dataclass(frozen=True)
class Limits:
    body_bytes: int = 4 << 20
    body_s: float = 30.0
    """How long a client may take to send its request."""
    answer_s: float = 600.0
    """How long an answer may take, with its time in the queue."""


@dataclass(frozen=True)
class Server:
    """What the handlers work with."""

    catalogue: Catalogue
    gate: Gate
    recorder: Recorder
    metrics: Metrics
    engines: tuple[Engine, ...] = ()
    defaults: Sampling = field(default_factory=Sampling)
    limits: Limits = field(default_factory=Limits)
    confidence: bool = False
    """Ask for log-probabilities of every answer, for `edgeft monitor`."""


def make_app(server: Server) -> Starlette:
    """The application. Engines must have been started; they are closed with it."""

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        try:
            yield
        finally:
            for engine in server.engines:
                await engine.close()
            await server.recorder.close()

    routes = [
        _route(server, "/v1/chat/completions", _chat, "POST"),
        _route(server, "/v1/completions", _text, "POST"),
        _route(server, "/v1/embeddings", _embeddings, "POST"),
        _route(server, "/v1/feedback", _feedback, "POST"),
        _route(server, "/v1/models", _models),
        _route(server, "/v1/models/{model:path}", _model),
        _route(server, "/metrics", _metrics),
        _route(server, "/openapi.json", _openapi),
        Route("/health", _health(server), methods=["GET"]),
    ]
    return Starlette(routes=routes, lifespan=lifespan, exception_handlers={HTTPException: _http_error, 500: _fault})


def _route(server: Server, path: str, handler: Handler, method: str = "GET") -> Route:
    async def endpoint(request: HttpRequest) -> Response:
        try:
            address = request.client.host if request.client else "local"
            client = server.gate.client(request.headers.get("authorization"), request.headers.get("host"), address)
            return await handler(server, request, client)
        except Failed as failed:
            if not getattr(request.state, "recorded", False):
                server.recorder.refused(path, failed)
            return error_response(failed)

    return Route(path, endpoint, methods=[method])


# --- Answers ------------------------------------------------------------------


async def _chat(server: Server, request: HttpRequest, client: str) -> Response:
    return await _answer(server, request, client, chat_request, ChatReply)


async def _text(server: Server, request: HttpRequest, client: str) -> Response:
    return await _answer(server, request, client, text_request, TextReply)


async def _answer(
    server: Server,
    request: HttpRequest,
    client: str,
    understand: Callable[[Any, Sampling], Asked],
    make_reply: Callable[[Asked, str], Reply],
) -> Response:
    server.gate.admit(client)
    asked = understand(await json_body(request, server.limits.body_bytes, server.limits.body_s), server.defaults)
    served = server.catalogue.find(asked.model, asked.user or client)
    work = _prepared(asked.work, served.adapter, served.system, server.confidence)
    reply = make_reply(asked, asked.model)
    request.state.recorded = True
    exchange = Exchange(reply, client, asked.model, served.name, work, server.recorder, server.limits.answer_s)
    return await (stream if asked.stream else whole)(exchange, served.answerer, request.receive)


def _prepared(work: Work, adapter: str | None, system: str | None, confidence: bool) -> Work:
    """The work with what the server knows and the client need not: adapter, system prompt of the training."""
    messages, sampling = work.messages, work.sampling
    if messages and system and all(message["role"] != "system" for message in messages):
        messages = ({"role": "system", "content": system}, *messages)
    if confidence and not sampling.top_logprobs:
        sampling = replace(sampling, top_logprobs=1)
    return replace(work, adapter=adapter, messages=messages, sampling=sampling)


async def _embeddings(server: Server, request: HttpRequest, client: str) -> Response:
    server.gate.admit(client)
    await json_body(request, server.limits.body_bytes, server.limits.body_s)
    # 404 and not 501: clients try again what ends with 5xx, and this stays as it is.
    raise Failed(404, "the runtimes at hand make no embeddings", code="not_supported")


async def _feedback(server: Server, request: HttpRequest, client: str) -> Response:
    server.gate.admit(client)
    body = await json_body(request, server.limits.body_bytes, server.limits.body_s)
    if not isinstance(body, dict) or not isinstance(body.get("id"), str):
        refuse("id", "the id of an answer")
    rating, comment = body.get("rating"), body.get("comment")
    if rating not in ("up", "down"):
        refuse("rating", "up or down")
    if comment is not None and not isinstance(comment, str):
        refuse("comment", "must be a text")
    rated = await server.recorder.rate(body["id"], rating, comment)
    if rated is None:
        raise Failed(404, "no answer with this id is in the log", code="answer_not_found")
    server.metrics.rated(rated.served, rating)
    return _json({"id": body["id"], "rating": rating})


# --- Around them --------------------------------------------------------------


async def _models(server: Server, request: HttpRequest, client: str) -> Response:
    return _json({"object": "list", "data": [_model_object(name) for name in server.catalogue.names()]})


async def _model(server: Server, request: HttpRequest, client: str) -> Response:
    name = request.path_params["model"]
    server.catalogue.find(name, client)
    return _json(_model_object(name))


def _model_object(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "edgeft"}


async def _metrics(server: Server, request: HttpRequest, client: str) -> Response:
    for engine in server.engines:
        server.metrics.gauge(engine.name, engine.waiting, engine.crashes)
    return Response(server.metrics.page(), media_type=CONTENT_TYPE)


async def _openapi(server: Server, request: HttpRequest, client: str) -> Response:
    return _json(description(server.catalogue.names()))


def _health(server: Server) -> Callable[[HttpRequest], Awaitable[Response]]:
    """Open to everyone: it says no more than whether the server can answer."""

    async def health(request: HttpRequest) -> Response:
        ready = all(engine.ready for engine in server.engines)
        return _json({"status": "ok" if ready else "loading"}, 200 if ready else 503)

    return health


def _json(value: Any, status: int = 200) -> Response:
    return Response(encode(value), status, media_type="application/json")


def error_response(failed: Failed) -> Response:
    return Response(encode(failed.body()), failed.status, failed.headers(), "application/json")


async def _http_error(request: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    response = error_response(Failed(error.status_code, error.detail, code=error.detail.lower().replace(" ", "_")))
    response.headers.update(error.headers or {})
    return response


async def _fault(request: HttpRequest, error: Exception) -> Response:
    return error_response(Failed(500, "an error in the server; its log has it", "server_error"))
