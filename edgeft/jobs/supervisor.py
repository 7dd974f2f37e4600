"""The process beside a job: starts the command, passes signals on, and writes down how it ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

from edgeft.jobs.events import VARIABLE
from edgeft.jobs.store import Job, State, read_job, take_lock
from edgeft.jobs.work import POLL_S
from edgeft.paths import write_json

GRACE_S = 60.0
"""After a request to stop: training writes a checkpoint first. Then the command is killed."""


class Supervisor:
    """Runs one job from its first to its last instant."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = take_lock(folder / "supervisor.lock")
        job = read_job(folder)
        if job is None:
            raise SystemExit(f"{folder} holds no job")
        self._job: Job = job
        self._command: subprocess.Popen[bytes] | None = None
        self._cancelled_at: float | None = None
        self._kill = False
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._asked_to_stop)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        write_json(folder / "state.json", {"supervisor": os.getpid()})

    def _asked_to_stop(self, number: int, _frame: FrameType | None) -> None:
        first, self._kill = self._cancelled_at is None, self._kill or number == signal.SIGUSR1
        self._cancelled_at = self._cancelled_at or time.monotonic()
        if first and self._command is not None and not self._kill:
            self._command.send_signal(signal.SIGINT)

    def run(self) -> int:
        code = self._run_command() if self._wait_for_turn() else None
        end = {"code": code, "cancelled": self._cancelled_at is not None or code is None, "ended": time.time()}
        write_json(self._folder / "exit.json", end)
        self._notify()
        return 0

    def _wait_for_turn(self) -> bool:
        """Whether the job this one comes after ended well."""
        while self._job.after and self._cancelled_at is None:
            before = read_job(self._folder.parent / self._job.after)
            if before is None or before.state.ended:
                return before is not None and before.state is State.DONE
            time.sleep(POLL_S)
        return self._cancelled_at is None

    def _run_command(self) -> int:
        lock = take_lock(self._folder / "lock")
        environment = {**os.environ, VARIABLE: str(self._folder), "PYTHONUNBUFFERED": "1"}
        with (self._folder / "stdout").open("ab") as out, (self._folder / "stderr").open("ab") as errors:
            self._command = subprocess.Popen(
                [sys.executable, "-m", "edgeft", *self._job.command],
                cwd=self._job.directory if self._job.directory.is_dir() else None,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=errors,
                env=environment,
                pass_fds=(lock,),  # if this process is killed, the command still counts as running
                process_group=0,
            )
        os.close(lock)
        write_json(self._folder / "state.json", {"supervisor": os.getpid(), "command": self._command.pid})
        if self._cancelled_at is not None and not self._kill:  # asked while the command was being started
            self._command.send_signal(signal.SIGINT)
        while self._command.poll() is None:
            overdue = self._cancelled_at is not None and time.monotonic() - self._cancelled_at > GRACE_S
            if self._kill or overdue:
                os.killpg(self._command.pid, signal.SIGKILL)
            time.sleep(POLL_S)
        return self._command.returncode

    def _notify(self) -> None:
        job = read_job(self._folder)
        if job is None or not job.notify:
            return
        about = {"EDGEFT_JOB_ID": job.id, "EDGEFT_JOB_STATE": job.state.value, "EDGEFT_JOB_COMMAND": str(job)}
        subprocess.run(job.notify, shell=True, env={**os.environ, **about}, timeout=60, check=False)


if __name__ == "__main__":
    if os.fork():  # whoever starts a job has no child to wait for
        os._exit(0)
    sys.exit(Supervisor(Path(sys.argv[1])).run())
