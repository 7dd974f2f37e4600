"""A model in a process of its own: a crash inside a runtime ends that process, and nobody's conversation.

`python -m edgeft.model_worker` reads requests from stdin and writes events to stdout, both one JSON object per line:

    {"open": "model", "runtime": "auto", "options": {…}, "adapters": [["file", 1.0]]}
        -> {"event": "opened", "runtime": …, "reason": …, "context": 4096, "system": …}
    {"generate": [messages], "sampling": {…}}
        -> {"event": "text", "text": …}* {"event": "end", "usage": {…}}
    {"adapters": [["file", 0.5]]} -> {"event": "adapters"}
    {"cancel": true}              ends the answer that is being written

What fails is an event too: {"event": "error", "message": …, "hint": …}. The end of stdin ends the process.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from edgeft.chat import Cancel, Sampling
from edgeft.errors import EdgeftError
from edgeft.plugins import AdapterScale, LoadOptions
from edgeft.sessions import Opened, open_session

Request = Mapping[str, Any]


class Worker:
    """One model at a time, one answer at a time."""

    def __init__(self, send: Callable[[Mapping[str, Any]], None]) -> None:
        self._send = send
        self._opened: Opened | None = None
        self._cancel = Cancel()
        self._requests: SimpleQueue[tuple[Request, Cancel] | None] = SimpleQueue()

    def receive(self, request: Request | None) -> None:
        """From the thread that reads; None is the end."""
        if request is None or "cancel" in request:
            self._cancel.set()
        else:
            self._cancel = Cancel()
        if request is None:
            self._requests.put(None)
        elif "cancel" not in request:
            self._requests.put((request, self._cancel))

    def run(self) -> None:
        while (item := self._requests.get()) is not None:
            try:
                self._handle(*item)
            except EdgeftError as error:
                self._send({"event": "error", "message": error.message, "hint": error.hint})
        if self._opened is not None:
            self._opened.session.close()

    def _handle(self, request: Request, cancel: Cancel) -> None:
        if "open" in request:
            self._open(request)
        elif "generate" in request:
            self._generate(request, cancel)
        elif "adapters" in request and self._opened is not None:
            self._opened.session.set_adapters(_adapters(request))
            self._send({"event": "adapters"})

    def _open(self, request: Request) -> None:
        if self._opened is not None:
            self._opened.session.close()
            self._opened = None
        options = LoadOptions(**request.get("options", {}))
        opened = open_session(request["open"], request.get("runtime", "auto"), options, adapters=_adapters(request))
        self._opened = opened
        self._send(
            {
                "event": "opened",
                "runtime": opened.runtime,
                "reason": opened.reason,
                "context": opened.session.context,
                "system": opened.system,
            }
        )

    def _generate(self, request: Request, cancel: Cancel) -> None:
        if self._opened is None:
            raise EdgeftError("no model is open")
        session = self._opened.session
        sampling = dict(request.get("sampling", {}))
        sampling["stop"] = tuple(sampling.get("stop", ()))
        prompt = session.render(request["generate"])
        for delta in session.generate(prompt, Sampling(**sampling), cancel):
            if delta.text:
                self._send({"event": "text", "text": delta.text})
            if delta.usage is not None:
                self._send({"event": "end", "usage": delta.usage.as_dict()})


def _adapters(request: Request) -> list[AdapterScale]:
    return [AdapterScale(Path(file), scale) for file, scale in request.get("adapters", ())]


def main() -> None:
    # Native libraries print: stdout belongs to the events alone.
    events = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)

    def send(event: Mapping[str, Any]) -> None:
        events.write(json.dumps(event) + "\n")

    worker = Worker(send)

    def read() -> None:
        for line in sys.stdin:
            worker.receive(json.loads(line))
        worker.receive(None)

    threading.Thread(target=read, daemon=True).start()
    worker.run()


if __name__ == "__main__":
    main()
