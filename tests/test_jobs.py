"""Jobs outlive the terminal, are watched from anywhere, and tell how they ended."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from edgeft import jobs
from edgeft.cli.main import main
from edgeft.errors import UsageError
from edgeft.jobs import Job, State
from edgeft.jobs.store import read_job, read_state

QUICK = ("config", "show", "--json")


def slow_command(folder: Path) -> tuple[str, ...]:
    """An answer of the scripted runtime that takes minutes: it runs until it is stopped."""
    script = folder / "slow.echo.json"
    script.write_text(json.dumps({"default": "word " * 500, "delay_ms": 100}))
    return ("run", str(script), "hello", "--max-tokens", "2000")


def until(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def now(job: Job) -> Job:
    found = read_job(job.folder)
    assert found
    return found


def running(job: Job) -> None:
    until(lambda: now(job).state is State.RUNNING and "command" in read_state(job))
    until(lambda: job.stdout.exists() and job.stdout.stat().st_size > 0)  # it is past its own start


def test_a_job_runs_and_keeps_its_results(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["jobs", "start", *QUICK]) == 0
    name = capfd.readouterr().out.strip()
    assert main(["jobs", "watch", name]) == 0
    assert "run.runtime" in capfd.readouterr().out
    job = jobs.find_job("last")
    assert (job.id, job.state, job.code) == (name, State.DONE, 0)


def test_a_failed_job_has_the_exit_code_and_the_error_of_its_command(capfd: pytest.CaptureFixture[str]) -> None:
    job = jobs.start(["run", "no-such-model", "hello"])
    assert main(["jobs", "watch", job.id]) not in (0, None)
    assert "no-such-model" in capfd.readouterr().err
    assert now(job).state is State.FAILED


def test_what_runs_is_named_after_its_command_and_found_by_a_beginning() -> None:
    first, second = jobs.start(QUICK), jobs.start(["doctor", "--json"])
    assert first.id.startswith("config-") and jobs.find_job("doc").id == second.id
    with pytest.raises(UsageError, match="no job 'train'"):
        jobs.find_job("train")
    assert [job.id for job in jobs.list_jobs()] == [first.id, second.id]


def test_cancel_stops_the_command_as_ctrl_c_does(tmp_path: Path) -> None:
    job = jobs.start(slow_command(tmp_path))
    running(job)
    assert main(["jobs", "cancel", job.id]) == 0
    assert (now(job).state, now(job).code) == (State.CANCELLED, 130)
    with pytest.raises(UsageError, match="has ended"):
        jobs.cancel(now(job))


def test_force_kills(tmp_path: Path) -> None:
    job = jobs.start(slow_command(tmp_path))
    running(job)
    jobs.cancel(now(job), force=True)
    assert jobs.wait(job, 20).code == -signal.SIGKILL


def test_a_paused_job_computes_nothing_until_it_goes_on_or_is_cancelled(tmp_path: Path) -> None:
    job = jobs.start(slow_command(tmp_path))
    running(job)
    assert main(["jobs", "pause", job.id]) == 0
    assert now(job).state is State.PAUSED and not now(job).state.ended
    size = job.stdout.stat().st_size
    time.sleep(0.5)
    assert job.stdout.stat().st_size == size
    assert main(["jobs", "pause", job.id]) == 2  # only what runs
    assert main(["jobs", "resume", job.id]) == 0
    until(lambda: job.stdout.stat().st_size > size)
    assert now(job).state is State.RUNNING
    assert main(["jobs", "resume", job.id]) == 2
    assert main(["jobs", "pause", job.id]) == 0
    assert main(["jobs", "cancel", job.id]) == 0
    assert (now(job).state, now(job).code) == (State.CANCELLED, 130)


def test_only_a_training_can_be_finished_early(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = jobs.start(slow_command(tmp_path))
    running(job)
    assert main(["jobs", "finish", job.id]) == 2
    assert "trains nothing" in capsys.readouterr().err
    jobs.cancel(now(job), force=True)


def test_parts_that_go_on_side_by_side_are_told_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = jobs.start(slow_command(tmp_path))
    kitchen, hall = (jobs.JobEvents(job.folder, name) for name in ("kitchen", "hall"))
    kitchen.start("Sending", 10, "bytes")
    hall.tell("waiting", "")
    kitchen.at(5, "")
    kitchen.finish()
    kitchen.tell("updated", "pet-1.0")
    found = jobs.parts(job.folder)
    assert [(name, event.label) for name, event in found.items()] == [("kitchen", "updated"), ("hall", "waiting")]
    sending = [event.done for event in jobs.read_events(job.folder) if event.label == "Sending"]
    assert sending == [0, 5]
    assert main(["jobs", "show", job.id]) == 0
    assert "kitchen   updated pet-1.0" in capsys.readouterr().out
    jobs.cancel(now(job), force=True)


def test_a_job_outlives_the_terminal_that_began_it(tmp_path: Path) -> None:
    """Its starter's whole process group is hung up and killed, as when a connection breaks."""
    code = f"from edgeft import jobs; import time; jobs.start({slow_command(tmp_path)!r}); time.sleep(60)"
    starter = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    until(lambda: bool(jobs.list_jobs()))
    job = jobs.list_jobs()[0]
    running(job)
    os.killpg(starter.pid, signal.SIGHUP)
    os.killpg(starter.pid, signal.SIGKILL)
    starter.wait()
    size = job.stdout.stat().st_size
    until(lambda: job.stdout.stat().st_size > size)
    assert now(job).state is State.RUNNING
    jobs.cancel(now(job), force=True)


