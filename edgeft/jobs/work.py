"""Starting jobs, waiting for them, ending them."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from edgeft.errors import UsageError, WriteError
from edgeft.jobs.store import PAUSED, Job, State, find_job, is_locked, jobs_dir, read_job, read_state
from edgeft.paths import write_json
from edgeft.run import Run

POLL_S = 0.2


def start(
    command: Sequence[str], *, directory: Path | None = None, after: str | None = None, notify: str | None = None
) -> Job:
    """Start `edgeft COMMAND` in a process of its own, in a session of its own: no terminal's end ends it.

    Args:
        command: arguments of `edgeft`. They are kept in a file: secrets belong into the environment.
        directory: where it runs; default: here.
        after: id of a job that has to end well first; this one is cancelled if it does not.
        notify: a shell command to run at the end; it finds EDGEFT_JOB_ID, EDGEFT_JOB_STATE and EDGEFT_JOB_COMMAND in
            its environment.

    Raises:
        UsageError: when there is no command, or it makes no sense as a job.
        WriteError: when the folder cannot be written.
    """
    if not command or command[0].startswith("-"):
        raise UsageError("a job needs a command of edgeft", "For example: edgeft jobs start train --model M --data D")
    if command[0] == "jobs":
        raise UsageError("a job that starts jobs is none", "Give the command itself.")
    folder = _new_folder(command[0])
    asked: dict[str, Any] = {
        "command": list(command),
        "directory": str((directory or Path.cwd()).absolute()),
        "created": time.time(),
        "after": find_job(after).id if after else None,
        "notify": notify,
    }
    write_json(folder / "job.json", asked)
    with (folder / "supervisor.log").open("wb") as log:
        subprocess.run(  # returns at once: the supervisor leaves for the background
            [sys.executable, "-m", "edgeft.jobs.supervisor", str(folder)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            check=True,
        )
    job = read_job(folder)
    assert job is not None
    return job


def _new_folder(verb: str) -> Path:
    root = jobs_dir()
    try:
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
        while True:
            folder = root / f"{verb}-{secrets.token_hex(3)}"
            with suppress(FileExistsError):
                folder.mkdir(mode=0o700)
                return folder
    except OSError as error:
        raise WriteError.from_os_error(error, root) from error


def wait(job: Job, timeout_s: float = float("inf"), watch: Callable[[Job], None] | None = None) -> Job:
    """The job when it has ended, or as it is after `timeout_s`; `watch` sees it five times a second."""
    deadline = time.monotonic() + timeout_s
    while True:
        now = read_job(job.folder)
        if now is None:
            raise UsageError(f"job {job.id} was removed")
        if watch:
            watch(now)
        if now.state.ended or time.monotonic() > deadline:
            return now
        time.sleep(POLL_S)


def cancel(job: Job, *, force: bool = False) -> None:
    """Ask the job to stop as Ctrl-C does, so that it keeps what can be kept; or kill it.

    Raises:
        UsageError: when the job has ended already.
    """
    if job.state.ended:
        raise UsageError(f"job {job.id} has ended: {job.state}")
    ids = read_state(job)
    # The locks say which process ids are still theirs.
    if is_locked(job.folder / "supervisor.lock"):
        _send(ids.get("supervisor"), signal.SIGUSR1 if force else signal.SIGTERM)
    elif is_locked(job.folder / "lock"):
        _send(ids.get("command"), signal.SIGKILL if force else signal.SIGINT)
    if job.state is State.PAUSED:
        _continue(job)


def pause(job: Job) -> None:
    """Stop the command where it is: the processors are free, its memory stays taken. A reboot ends it as a kill would.

    Raises:
        UsageError: when it does not run.
    """
    if job.state is not State.RUNNING or not isinstance(read_state(job).get("command"), int):
        raise UsageError(f"job {job.id} is {job.state}: only what runs can be paused")
    write_json(job.folder / PAUSED, {"since": time.time()})
    _send_all(job, signal.SIGSTOP)


def resume(job: Job) -> None:
    """Let a paused job go on.

    Raises:
        UsageError: when it is not paused.
    """
    if job.state is not State.PAUSED:
        again = " edgeft jobs retry goes on from its checkpoint." if job.state.ended else ""
        raise UsageError(f"job {job.id} is {job.state}, not paused", again.strip() or None)
    _continue(job)


def _continue(job: Job) -> None:
    (job.folder / PAUSED).unlink(missing_ok=True)
    _send_all(job, signal.SIGCONT)


def finish(job: Job) -> Run:
    """Ask a training to end after this step and to keep what it has learned, as a finished run.

    Raises:
        UsageError: when the job trains nothing, or does not run.
    """
    if job.command[0] != "train" or job.made is None:
        raise UsageError(f"job {job.id} trains nothing, or has not begun to")
    if job.state.ended:
        hint = f"edgeft train --resume {job.made} --finish keeps what it has learned."
        raise UsageError(f"job {job.id} has ended: {job.state}", hint)
    run = Run(job.made)
    run.ask_to_finish()
    if job.state is State.PAUSED:
        _continue(job)
    return run


def _send(process: object, number: signal.Signals) -> None:
    if isinstance(process, int):
        with suppress(ProcessLookupError):
            os.kill(process, number)


def _send_all(job: Job, number: signal.Signals) -> None:
    """To the command's process group. Its lock says whether the id is still its own."""
    command = read_state(job).get("command")
    if isinstance(command, int) and is_locked(job.folder / "lock"):
        with suppress(ProcessLookupError):
            os.killpg(command, number)


def retry_command(job: Job) -> tuple[str, ...]:
    """The command to run again; a training that left a run behind is continued.

    Raises:
        UsageError: when the job has not failed.
    """
    if not job.state.ended or job.state is State.DONE:
        raise UsageError(f"job {job.id} is {job.state}: there is nothing to try again")
    command = job.command
    if command[0] == "train" and "--resume" not in command:
        out = _value(command, "--out") or (str(job.made) if job.made else None)
        if out and (job.directory / out / "config.toml").is_file():
            return ("train", "--resume", out)
    return command


def _value(command: Sequence[str], option: str) -> str | None:
    for index, word in enumerate(command):
        if word == option and index + 1 < len(command):
            return command[index + 1]
        if word.startswith(option + "="):
            return word.partition("=")[2]
    return None
