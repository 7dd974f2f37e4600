"""A model in a process of its own, fed JSON lines on stdin and answering with JSON lines on stdout.

A process and not a thread: a fault in a native library ends the process it happens in, and then the server is still
there to tell every client so. JSON and not pickle: nothing that comes through can be anything but data.

    in   {"load": {…}}                 once, the first line
         {"id": 1, "work": {…}}        `edgeft.serve.work.Work`
         {"cancel": 1}
    out  {"loaded": {…}} or {"failed": {…}}
         {"id": 1, "text": "…", "logprob": ["token", -0.1, [["token", -0.1]]]}
         {"id": 1, "text": "", "usage": {…}} or {"id": 1, "error": {…}}
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from edgeft.artifact import Artifact, read_manifest
from edgeft.chat import Cancel, Delta, TokenIds
from edgeft.errors import EdgeftError, UsageError
from edgeft.plugins import AdapterScale, LoadOptions, Session
from edgeft.serve.work import Loaded, Work
from edgeft.sessions import Opened, open_session


class Worker:
    """Answers one request after the other; `cancel` lines are read meanwhile by a thread."""

    def __init__(self, lines: IO[str], out: IO[str]) -> None:
        self._lines, self._out = lines, out
        self._inbox: queue.SimpleQueue[tuple[int, Work] | None] = queue.SimpleQueue()
        self._cancels: dict[int, Cancel] = {}
        self._adapters: dict[str, AdapterScale] = {}
        self._active: str | None = None

    def run(self) -> None:
        asked = json.loads(self._lines.readline())["load"]
        try:
            opened = self._open(asked)
        except Exception as error:  # the border of a process: a plug-in may raise anything
            self._say({"failed": _described(error)})
            return
        with opened.session as session:
            self._say({"loaded": asdict(self._loaded(opened))})
            threading.Thread(target=self._read, daemon=True).start()
            while (item := self._inbox.get()) is not None:
                self._answer(session, *item)

    def _open(self, asked: Mapping[str, Any]) -> Opened:
        self._adapters = {name: AdapterScale(Path(path), scale) for name, (path, scale) in asked["adapters"].items()}
        opened = open_session(asked["reference"], asked["runtime"], LoadOptions(**asked["options"]))
        try:
            for adapter in self._adapters.values():
                opened.session.set_adapters([adapter])  # one that does not fit is refused now, not at a request
            opened.session.set_adapters(opened.adapters)
        except BaseException:
            opened.session.close()
            raise
        self._bundled = opened.adapters
        return opened

    def _loaded(self, opened: Opened) -> Loaded:
        system: dict[str, str | None] = {"": opened.system}
        for name, adapter in self._adapters.items():
            manifest = read_manifest(adapter.path)
            system[name] = (manifest.system if manifest else None) or _own_system(opened.artifact)
        manifest = opened.artifact.manifest
        return Loaded(
            str(opened.artifact.path),
            opened.runtime,
            opened.reason,
            opened.session.context,
            manifest.sha256 if manifest else None,
            system,
        )

    def _read(self) -> None:
        for line in self._lines:
            message = json.loads(line)
            if "cancel" in message:
                if (cancel := self._cancels.get(message["cancel"])) is not None:  # an unthrown switch is false
                    cancel.set()
            else:
                self._cancels[message["id"]] = Cancel()
                self._inbox.put((message["id"], Work.from_json(message["work"])))
        # The server is gone: nobody reads what would come now.
        for cancel in list(self._cancels.values()):
            cancel.set()
        self._inbox.put(None)

    def _answer(self, session: Session, number: int, work: Work) -> None:
        try:
            self._adapt(session, work.adapter)
            prompt = _prompt(session, work)
            for delta in session.generate(prompt, work.sampling, self._cancels[number]):
                self._say({"id": number, **_step(session, delta)})
        except BrokenPipeError:
            raise
        except Exception as error:  # the border of a process: a plug-in may raise anything
            self._say({"id": number, "error": _described(error)})
        finally:
            del self._cancels[number]

    def _adapt(self, session: Session, name: str | None) -> None:
        """Put on the adapter that a request wants. Changing it empties the cache, so it is left when it is the same."""
        if name != self._active:
            session.set_adapters(self._bundled if name is None else [self._adapters[name]])
            self._active = name

    def _say(self, message: Mapping[str, Any]) -> None:
        self._out.write(json.dumps(message, separators=(",", ":")) + "\n")
        self._out.flush()


class _Refused(EdgeftError):
    """A request at fault: the client's error, not the server's."""


def _prompt(session: Session, work: Work) -> TokenIds:
    """Raises: _Refused when the template cannot render the messages, or the context is too short for them."""
    try:
        if work.prompt is not None:
            prompt = session.tokenize(work.prompt, special=True, bos=True)
        else:
            prompt = session.render(work.messages, list(work.tools) or None)
    except EdgeftError as error:
        raise _Refused(error.message, error.hint) from error
    if len(prompt) >= session.context:
        raise _Refused(f"the prompt has {len(prompt)} tokens; the context holds {session.context}", "Shorten it.")
    return prompt


def _own_system(artifact: Artifact) -> str | None:
    return artifact.manifest.system if artifact.manifest else None


def _step(session: Session, delta: Delta) -> dict[str, Any]:
    step: dict[str, Any] = {"text": delta.text}
    if delta.logprob is not None and delta.token is not None:
        top = [(session.detokenize([token]), logprob) for token, logprob in delta.top_logprobs]
        step["logprob"] = (session.detokenize([delta.token]), delta.logprob, top)
    if delta.usage:
        step["usage"] = asdict(delta.usage)
    return step


def _described(error: Exception) -> dict[str, Any]:
    if isinstance(error, EdgeftError):
        refused = isinstance(error, (_Refused, UsageError))
        return {"refused": refused, "message": error.message, "hint": error.hint}
    return {"refused": False, "message": f"{type(error).__name__}: {error}", "hint": None}


def main() -> None:
    # Native libraries print to descriptor 1 when they like to: the answers get a descriptor of their own.
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    lines = os.fdopen(os.dup(0), "r", encoding="utf-8")
    try:
        Worker(lines, out).run()
    except BrokenPipeError:
        sys.stderr.close()


if __name__ == "__main__":
    main()
