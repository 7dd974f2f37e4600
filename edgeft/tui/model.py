"""A model that runs in a child process, spoken to from the screen's event loop."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from edgeft.chat import Message, Sampling
from edgeft.errors import EdgeftError, ModelError

LINE_LIMIT = 1 << 24
"""Bytes of one event at most: an answer comes in pieces."""


@dataclass(frozen=True)
class Opened:
    runtime: str
    reason: str
    context: int
    """Tokens."""
    system: str | None
    note: str = ""
    """What the user should know of it."""

    @property
    def cascade(self) -> bool:
        return self.runtime == "cascade"


class ModelProcess:
    """The child; started again by `open` when it has died."""

    def __init__(self) -> None:
        self._process: asyncio.subprocess.Process | None = None
        self._answering = False
        self._lock = asyncio.Lock()
        """One request at a time: who asks while a model is loaded waits for it."""

    async def open(
        self,
        model: str,
        settings: Mapping[str, Any],
        adapters: Sequence[tuple[str, float]] = (),
    ) -> Opened:
        """Load a model or a cascade.

        Args:
            settings: `run.*`, by their short names.

        Raises:
            EdgeftError: with the message of what went wrong in the child.
        """
        event = await self._ask({"open": model, "settings": dict(settings), "adapters": list(adapters)})
        return Opened(event["runtime"], event["reason"], event["context"], event["system"], event["note"])

    async def set_adapters(self, adapters: Sequence[tuple[str, float]]) -> None:
        """Raises: EdgeftError."""
        await self._ask({"adapters": list(adapters)})

    async def generate(
        self, messages: Sequence[Message], sampling: Sampling, by: str = "policy"
    ) -> AsyncIterator[Mapping[str, Any]]:
        """Events as `edgeft.model_worker` describes them; the last is "end".

        Args:
            by: who of a cascade is to answer: "policy", "device" or "cloud".

        Raises:
            EdgeftError: the model failed; its process may be gone.
        """
        async with self._lock:
            self._send({"generate": list(messages), "sampling": asdict(sampling), "by": by})
            self._answering = True
            try:
                while True:
                    event = await self._event()
                    yield event
                    if event["event"] == "end":
                        return
            finally:
                self._answering = False

    def cancel(self) -> None:
        """End the answer that is being written; it ends with usage that says "cancel"."""
        if self._answering:
            with suppress(EdgeftError):
                self._send({"cancel": True})

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.returncode is None

    async def close(self) -> None:
        process, self._process = self._process, None
        if process is None or process.returncode is not None:
            return
        assert process.stdin
        process.stdin.close()
        try:
            await asyncio.wait_for(process.wait(), 2)
        except TimeoutError:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    async def _start(self) -> None:
        if self.alive:
            return
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "edgeft.model_worker",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            limit=LINE_LIMIT,
            start_new_session=True,  # Ctrl-C in the terminal is for the screen
        )

    async def _ask(self, request: Mapping[str, Any]) -> Mapping[str, Any]:
        async with self._lock:
            await self._start()
            self._send(request)
            return await self._event()

    def _send(self, request: Mapping[str, Any]) -> None:
        if not self.alive:
            raise ModelError("no model is running", "Open it again.")
        assert self._process and self._process.stdin
        self._process.stdin.write((json.dumps(request) + "\n").encode())

    async def _event(self) -> Mapping[str, Any]:
        assert self._process and self._process.stdout
        line = await self._process.stdout.readline()
        if not line:
            code = await self._process.wait()
            how = f"signal {-code}" if code < 0 else f"exit code {code}"
            raise ModelError(f"the model's process ended ({how})", "What was said is kept. Send again to restart it.")
        event: Mapping[str, Any] = json.loads(line)
        if event["event"] == "error":
            raise EdgeftError(event["message"], event["hint"])
        return event
