"""Running measuring processes."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator

from edgeft.bench.job import Event, Failed, Job, from_json
from edgeft.errors import CheckFailed, EdgeftError, MissingDependency, ModelError, UsageError
from edgeft.paths import parse_json

_ERRORS: dict[int, type[EdgeftError]] = {2: UsageError, 3: MissingDependency, 5: CheckFailed}


def run(job: Job) -> Iterator[Event]:
    """Events of one job as they come; leaving the stream ends the process.

    Raises:
        EdgeftError: what the process said, or ModelError when it ended without a word.
    """
    with tempfile.TemporaryFile() as errors:
        # A session of its own: Ctrl-C in a terminal reaches the parent alone, which then ends this one.
        process = subprocess.Popen(
            [sys.executable, "-m", "edgeft.bench.worker"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True,
        )  # fmt: skip
        try:
            yield from _events(process, job)
            if process.wait():
                errors.seek(0)
                raise _crashed(job, process.returncode, errors.read().decode("utf-8", "replace"))
        finally:
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()


def _events(process: subprocess.Popen[str], job: Job) -> Iterator[Event]:
    assert process.stdin is not None and process.stdout is not None
    with contextlib.suppress(BrokenPipeError):  # it ended at once: its exit code says why
        process.stdin.write(json.dumps(job.as_dict()))
        process.stdin.close()
    for line in process.stdout:
        event = from_json(parse_json(line))
        if isinstance(event, Failed):
            raise _ERRORS.get(event.code, ModelError)(event.message, event.hint)
        yield event


def _crashed(job: Job, code: int, said: str) -> ModelError:
    what = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    last = said.strip().splitlines()[-1:] or ["it said nothing"]
    return ModelError(f"the process with {job.model} on {job.runtime} ended with {what}: {last[0][:300]}")
