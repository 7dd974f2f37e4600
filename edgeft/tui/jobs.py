"""One job: its progress, what it writes, cancel, try again."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from textual import on, work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.message import Message
from textual.screen import Screen
from textual.widgets import Footer, Label, ProgressBar, RichLog, Static

from edgeft import jobs
from edgeft.errors import EdgeftError
from edgeft.jobs import Job, State

REFRESH_S = 0.5


class JobScreen(Screen[None]):
    """Reads the job's folder, as `edgeft jobs watch` in another terminal may do at the same time."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,q", "app.pop_screen", "Back"),
        Binding("x", "cancel", "Cancel the job"),
        Binding("r", "retry", "Try again"),
        Binding("p", "curves", "Curves"),
        Binding("c", "copy", "Copy command"),
    ]
    HELP = """The job goes on when you leave this screen, or edgeft, or the connection breaks.

**x** stops it as Ctrl-C would: training writes a checkpoint first. **r** starts a job that failed again; a training
goes on where it was. **p** shows the curves of a training."""

    class Ended(Message):
        """The job has ended while it was watched."""

        def __init__(self, job: Job) -> None:
            super().__init__()
            self.job = job

    def __init__(self, job: Job) -> None:
        super().__init__()
        self.job = job
        self._read = {"stderr": 0, "stdout": 0}

    def compose(self) -> ComposeResult:
        yield Static(f"$ {self.job}", classes="command", markup=False)
        yield Label("", id="state", markup=False)
        yield ProgressBar(show_eta=True, id="bar")
        yield Label("", id="stage", markup=False)
        yield RichLog(wrap=True, markup=False, id="log")
        yield Footer(show_command_palette=False)

    def on_mount(self) -> None:
        self._look()
        self._timer = self.set_interval(REFRESH_S, self._look)

    def _look(self) -> None:
        now = jobs.find_job(self.job.id) if self.job.folder.is_dir() else self.job
        was, self.job = self.job, now
        code = f" (exit code {now.code})" if now.code else ""
        self.query_one("#state", Label).update(f"{now.id}: {now.state}{code}, in {now.directory}")
        self._show_progress()
        for name in self._read:
            self._copy(name, now.folder / name)
        if now.state.ended and not was.state.ended:
            self.post_message(self.Ended(now))
        if now.state.ended:
            self._timer.stop() if hasattr(self, "_timer") else None

    def _show_progress(self) -> None:
        event = jobs.last_progress(self.job.folder)
        bar = self.query_one("#bar", ProgressBar)
        bar.display = event is not None and not self.job.state.ended
        if event is not None:
            bar.update(total=event.total, progress=event.done)
            self.query_one("#stage", Label).update(f"{event.label} {event.note}")

    def _copy(self, name: str, file: Path) -> None:
        try:
            with file.open("rb") as stream:
                stream.seek(self._read[name])
                block = stream.read(1 << 20)
        except OSError:
            return
        self._read[name] += len(block)
        if block:
            self.query_one(RichLog).write(block.decode(errors="replace").rstrip("\n"))

    @on(Ended)
    def _say(self, event: Ended) -> None:
        good = event.job.state is State.DONE
        self.notify(f"{event.job.id}: {event.job.state}", severity="information" if good else "warning")

    @work(thread=True)
    def action_cancel(self) -> None:
        try:
            jobs.cancel(self.job)
        except EdgeftError as error:
            self.app.call_from_thread(self.notify, error.message, severity="warning")

    def action_retry(self) -> None:
        try:
            again = jobs.start(jobs.retry_command(self.job), directory=self.job.directory, notify=self.job.notify)
        except EdgeftError as error:
            self.notify(error.message, severity="warning")
        else:
            self.app.switch_screen(JobScreen(again))

    def action_curves(self) -> None:
        from edgeft.tui.curves import CurvesScreen, run_of

        if run := run_of(self.job):
            self.app.push_screen(CurvesScreen([run]))
        else:
            self.notify("this job trains nothing", severity="warning")

    def action_copy(self) -> None:
        self.app.copy_to_clipboard(str(self.job))
        self.notify("copied")
