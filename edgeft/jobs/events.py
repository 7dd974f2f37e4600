"""Progress of a job as lines of JSON, written by the command and read by whoever watches."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from edgeft.errors import WriteError
from edgeft.paths import parse_json, write_json

VARIABLE = "EDGEFT_JOB"
"""The folder of the job that a command runs for."""
MADE = "made.json"
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
    part: str = ""
    """Which of several things that are done side by side, such as a device of a fleet."""

    @property
    def share(self) -> float | None:
        return min(self.done / self.total, 1.0) if self.total else None


class JobEvents:
    """Writes events; never raises: a full disk must not end the work that is watched."""

    def __init__(self, folder: Path, part: str = "") -> None:
        self._folder, self._part = folder, part
        self._file = folder / "events.jsonl"
        self._stage: Event | None = None
        self._written = 0.0

    @classmethod
    def from_environment(cls, part: str = "") -> JobEvents | None:
        folder = os.environ.get(VARIABLE)
        return cls(Path(folder), part) if folder else None

    def made(self, path: Path) -> None:
        """What the job makes, or has looked at: where the next step begins."""
        with contextlib.suppress(WriteError):
            write_json(self._folder / MADE, {"made": str(path.absolute())})

    def tell(self, label: str, note: str) -> None:
        """The state of a part, outside of any stage."""
        self.finish()
        self._write(Event(time.time(), label, 0.0, None, "", note, True, self._part))
        self._stage = None

    def start(self, label: str, total: float | None, unit: str) -> None:
        self.finish()
        self._write(Event(time.time(), label, 0.0, total, unit, "", False, self._part))

    def at(self, done: float, note: str) -> None:
        stage = self._stage
        if stage is None:
            return
        event = dataclasses.replace(stage, time=time.time(), done=done, note=note)
        if time.monotonic() - self._written >= INTERVAL_S:
            self._write(event)
        else:
            self._stage = event

    def finish(self) -> None:
        if (stage := self._stage) is not None:
            self._write(dataclasses.replace(stage, time=time.time(), finished=True))
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


def parts(folder: Path) -> dict[str, Event]:
    """The newest event of every part, in the order in which they began."""
    return {event.part: event for event in read_events(folder) if event.part}


def last_progress(folder: Path) -> Event | None:
    """The newest event."""
    newest = deque(read_events(folder), maxlen=1)
    return newest[0] if newest else None
