"""One answer on its way to one client: streamed or whole, timed, ended early when nobody waits for it any more."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from edgeft.chat import Usage
from edgeft.request_log import Request
from edgeft.serve.recorder import Recorder
from edgeft.serve.replies import Reply, encode
from edgeft.serve.work import Answerer, Failed, Job, Origin, Step, Work

GONE = Failed(499, "the client went away", code="client_closed_request")


class Exchange:
    """A request that was understood, and the record of what becomes of it."""

    def __init__(
        self, reply: Reply, client: str, model: str, served: str, work: Work, recorder: Recorder, answer_s: float
    ) -> None:
        self.reply, self.client, self.work, self.answer_s = reply, client, work, answer_s
        self._model, self._served, self._recorder = model, served, recorder
        self._at, self._began = time.time(), time.perf_counter()
        self._first: float | None = None
        self._logprobs, self._scored = 0.0, 0
        self._origin = Origin("")

    def saw(self, step: Step) -> None:
        if self._first is None:
            self._first = time.perf_counter() - self._began
        if step.logprob:
            self._logprobs += step.logprob.logprob
            self._scored += 1
        if step.usage and step.origin:
            self._origin = step.origin

    def end(self, job: Job | None, usage: Usage | None = None, failed: Failed | None = None) -> None:
        """Write the record; called once, however the answer ended."""
        self._recorder.record(
            Request(
                self.reply.id,
                self._at,
                self._model,
                self._served,
                self.client,
                failed.status if failed else 200,
                finish=usage.finish_reason if usage else None,
                error=(failed.code or failed.kind) if failed else None,
                prompt_tokens=usage.prompt_tokens if usage else 0,
                completion_tokens=usage.completion_tokens if usage else 0,
                queued_ms=round(job.queued_s * 1000, 2) if job else 0.0,
                ttft_ms=round(self._first * 1000, 2) if self._first is not None else None,
                total_ms=round((time.perf_counter() - self._began) * 1000, 2),
                tokens_per_s=round(usage.decode_tokens_per_s, 2) if usage and usage.decode_s else None,
                confidence=self._logprobs / self._scored if self._scored else self._origin.confidence,
                deferral=self._origin.deferral,
                cost=self._origin.cost,
            ),
            self.work,
            self.reply.text,
        )


async def whole(exchange: Exchange, answerer: Answerer, receive: Receive) -> Response:
    """Raises: Failed."""
    job, usage = None, None
    try:
        job = answerer.submit(exchange.client, exchange.work)
        async with _guarded(job, receive, exchange.answer_s):
            async for step in job.steps():
                exchange.saw(step)
                exchange.reply.chunks(step)
                usage = step.usage
    except Failed as failed:
        exchange.end(job, failed=failed)
        raise
    except asyncio.CancelledError:
        exchange.end(job, failed=GONE)
        raise
    exchange.end(job, usage)
    return Response(encode(exchange.reply.whole()), media_type="application/json")


async def stream(exchange: Exchange, answerer: Answerer, receive: Receive) -> Response:
    """A stream that has begun: what is wrong with a request shows before its first token, and gets a status.

    Raises:
        Failed
    """
    job = None
    try:
        job = answerer.submit(exchange.client, exchange.work)
        guard = contextlib.AsyncExitStack()
        await guard.enter_async_context(_guarded(job, receive, exchange.answer_s))
        try:
            steps = job.steps()
            first = await anext(steps)
        except BaseException:
            await guard.aclose()
            raise
    except Failed as failed:
        exchange.end(job, failed=failed)
        raise
    except asyncio.CancelledError:
        exchange.end(job, failed=GONE)
        raise
    return _Events(exchange, job, first, steps, guard)


@contextlib.asynccontextmanager
async def _guarded(job: Job, receive: Receive, seconds: float) -> AsyncIterator[None]:
    """Meanwhile: stop the computation when the client goes away or the time is over; at the end, in any case."""
    failed = Failed(504, f"the answer took longer than {seconds:g} s", "server_error", "timeout")
    timer = asyncio.get_running_loop().call_later(seconds, job.abort, failed)
    watcher = asyncio.create_task(_watch(job, receive))
    try:
        yield
    finally:
        timer.cancel()
        watcher.cancel()
        job.abort(GONE)


async def _watch(job: Job, receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    job.abort(GONE)


class _Events(Response):
    """Server-sent events. An error after the first of them is an event too: the status is long gone."""

    media_type = "text/event-stream"

    def __init__(
        self,
        exchange: Exchange,
        job: Job,
        first: Step,
        steps: AsyncIterator[Step],
        guard: contextlib.AsyncExitStack,
    ) -> None:
        self._exchange, self._job, self._first, self._steps, self._guard = exchange, job, first, steps, guard
        self.status_code, self.background = 200, None
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        usage, failed = None, None
        try:
            async with self._guard:
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                try:
                    usage = await self._send_steps(send)
                    await _send(send, b"data: [DONE]\n\n", more=False)
                except Failed as error:
                    failed = error
                    await _send(send, _event(failed.body()), more=False)
        except (asyncio.CancelledError, OSError):
            failed = GONE
            raise
        finally:
            self._exchange.end(self._job, usage, failed)

    async def _send_steps(self, send: Send) -> Usage | None:
        """Events of steps that came together go out together."""
        reply, step = self._exchange.reply, self._first
        events = b"".join(map(_event, reply.opening()))
        while True:
            self._exchange.saw(step)
            events += b"".join(map(_event, reply.chunks(step)))
            if events and (step.usage or not self._job.more):
                await _send(send, events)
                events = b""
            if step.usage:
                return step.usage
            try:
                step = await anext(self._steps)
            except Failed:
                if events:
                    await _send(send, events)
                raise


def _event(chunk: Mapping[str, Any]) -> bytes:
    return b"data: " + encode(chunk) + b"\n\n"


async def _send(send: Send, body: bytes, more: bool = True) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": more})
