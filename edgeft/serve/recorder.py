"""Where a request is written down when it is over: the log on stderr, the SQLite file, the metrics."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import IO

from edgeft.errors import WriteError
from edgeft.request_log import Rating, Request, RequestLog, as_line
from edgeft.serve.metrics import Metrics
from edgeft.serve.work import Failed, Work

Exporter = Callable[[Request], None]


class Recorder:
    """Prompts and answers are left out of everything unless `prompts` is set."""

    def __init__(
        self,
        metrics: Metrics,
        log: RequestLog | None = None,
        lines: IO[str] | None = None,
        prompts: bool = False,
        exporter: Exporter | None = None,
    ) -> None:
        self._metrics, self._log, self._prompts, self._exporter = metrics, log, prompts, exporter
        self._lines = sys.stderr if lines is None else lines
        # One thread: the file is used by one at a time, and a slow disk delays no answer.
        self._disk = ThreadPoolExecutor(1, "request-log")

    def record(self, request: Request, work: Work, answer: str) -> None:
        if self._prompts:
            asked = json.dumps(work.messages, ensure_ascii=False) if work.messages else work.prompt
            request = replace(request, messages=asked, answer=answer)
        self._metrics.count(request)
        print(as_line(request), file=self._lines, flush=True)
        if self._exporter:
            self._exporter(request)
        if self._log:
            self._disk.submit(self._add, self._log, request)

    def refused(self, path: str, failed: Failed) -> None:
        """A request that never got to a model: in the lines and the metrics, not in the file."""
        code = failed.code or failed.kind
        self._metrics.refused(failed.status, code)
        line = {"event": "refused", "at": time.time(), "path": path, "status": failed.status, "error": code}
        print(json.dumps(line), file=self._lines, flush=True)

    def _add(self, log: RequestLog, request: Request) -> None:
        try:
            log.add(request)
        except WriteError as error:
            print(json.dumps({"event": "error", "message": error.message}), file=self._lines, flush=True)

    async def rate(self, identity: str, rating: Rating, comment: str | None) -> Request | None:
        """Raises: WriteError."""
        if self._log is None:
            return None
        return await asyncio.get_running_loop().run_in_executor(self._disk, self._log.rate, identity, rating, comment)

    async def close(self) -> None:
        await asyncio.to_thread(self._disk.shutdown)
        if self._log:
            self._log.close()
