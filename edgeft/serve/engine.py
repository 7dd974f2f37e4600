"""A model behind a queue: starts its process, feeds it one request after the other, and outlives its crashes."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import math
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from edgeft.chat import Usage
from edgeft.errors import ModelError
from edgeft.serve.fair import FairQueue, QueueFull
from edgeft.serve.lines import Lines
from edgeft.serve.work import Failed, Loaded, Origin, Step, TokenLogprob, Work

_OBEYS_S = 20.0
"""How long a process may take to notice that a request was cancelled before it is ended."""
_RESTARTS_S = (0.0, 1.0, 5.0, 30.0)
"""Pauses before a crashed process is started again; the last one is kept until an answer succeeds."""


@dataclass(frozen=True)
class Spec:
    """What to load, and how."""

    reference: str
    runtime: str = "auto"
    options: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of `edgeft.plugins.LoadOptions`."""
    adapters: Mapping[str, tuple[str, float]] = field(default_factory=dict)
    """Name -> (file, scale)."""

    def as_json(self) -> dict[str, Any]:
        return {
            "reference": self.reference,
            "runtime": self.runtime,
            "options": dict(self.options),
            "adapters": dict(self.adapters),
        }


class EngineJob:
    """One accepted request of an engine."""

    def __init__(self, engine: Engine, number: int, client: str, work: Work) -> None:
        self._engine, self.number, self.client, self.work = engine, number, client, work
        self.inbox: asyncio.Queue[Step | Failed] = asyncio.Queue()
        self.aborted_at: float | None = None
        self.done = asyncio.Event()
        self.queued_s = 0.0
        self._accepted = time.perf_counter()

    @property
    def cancelled(self) -> bool:
        return self.aborted_at is not None

    @property
    def more(self) -> bool:
        return not self.inbox.empty()

    async def steps(self) -> AsyncIterator[Step]:
        while True:
            step = await self.inbox.get()
            if isinstance(step, Failed):
                raise step
            yield step
            if step.usage:
                return

    def abort(self, failed: Failed) -> None:
        if not self.done.is_set() and not self.cancelled:
            self.aborted_at = time.perf_counter()
            self.inbox.put_nowait(failed)
            self._engine.cancel(self)

    def started(self) -> None:
        self.queued_s = time.perf_counter() - self._accepted

    def end(self, last: Step | Failed) -> None:
        if not self.cancelled:
            self.inbox.put_nowait(last)
        self.done.set()