def test_a_killed_supervisor_does_not_hide_a_running_command(tmp_path: Path) -> None:
    job = jobs.start(slow_command(tmp_path))
    running(job)
    os.kill(read_state(job)["supervisor"], signal.SIGKILL)
    time.sleep(0.2)
    assert now(job).state is State.RUNNING
    jobs.cancel(now(job))
    until(lambda: now(job).state is State.LOST)


def test_a_job_after_another_waits_for_it_and_does_not_begin_when_it_fails(tmp_path: Path) -> None:
    first = jobs.start(slow_command(tmp_path))
    running(first)
    second = jobs.start(QUICK, after=first.id)
    until(lambda: "supervisor" in read_state(second))
    assert now(second).state is State.WAITING
    jobs.cancel(now(first), force=True)
    assert jobs.wait(second, 20).state is State.CANCELLED
    good = jobs.start(QUICK)
    assert jobs.wait(jobs.start(QUICK, after=good.id), 20).state is State.DONE


def test_progress_is_written_for_whoever_watches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from edgeft.cli._output import ConsoleProgress

    monkeypatch.setenv("EDGEFT_JOB", str(tmp_path))
    progress = ConsoleProgress()
    progress.start("quantize", 10, "tensors")
    progress.advance(4, "blk.0")
    progress.finish()
    with (tmp_path / "events.jsonl").open("a") as stream:
        stream.write('{"half a line')
    events = list(jobs.read_events(tmp_path))
    assert [(event.done, event.finished) for event in events] == [(0, False), (4, True)]
    assert events[-1].share == 0.4 and events[-1].note == "blk.0"


def test_retry_continues_a_training_where_it_left_off(tmp_path: Path) -> None:
    command = ("train", "--model", "m", "--data", "d", "--out", "run")
    job = jobs.start(command, directory=tmp_path)
    job = jobs.wait(job, 30)
    assert jobs.retry_command(job) == command
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.toml").touch()
    assert jobs.retry_command(job) == ("train", "--resume", "run")


def test_the_end_runs_a_command(tmp_path: Path) -> None:
    said = tmp_path / "said"
    job = jobs.start(QUICK, notify=f'echo "$EDGEFT_JOB_ID $EDGEFT_JOB_STATE" > {said}')
    until(lambda: said.exists() and bool(said.read_text()))
    assert said.read_text() == f"{job.id} done\n"


def test_rm_forgets_ended_jobs_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ended, other = jobs.start(QUICK), jobs.start(slow_command(tmp_path))
    jobs.wait(ended, 20)
    running(other)
    assert main(["jobs", "rm", "--ended"]) == 0
    assert [job.id for job in jobs.list_jobs()] == [other.id]
    assert main(["jobs", "rm", other.id]) == 2
    jobs.cancel(now(other), force=True)


def test_damaged_folders_are_passed_over(tmp_path: Path) -> None:
    job = jobs.wait(jobs.start(QUICK), 20)
    for name, text in (("a", "{"), ("b", "[]"), ("c", '{"command": 3}')):
        (jobs.jobs_dir() / name).mkdir()
        (jobs.jobs_dir() / name / "job.json").write_text(text)
    assert [found.id for found in jobs.list_jobs()] == [job.id]


def test_what_makes_no_sense_as_a_job_is_refused() -> None:
    assert main(["jobs", "start", "jobs", "list"]) == 2
    assert main(["jobs", "start", "--", "--json"]) == 2
    assert main(["jobs", "rm"]) == 2
    assert not jobs.list_jobs()
