"""The folders of jobs: reading them, finding them, removing them."""

from __future__ import annotations

import enum
import fcntl
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeft.errors import UsageError
from edgeft.jobs.events import MADE
from edgeft.paths import home, parse_json

PAUSED = "paused.json"
WAITING_S = 30.0
"""How long a job without a lock may take to begin before it counts as lost."""


class State(enum.StrEnum):
    WAITING = "waiting"
    """It begins when the job it comes after has ended well, or in an instant."""
    RUNNING = "running"
    PAUSED = "paused"
    """Its processes are stopped where they are; their memory stays taken."""
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"
    LOST = "lost"
    """Its processes ended without a word: killed, out of memory, or the machine was switched off."""

    @property
    def ended(self) -> bool:
        return self not in (State.WAITING, State.RUNNING, State.PAUSED)


@dataclass(frozen=True)
class Job:
    """One job as its folder tells it at the moment of reading."""

    id: str
    folder: Path
    command: tuple[str, ...]
    """Arguments of `edgeft`."""
    directory: Path
    """Where it was started, and where its relative paths begin."""
    created: float
    """Seconds since 1970, as all times here."""
    after: str | None
    """The job that has to end well before this one begins."""
    notify: str | None
    """A shell command to run at the end."""
    state: State
    code: int | None
    """Exit code of the command; negative: the signal that ended it."""
    ended: float | None
    made: Path | None = None
    """What it makes, as far as it has said so."""

    @property
    def stdout(self) -> Path:
        return self.folder / "stdout"

    @property
    def stderr(self) -> Path:
        return self.folder / "stderr"

    @property
    def seconds(self) -> float:
        return (self.ended or time.time()) - self.created

    def __str__(self) -> str:
        import shlex

        return shlex.join(("edgeft", *self.command))


def jobs_dir() -> Path:
    return home() / "jobs"


def list_jobs() -> list[Job]:
    """All jobs, the newest last; folders that are no jobs are passed over."""
    root = jobs_dir()
    found = (read_job(folder) for folder in root.iterdir()) if root.is_dir() else ()
    return sorted((job for job in found if job), key=lambda job: (job.created, job.id))


def find_job(name: str) -> Job:
    """The job of this id, of a beginning of an id that only one job has, or "last".

    Raises:
        UsageError: when there is none, or more than one.
    """
    jobs = list_jobs()
    if name == "last" and jobs:
        return jobs[-1]
    found = [job for job in jobs if job.id == name] or [job for job in jobs if job.id.startswith(name)]
    if len(found) == 1:
        return found[0]
    if found:
        raise UsageError(f"{name} may be {', '.join(job.id for job in found)}", "Give more of the id.")
    raise UsageError(f"there is no job {name!r}", "edgeft jobs lists them.")


def read_job(folder: Path) -> Job | None:
    """What the folder tells, or None when it holds no job."""
    asked, end = _object(folder / "job.json"), _object(folder / "exit.json")
    command = asked.get("command")
    if not isinstance(command, list):
        return None
    created = float(asked.get("created", 0))
    state = _ended_state(end) if end else _running_state(folder, created)
    if state is State.LOST and (late := _object(folder / "exit.json")):  # it ended between the two looks
        end, state = late, _ended_state(late)
    return Job(
        id=folder.name,
        folder=folder,
        command=tuple(map(str, command)),
        directory=Path(asked.get("directory", ".")),
        created=created,
        after=asked.get("after"),
        notify=asked.get("notify"),
        state=state,
        code=end.get("code"),
        ended=end.get("ended"),
        made=Path(made) if isinstance(made := _object(folder / MADE).get("made"), str) else None,
    )


def _ended_state(end: dict[str, Any]) -> State:
    if end.get("cancelled"):
        return State.CANCELLED
    return State.DONE if end.get("code") == 0 else State.FAILED


def _running_state(folder: Path, created: float) -> State:
    if is_locked(folder / "lock"):
        return State.PAUSED if (folder / PAUSED).exists() else State.RUNNING
    if is_locked(folder / "supervisor.lock") or (
        not (folder / "state.json").exists() and time.time() - created < WAITING_S
    ):
        return State.WAITING
    return State.LOST


def remove_job(job: Job) -> None:
    """Delete the folder of an ended job; what the job made elsewhere stays.

    Raises:
        UsageError: when the job has not ended.
    """
    if not job.state.ended:
        raise UsageError(f"job {job.id} is {job.state}", f"edgeft jobs cancel {job.id}")
    shutil.rmtree(job.folder)


def take_lock(path: Path) -> int:
    """Hold the lock `path` until the returned descriptor, and every copy of it in a child, is closed."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(handle, fcntl.LOCK_EX)
    return handle


def is_locked(path: Path) -> bool:
    """Whether a living process holds the lock."""
    try:
        handle = os.open(path, os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False


def _object(path: Path) -> dict[str, Any]:
    """A JSON object, or an empty one when there is no file or it is damaged."""
    try:
        value = parse_json(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def read_state(job: Job) -> dict[str, Any]:
    """Process ids of the supervisor and of the command."""
    return _object(job.folder / "state.json")
