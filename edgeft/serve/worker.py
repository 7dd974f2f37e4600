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

import contextlib
import json
import math
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any, Protocol

from edgeft.artifact import Artifact, read_manifest
from edgeft.chat import Cancel, Delta, TokenIds, Usage
from edgeft.errors import EdgeftError, UsageError, require
from edgeft.overflow import fit
from edgeft.plugins import AdapterScale, LoadOptions, Overflow, Session, streams
from edgeft.request_log import deferral_of
from edgeft.serve.wardrobe import Wardrobe
from edgeft.serve.work import Loaded, Origin, Work
from edgeft.sessions import Opened, open_session

_ENCODER = json.JSONEncoder(separators=(",", ":"))
_CASCADE_PARALLEL = 8
"""Requests a cascade works on at a time: those that wait for the cloud do not hold up the device."""


_APART_S = 0.02
"""Between two writes of one answer: 50 a second, faster than anybody reads. A model that is faster has several
tokens in one, since every write wakes the server, which costs 0.3 to 0.5 ms on cores that are busy with weights."""


class Worker:
    """Reads requests and `cancel` lines; threads answer, as many as the model can use."""

    def __init__(self, lines: IO[str], out: IO[str]) -> None:
        self._lines, self._out = lines, out
        self._speaking = threading.Lock()
        self._cancels: dict[int, Cancel] = {}

    def run(self) -> None:
        asked = json.loads(self._lines.readline())["load"]
        try:
            model = CascadeModel(asked) if asked["reference"].endswith(".toml") else SessionModel(asked)
        except Exception as error:  # the border of a process: a plug-in may raise anything
            self._say({"failed": _described(error)})
            return
        with contextlib.closing(model), ThreadPoolExecutor(model.loaded.parallel) as pool:
            self._say({"loaded": asdict(model.loaded)})
            for line in self._lines:
                message = json.loads(line)
                if "cancel" not in message:
                    self._cancels[message["id"]] = Cancel()
                    pool.submit(self._answer, model, message["id"], Work.from_json(message["work"]))
                elif (cancel := self._cancels.get(message["cancel"])) is not None:  # an unthrown switch is false
                    cancel.set()
            # The server is gone: nobody reads what would come now.
            for cancel in list(self._cancels.values()):
                cancel.set()

    def _answer(self, model: Model, number: int, work: Work) -> None:
        held: list[dict[str, Any]] = []
        written = -math.inf
        try:
            for step in model.steps(work, self._cancels[number]):
                held.append({"id": number, **step})
                now = time.perf_counter()
                if now - written >= _APART_S or "usage" in step or not model.steady:
                    self._say(*held)
                    held, written = [], now
        except BrokenPipeError:
            pass
        except Exception as error:  # the border of a process: a plug-in may raise anything
            self._say(*held, {"id": number, "error": _described(error)})
        finally:
            del self._cancels[number]

    def _say(self, *messages: Mapping[str, Any]) -> None:
        lines = "".join(_ENCODER.encode(message) + "\n" for message in messages)
        with self._speaking:
            self._out.write(lines)
            self._out.flush()


class Model(Protocol):
    loaded: Loaded
    steady: bool
    """Whether its tokens come one after the other with no long pause, as they do where they are computed here."""

    def steps(self, work: Work, cancel: Cancel) -> Iterator[dict[str, Any]]: ...

    def close(self) -> None: ...


