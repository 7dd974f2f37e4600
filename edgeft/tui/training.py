"""A training while it runs: its curves, and the keys that pause it, stop it, finish it, go on."""

from __future__ import annotations

from typing import ClassVar

from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.message import Message
from textual.widgets import Static

from edgeft import jobs
from edgeft.jobs import Job, State
from edgeft.run import Run
from edgeft.tui.actions import command_line
from edgeft.tui.control import CONTROLS, JobControl
from edgeft.tui.curves import CurvesScreen

POLL_S = 0.5


class TrainingScreen(CurvesScreen, JobControl):
    """The curves of the run that a job trains."""

    BINDINGS: ClassVar[list[BindingType]] = [
        *CONTROLS,
        Binding("f", "finish", "Finish now"),
        Binding("l", "log", "Output"),
    ]
    HELP = (
        """The training goes on when you leave this screen, or edgeft, or the connection breaks.

**Space** pauses it where it is and lets it go on: the processors are free meanwhile, its memory is not. **x** stops it
after a checkpoint, which frees both; **r** goes on from there. **f** ends it after this step and keeps what it has
learned, as a finished run. **l** shows what it says; when it has ended, **Enter** does the next step.

"""
        + CurvesScreen.HELP
    )

    class Ended(Message):
        """The training has ended while it was watched."""

    def __init__(self, job: Job) -> None:
        super().__init__([Run(job.made)] if job.made else [])
        self.job = job

    def above(self) -> ComposeResult:
        yield Static("", id="state", classes="command", markup=False)

    def on_mount(self) -> None:
        self._follow()
        self.set_interval(POLL_S, self._follow)

    @property
    def command(self) -> tuple[str, ...]:
        return super().command if self.runs else self.job.command

    def _look(self) -> None:
        if self.runs:
            super()._look()
        else:
            self.query_one("#line", Static).update("$ " + command_line(self.command))

    def _follow(self) -> None:
        was = self.job
        self.see_job()
        if self.job.made and not self.runs:
            self.runs = [Run(self.job.made)]
            self._look()
        event = jobs.last_progress(self.job.folder)
        doing = f", {event.label} {event.note}" if event and not self.job.state.ended else ""
        self.query_one("#state", Static).update(f"{self.job.id}: {self.job.state}{doing}{self.then()}{self._why()}")
        if self.job.state is not was.state:
            self.refresh_bindings()
            if self.job.state.ended:
                self.post_message(self.Ended())

    def _why(self) -> str:
        """The end of what a failed job said."""
        if self.job.state not in (State.FAILED, State.LOST) or not self.job.stderr.is_file():
            return ""
        lines = self.job.stderr.read_text(errors="replace").strip().splitlines()[-2:]
        return "\n" + "\n".join(lines)

    @on(Ended)
    def _say_ended(self) -> None:
        self.say_ended()

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        if action == "finish":
            return not self.job.state.ended and bool(self.runs)
        if action in ("samples", "compare"):
            return bool(self.runs) and CurvesScreen.check_action(self, action, parameters)
        return JobControl.check_action(self, action, parameters)

    def action_finish(self) -> None:
        if self.told(jobs.finish, self.job):
            self.notify("it ends after this step and keeps what it has learned")

    def action_log(self) -> None:
        from edgeft.tui.jobs import JobScreen

        self.app.push_screen(JobScreen(self.job))
