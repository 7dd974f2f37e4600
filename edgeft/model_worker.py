"""A model in a process of its own: a crash inside a runtime ends that process, and nobody's conversation.

`python -m edgeft.model_worker` reads requests from stdin and writes events to stdout, both one JSON object per line:

    {"open": "model", "settings": {the `run.*` settings}, "adapters": [["file", 1.0]]}
        -> {"event": "opened", "runtime": …, "reason": …, "context": 4096, "system": …, "note": …}
    {"generate": [messages], "sampling": {…}, "by": "policy"}
        -> {"event": "text", "text": …}* {"event": "end", "usage": {…}, "route": {…}}
           between them, of a cascade {"event": "author", "author": …, "reason": …}, and {"event": "note", "text": …}
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
from edgeft.conversation_file import route_of
from edgeft.errors import EdgeftError
from edgeft.overflow import fit
from edgeft.plugins import AdapterScale
from edgeft.sessions import Opened, load_options, open_session

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
        self._opened = opened = self._opened_model(request["open"], request["settings"], _adapters(request))
        stale = getattr(getattr(opened.session, "cascade", None), "stale", "")
        self._send(
            {
                "event": "opened",
                "runtime": opened.runtime,
                "reason": opened.reason,
                "context": opened.session.context,
                "system": opened.system,
                "note": f"the calibration is stale: {stale}; the device answers" if stale else "",
            }
        )

    def _opened_model(self, reference: str, values: Mapping[str, Any], adapters: list[AdapterScale]) -> Opened:
        if reference.endswith(".toml"):
            from edgeft.cascade import is_cascade
            from edgeft.cascade.session import open_cascade

            if is_cascade(reference):
                return open_cascade(Path(reference).expanduser(), adapters, None, self._heard)
        return open_session(reference, values["runtime"], load_options(values), adapters=adapters)

    def _heard(self, author: str, reason: str) -> None:
        self._send({"event": "author", "author": author, "reason": reason})

    def _generate(self, request: Request, cancel: Cancel) -> None:
        if self._opened is None:
            raise EdgeftError("no model is open")
        session = self._opened.session
        sampling = dict(request.get("sampling", {}))
        sampling["stop"] = tuple(sampling.get("stop", ()))
        if hasattr(session, "by"):
            session.by = request["by"]
        fitted = fit(session, request["generate"], self._opened.overflow, sampling["max_tokens"])
        if fitted.note:
            self._send({"event": "note", "text": fitted.note})
        for delta in session.generate(fitted.prompt, Sampling(**sampling), cancel):
            if delta.text:
                self._send({"event": "text", "text": delta.text})
            if delta.usage is not None:
                self._send({"event": "end", "usage": delta.usage.as_dict(), "route": route_of(session)})


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
