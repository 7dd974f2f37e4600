"""`edgeft jobs`: long tasks that outlive the terminal that began them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgeft.cli._output import ConsoleProgress, dry_run_option, json_option, note, print_json, print_table
from edgeft.errors import ExitCode

if TYPE_CHECKING:
    from edgeft.jobs import Event, Job

_EXAMPLES = """\b
Examples:
  edgeft jobs start train --model smollm2-135m --data smart-home --out runs/home
  edgeft jobs start --after last export runs/home --to gguf-q4
  edgeft jobs watch last
  edgeft jobs logs train-4f1c02 --follow
"""


@click.group(epilog=_EXAMPLES)
def jobs() -> None:
    """Long tasks in the background: start, watch, cancel, try again.

    A job goes on when the terminal closes or the connection breaks; it can be watched from several terminals at once.
    It is named by its id, by the beginning of its id, or by `last`.
    """


@jobs.command("start", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.option("--after", metavar="JOB", help="Begin when this job has ended well; not at all if it fails.")
@click.option("--notify", metavar="COMMAND", help="Shell command to run at the end; it finds EDGEFT_JOB_ID, _STATE.")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
@json_option
@dry_run_option
def start_job(command: tuple[str, ...], after: str | None, notify: str | None, as_json: bool, dry_run: bool) -> None:
    """Run `edgeft COMMAND` as a job."""
    from edgeft import jobs as workflow

    if dry_run:
        before = f" after {workflow.find_job(after).id}" if after else ""
        note(f"would start edgeft {' '.join(command)}{before}")
        return
    job = workflow.start(command, after=after, notify=notify)
    if as_json:
        print_json(_as_dict(job))
    else:
        click.echo(job.id)
        note(f"edgeft jobs watch {job.id}")


@jobs.command("list")
@json_option
def list_all(as_json: bool) -> None:
    """All jobs, the newest last."""
    from edgeft.jobs import last_progress, list_jobs

    found = list_jobs()
    if as_json:
        print_json([_as_dict(job) for job in found])
        return
    rows = [(job.id, job.state.value, _where(last_progress(job.folder)), _span(job), _short(job)) for job in found]
    print_table(("job", "state", "progress", "time", "command"), rows)


@jobs.command()
@click.argument("job")
@json_option
def show(job: str, as_json: bool) -> None:
    """State, progress and the last lines of a job."""
    from edgeft.jobs import find_job, last_progress, parts

    found = find_job(job)
    if as_json:
        print_json(_as_dict(found))
        return
    click.echo(f"{found}\n  in        {found.directory}\n  state     {_state(found)}\n  time      {_span(found)}")
    if found.made:
        click.echo(f"  makes     {found.made}")
    if progress := _where(last_progress(found.folder)):
        click.echo(f"  progress  {progress}")
    for name, event in parts(found.folder).items():
        click.echo(f"  {name:<9} {_where(event)}")
    for line in [*_tail(found.stdout, 10), *_tail(found.stderr, 10)]:
        click.echo(f"  | {line}")


@jobs.command()
@click.argument("job")
@click.option("-f", "--follow", is_flag=True, help="Go on until the job ends.")
@click.option("--stdout", "only_results", is_flag=True, help="The results alone.")
def logs(job: str, follow: bool, only_results: bool) -> None:
    """What a job has written: results on stdout, the rest on stderr."""
    from edgeft.jobs import find_job, wait

    found = find_job(job)
    places = {"stdout": 0} if only_results else {"stderr": 0, "stdout": 0}

    def more(current: Job) -> None:
        for name, place in places.items():
            places[name] = place + _copy(current.folder / name, place, err=name == "stderr")

    if follow:
        wait(found, watch=more)
    more(found)


def _copy(file: Path, place: int, *, err: bool) -> int:
    """Print what came after byte `place`; how much it was."""
    try:
        with file.open("rb") as stream:
            stream.seek(place)
            block = stream.read()
    except FileNotFoundError:
        return 0
    click.echo(block.decode(errors="replace"), nl=False, err=err)
    return len(block)


@jobs.command()
@click.argument("job")
def watch(job: str) -> None:
    """Progress of a job until it ends; the exit code is the job's. Ctrl-C ends the watching, not the job."""
    from edgeft.jobs import find_job, wait

    found = find_job(job)
    bar = _Bar()
    try:
        ended = wait(found, watch=bar.update)
    finally:
        bar.finish()
    note(f"{ended.id}: {_state(ended)}")
    for line in _tail(ended.stderr, 5) if ended.code else ():
        note(f"  | {line}")
    _copy(ended.stdout, 0, err=False)
    click.get_current_context().exit(_exit_code(ended))


class _Bar:
    """The stages that a job reports, as if they were this command's own; of parts, each change in a line."""

    def __init__(self) -> None:
        self._progress = ConsoleProgress()
        self._label, self._done = "", 0.0
        self._parts: dict[str, str] = {}

    def update(self, job: Job) -> None:
        from edgeft.jobs import last_progress, parts

        if found := parts(job.folder):
            self._show_parts(found)
            return
        event = last_progress(job.folder)
        if event is None:
            return
        if event.label != self._label or event.done < self._done:
            self._progress.start(event.label, event.total, event.unit)
            self._label, self._done = event.label, 0.0
        self._progress.advance(event.done - self._done, event.note)
        self._done = event.done

    def _show_parts(self, found: dict[str, Event]) -> None:
        for name, event in found.items():
            tenths = "" if event.share is None else f" {event.share * 10 // 1 * 10:.0f}%"
            text = f"{event.label}{tenths} {event.note if event.finished else ''}".strip()
            if self._parts.get(name) != text:
                self._parts[name] = text
                note(f"{name}: {text}")

    def finish(self) -> None:
        self._progress.finish()