class SessionModel:
    """One model on a runtime, with its adapters."""

    def __init__(self, asked: Mapping[str, Any]) -> None:
        self._adapters = {name: AdapterScale(Path(path), scale) for name, (path, scale) in asked["adapters"].items()}
        opened = self._open(asked)
        self._session, self._bundled, self._overflow = opened.session, opened.adapters, opened.overflow
        self._wardrobe = Wardrobe(self._put_on)
        self.steady = not opened.artifact.address
        self.loaded = self._described(opened)

    def close(self) -> None:
        self._session.close()

    def steps(self, work: Work, cancel: Cancel) -> Iterator[dict[str, Any]]:
        with self._wardrobe.wearing(work.adapter, cancel):
            for delta in self._session.generate(_prompt(self._session, work, self._overflow), work.sampling, cancel):
                yield _step(self._session, delta)

    def _open(self, asked: Mapping[str, Any]) -> Opened:
        options = LoadOptions(**asked["options"])
        opened = open_session(asked["reference"], asked["runtime"], options)
        try:
            if streams(opened.session) < options.parallel:
                raise UsageError(
                    f"{opened.runtime} makes {streams(opened.session)} answers at a time, not {options.parallel}",
                    "Leave out --parallel, or run a GGUF with llama.cpp.",
                )
            for adapter in self._adapters.values():
                opened.session.set_adapters([adapter])  # one that does not fit is refused now, not at a request
            opened.session.set_adapters(opened.adapters)
        except BaseException:
            opened.session.close()
            raise
        return opened

    def _described(self, opened: Opened) -> Loaded:
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
            streams(opened.session),
            getattr(opened.session, "cache_bytes", None),
        )

    def _put_on(self, name: str | None) -> None:
        self._session.set_adapters(self._bundled if name is None else [self._adapters[name]])


class CascadeModel:
    """A cascade as its cascade.toml describes it: several are answered at a time, the device taking turns."""

    steady = False

    def __init__(self, asked: Mapping[str, Any]) -> None:
        if asked["adapters"]:
            raise UsageError("a cascade takes no --adapter", "Name the adapter in its cascade.toml.")
        self._cascade = require("edgeft.cascade.engine", "device").Cascade.open(Path(asked["reference"]))
        opened = self._cascade.opened
        manifest = opened.artifact.manifest
        self.loaded = Loaded(
            str(opened.artifact.path),
            opened.runtime,
            opened.reason,
            opened.session.context,
            manifest.sha256 if manifest else None,
            {"": opened.system},
            _CASCADE_PARALLEL,
        )

    def close(self) -> None:
        self._cascade.close()

    def steps(self, work: Work, cancel: Cancel) -> Iterator[dict[str, Any]]:
        if work.prompt is not None:
            raise _Refused("a cascade answers conversations only", "Ask /v1/chat/completions.")
        for delta in self._cascade.answer(work.messages, work.sampling, cancel, list(work.tools) or None):
            if delta.record is not None:
                yield _summed_up(delta.record)
            elif delta.reason or delta.restart:
                origin = Origin(delta.author, delta.reason, delta.restart)
                yield {"text": delta.text, "origin": asdict(origin)}
            else:
                yield {"text": delta.text}


def _summed_up(record: Any) -> dict[str, Any]:
    """The last step of a cascade's answer. Raises: EdgeftError when the answer broke off."""
    if record.finish in ("broken", "refused"):
        raise EdgeftError(f"the answer broke off: {record.error}")
    first = (record.ttft_ms or record.total_ms) / 1000
    usage = Usage(
        record.prompt_tokens, 0, record.completion_tokens, first, record.total_ms / 1000 - first, record.finish
    )
    reason = deferral_of(record.reason) if record.author != "local" else None
    origin = Origin(record.author, record.reason, False, reason, record.cost, record.confidence)
    return {"text": "", "usage": asdict(usage), "origin": asdict(origin)}


class _Refused(EdgeftError):
    """A request at fault: the client's error, not the server's."""


def _prompt(session: Session, work: Work, overflow: Overflow) -> TokenIds:
    """Raises: _Refused when the template cannot render the messages, or the context is too short for them."""
    try:
        if work.prompt is not None:
            prompt = session.tokenize(work.prompt, special=True, bos=True)
        else:
            tools = list(work.tools) or None
            prompt = fit(session, work.messages, overflow, work.sampling.max_tokens, tools).prompt
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
