"""Progress of a job as lines of JSON, written by the command and read by whoever watches."""

from __future__ import annotations

import json
import os
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from edgeft.paths import parse_json

VARIABLE = "EDGEFT_JOB"
"""The folder of the job that a command runs for."""
INTERVAL_S = 0.5
"""Between two lines about the same stage."""


@dataclass(frozen=True)
class Event:
    """Where a stage of the work is."""

    time: float
    label: str
    done: float
    total: float | None
    """In `unit`; None: not known."""
    unit: str
    note: str
    finished: bool

    @property
    def share(self) -> float | None:
        return min(self.done / self.total, 1.0) if self.total else None


class JobEvents:
    """Writes events; never raises: a full disk must not end the work that is watched."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "events.jsonl"
        self._stage: Event | None = None
        self._written = 0.0

    @classmethod
    def from_environment(cls) -> JobEvents | None:
        folder = os.environ.get(VARIABLE)
        return cls(Path(folder)) if folder else None

    def start(self, label: str, total: float | None, unit: str) -> None:
        self.finish()
        self._write(Event(time.time(), label, 0.0, total, unit, "", False))

    def at(self, done: float, note: str) -> None:
        stage = self._stage
        if stage is None:
            return
        event = Event(time.time(), stage.label, done, stage.total, stage.unit, note, False)
        if time.monotonic() - self._written >= INTERVAL_S:
            self._write(event)
        else:
            self._stage = event

    def finish(self) -> None:
        if (stage := self._stage) is not None:
            self._write(Event(time.time(), stage.label, stage.done, stage.total, stage.unit, stage.note, True))
            self._stage = None

    def _write(self, event: Event) -> None:
        self._stage, self._written = event, time.monotonic()
        try:
            # One write of a short line: lines of several processes do not mix.
            with self._file.open("a") as stream:
                stream.write(json.dumps(asdict(event)) + "\n")
        except OSError:
            pass


def read_events(folder: Path) -> Iterator[Event]:
    """All events so far; damaged lines are passed over."""
    try:
        lines = (folder / "events.jsonl").read_bytes().splitlines()
    except OSError:
        return
    for line in lines:
        try:
            yield Event(**parse_json(line))
        except (ValueError, TypeError):
            continue


def last_progress(folder: Path) -> Event | None:
    """The newest event."""
    newest = deque(read_events(folder), maxlen=1)
    return newest[0] if newest else None