class Engine:
    """One model process and the requests that wait for it."""

    def __init__(self, name: str, spec: Spec, queue_size: int) -> None:
        self.name, self.spec = name, spec
        self.loaded: Loaded | None = None
        self.crashes = 0
        self._queue: FairQueue[EngineJob] = FairQueue(queue_size)
        self._numbers = itertools.count(1)
        self._process: asyncio.subprocess.Process | None = None
        self._lines: Lines | None = None
        self._running: dict[int, EngineJob] = {}
        self._answering: set[asyncio.Task[None]] = set()
        self._tasks: list[asyncio.Task[None]] = []
        self._up = asyncio.Event()
        self._failed_in_a_row = 0
        self._closing = False
        self._seconds_per_job = 1.0

    # --- Life of the process ------------------------------------------------

    async def start(self) -> Loaded:
        """Load the model and begin to answer. Raises: ModelError when it cannot be loaded."""
        loaded = await self._spawn()
        slots = asyncio.Semaphore(loaded.parallel)
        self._tasks = [asyncio.create_task(self._watch()), asyncio.create_task(self._feed(slots))]
        return loaded

    async def _spawn(self) -> Loaded:
        heard, speaks = os.pipe()
        first: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._lines = Lines(heard, first.set_result)
        try:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "edgeft.serve.worker"),
                stdin=asyncio.subprocess.PIPE,
                stdout=speaks,
                start_new_session=True,  # Ctrl-C in a terminal is for the server, which lets answers finish
            )
        finally:
            os.close(speaks)
        self._write({"load": self.spec.as_json()})
        await _first_of(first, self._lines.ended)
        if not first.done() or "failed" in first.result():
            code = await self._process.wait()
            self._lines.close()
            if not first.done():
                raise ModelError(f"the model's process ended {_ending(code)}")
            failed = first.result()["failed"]
            raise ModelError(failed["message"], failed["hint"])
        self._lines.said = self._deliver
        self.loaded = Loaded(**first.result()["loaded"])
        self._up.set()
        return self.loaded

    async def _watch(self) -> None:
        """When the process dies, say so to whom it concerns and start another."""
        while not self._closing:
            assert self._lines is not None
            await self._lines.ended.wait()
            if not self._closing:
                await self._restart()

    async def _restart(self) -> None:
        assert self._process is not None
        self._up.clear()
        code = await self._process.wait()
        self.crashes += 1
        crashed = Failed(500, f"the model's process ended {_ending(code)}", "server_error", "model_crashed")
        for job in list(self._running.values()):
            job.end(crashed)
        while not self._closing:
            await asyncio.sleep(_RESTARTS_S[min(self._failed_in_a_row, len(_RESTARTS_S) - 1)])
            self._failed_in_a_row += 1
            with contextlib.suppress(ModelError):
                await self._spawn()
                return
            failed = Failed(503, "the model cannot be loaded", "server_error", "model_unavailable", None, 30)
            for waiting in [*self._queue.drain(), *self._running.values()]:
                waiting.end(failed)

    async def close(self) -> None:
        """End the process; requests that are left get an error."""
        self._closing = True
        self.fail_all(Failed(503, "the server is shutting down", "server_error", "shutting_down", retry_after=5))
        tasks = [*self._tasks, *self._answering]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._process and self._process.returncode is None:
            with contextlib.suppress(OSError):
                if self._process.stdin:
                    self._process.stdin.close()
            try:
                await asyncio.wait_for(self._process.wait(), 5)
            except TimeoutError:
                self._process.kill()
                await self._process.wait()
        if self._lines:
            self._lines.close()

    def fail_all(self, failed: Failed) -> None:
        """End the answers that are being written and all that wait, with an error."""
        for waiting in self._queue.drain():
            waiting.end(failed)
        for job in list(self._running.values()):
            job.abort(failed)

    # --- Requests -----------------------------------------------------------

    @property
    def ready(self) -> bool:
        return self._up.is_set()

    @property
    def waiting(self) -> int:
        return len(self._queue)

    def submit(self, client: str, work: Work) -> EngineJob:
        """Raises: Failed."""
        if self._closing:
            raise Failed(503, "the server is shutting down", "server_error", "shutting_down", retry_after=5)
        if not self.ready and self._failed_in_a_row > 1:
            raise Failed(503, "the model is being loaded again", "server_error", "model_unavailable", retry_after=5)
        job = EngineJob(self, next(self._numbers), client, work)
        try:
            self._queue.put(client, job)
        except QueueFull:
            wait = max(1, math.ceil(self._seconds_per_job * (len(self._queue) + 1) / 2))
            message = f"{len(self._queue)} requests are waiting, as many as may"
            raise Failed(429, message, "rate_limit_error", "queue_full", retry_after=min(wait, 60)) from None
        return job

    def cancel(self, job: EngineJob) -> None:
        if job.number in self._running:
            self._write({"cancel": job.number})
        elif self._queue.remove(job.client, job):
            job.done.set()

    async def _feed(self, slots: asyncio.Semaphore) -> None:
        """Give the process as many requests at a time as it takes."""
        while True:
            await slots.acquire()
            job = await self._queue.get()
            self._running[job.number] = job
            await self._up.wait()
            task = asyncio.create_task(self._one(job, slots))
            self._answering.add(task)
            task.add_done_callback(self._answering.discard)

    async def _one(self, job: EngineJob, slots: asyncio.Semaphore) -> None:
        try:
            if not job.done.is_set() and not job.cancelled:
                job.started()
                await self._asked(job)
        finally:
            job.done.set()
            del self._running[job.number]
            slots.release()

    async def _asked(self, job: EngineJob) -> None:
        began = time.perf_counter()
        self._write({"id": job.number, "work": job.work.as_json()})
        finished = asyncio.ensure_future(job.done.wait())
        while not finished.done():
            await asyncio.wait([finished], timeout=_OBEYS_S / 4)
            told = job.aborted_at is not None and time.perf_counter() - job.aborted_at > _OBEYS_S
            if told and not finished.done() and self._process and self._process.returncode is None:
                self._process.kill()
        self._seconds_per_job += 0.2 * (time.perf_counter() - began - self._seconds_per_job)

    def _deliver(self, said: Mapping[str, Any]) -> None:
        job = self._running.get(said["id"])
        if job is None or job.done.is_set():
            return  # the rest of an answer that nobody waits for
        if "error" in said:
            job.end(_failure(said["error"]))
            return
        step = _step(said)
        if step.usage:
            self._failed_in_a_row = 0
            job.end(step)
        elif not job.cancelled:
            job.inbox.put_nowait(step)

    # --- Lines --------------------------------------------------------------

    def _write(self, message: Mapping[str, Any]) -> None:
        assert self._process is not None and self._process.stdin is not None
        if not self._process.stdin.is_closing():
            self._process.stdin.write(json.dumps(message, separators=(",", ":")).encode() + b"\n")


async def _first_of(future: asyncio.Future[Any], event: asyncio.Event) -> None:
    """Wait until one of the two is done."""
    ended = asyncio.ensure_future(event.wait())
    try:
        await asyncio.wait([future, ended], return_when=asyncio.FIRST_COMPLETED)
    finally:
        ended.cancel()


def _step(said: Mapping[str, Any]) -> Step:
    logprob = None
    if entry := said.get("logprob"):
        token, value, top = entry
        logprob = TokenLogprob(token, value, tuple((other, number) for other, number in top))
    usage = Usage(**said["usage"]) if "usage" in said else None
    origin = Origin(**said["origin"]) if "origin" in said else None
    return Step(said["text"], logprob, usage, origin)


def _failure(error: Mapping[str, Any]) -> Failed:
    message = f"{error['message']}. {error['hint']}" if error["hint"] else str(error["message"])
    if error["refused"]:
        code = "context_length_exceeded" if "the context holds" in message else None
        return Failed(400, message, code=code)
    return Failed(500, message, "server_error")


def _ending(code: int) -> str:
    """How a process ended, in words."""
    if code < 0:
        with contextlib.suppress(ValueError):
            return f"by {signal.Signals(-code).name}"
    return f"with code {code}"