@jobs.command()
@click.argument("job")
@click.option("--force", is_flag=True, help="Kill it; what was not written is lost.")
def cancel(job: str, force: bool) -> None:
    """Stop a job as Ctrl-C would: training writes a checkpoint first."""
    from edgeft import jobs as workflow

    found = workflow.find_job(job)
    workflow.cancel(found, force=force)
    ended = workflow.wait(found, timeout_s=90)
    note(f"{found.id}: {_state(ended)}")


@jobs.command()
@click.argument("job")
def pause(job: str) -> None:
    """Stop a running job where it is: the processors are free, its memory stays taken."""
    from edgeft import jobs as workflow

    found = workflow.find_job(job)
    workflow.pause(found)
    note(f"{found.id}: paused; edgeft jobs resume {found.id}")


@jobs.command()
@click.argument("job")
def resume(job: str) -> None:
    """Let a paused job go on."""
    from edgeft import jobs as workflow

    found = workflow.find_job(job)
    workflow.resume(found)
    note(f"{found.id}: running")


@jobs.command()
@click.argument("job")
def finish(job: str) -> None:
    """End a training after this step and keep what it has learned: a finished run, with its adapter and its score."""
    from edgeft import jobs as workflow

    found = workflow.find_job(job)
    run = workflow.finish(found)
    note(f"{found.id}: ends after this step; then {run.path} is a finished run")


@jobs.command()
@click.argument("job")
@json_option
@dry_run_option
def retry(job: str, as_json: bool, dry_run: bool) -> None:
    """Start a failed, cancelled or lost job again; a training goes on from its last checkpoint."""
    from edgeft import jobs as workflow

    found = workflow.find_job(job)
    command = workflow.retry_command(found)
    if dry_run:
        note(f"would start edgeft {' '.join(command)}")
        return
    again = workflow.start(command, directory=found.directory, notify=found.notify)
    if as_json:
        print_json(_as_dict(again))
    else:
        click.echo(again.id)


@jobs.command("rm")
@click.argument("job", required=False)
@click.option("--ended", is_flag=True, help="All jobs that have ended.")
@dry_run_option
def remove(job: str | None, ended: bool, dry_run: bool) -> None:
    """Forget a job: its logs go, what it made stays."""
    from edgeft.errors import UsageError
    from edgeft.jobs import find_job, list_jobs, remove_job

    if (job is None) != ended:
        raise UsageError("edgeft jobs rm needs a job or --ended, one of them")
    for found in [each for each in list_jobs() if each.state.ended] if job is None else [find_job(job)]:
        if not dry_run:
            remove_job(found)
        note(f"{'would remove' if dry_run else 'removed'} {found.id}")


# --- Words ----------------------------------------------------------------------


def _as_dict(job: Job) -> dict[str, Any]:
    from dataclasses import asdict

    from edgeft.jobs import last_progress, parts

    event = last_progress(job.folder)
    return {
        "id": job.id,
        "state": job.state.value,
        "code": job.code,
        "command": ["edgeft", *job.command],
        "directory": str(job.directory),
        "created": job.created,
        "ended": job.ended,
        "seconds": round(job.seconds, 1),
        "after": job.after,
        "made": str(job.made) if job.made else None,
        "progress": asdict(event) if event else None,
        "parts": {name: asdict(part) for name, part in parts(job.folder).items()},
        "folder": str(job.folder),
    }


def _where(event: Event | None) -> str:
    if event is None:
        return ""
    share = f" {event.share:.0%}" if event.share is not None else ""
    return f"{event.label}{share} {event.note}".strip()


def _state(job: Job) -> str:
    if job.code is not None and job.code < 0:
        return f"{job.state} (ended by signal {-job.code})"
    return f"{job.state} (exit code {job.code})" if job.code else job.state.value


def _span(job: Job) -> str:
    return (
        time.strftime("%H:%M:%S", time.gmtime(job.seconds)) if job.seconds < 86400 else f"{job.seconds / 86400:.1f} d"
    )


def _short(job: Job, width: int = 60) -> str:
    text = str(job)
    return text if len(text) <= width else text[: width - 1] + "…"


def _tail(file: Path, count: int) -> Iterator[str]:
    """The last lines of a file, of its last 16 KiB at most."""
    try:
        with file.open("rb") as stream:
            stream.seek(max(0, file.stat().st_size - 16384))
            lines = stream.read().decode(errors="replace").splitlines()
    except FileNotFoundError:
        return iter(())
    return iter(lines[-count:])


def _exit_code(job: Job) -> int:
    if job.code is not None and job.code >= 0:
        return job.code
    return ExitCode.OK if job.state.value == "done" else ExitCode.FAILED
