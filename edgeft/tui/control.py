"""What screens that watch a job have in common: pause, cancel, try again, the next step."""

from __future__ import annotations

from collections.abc import Callable

from textual import work
from textual.binding import Binding
from textual.screen import Screen

from edgeft import jobs
from edgeft.errors import EdgeftError
from edgeft.jobs import Job, State
from edgeft.tui.workflows import application, next_step, watching

CONTROLS = (
    Binding("enter", "next", "Next step"),
    Binding("space", "pause", "Pause/go on"),
    Binding("x", "cancel", "Stop"),
    Binding("r", "retry", "Try again"),
)


class JobControl(Screen[None]):
    """Keys that act on `job`; those that cannot act now are hidden."""

    job: Job

    def see_job(self) -> None:
        """Read the job's folder again, if it is still there."""
        if self.job.folder.is_dir():
            self.job = jobs.find_job(self.job.id)

    def say_ended(self) -> None:
        good = self.job.state is State.DONE
        self.notify(f"{self.job.id}: {self.job.state}", severity="information" if good else "warning")

    def then(self) -> str:
        """The next step, in words."""
        step = next_step(self.job)
        return f"; Enter: {step.line}" if step else ""

    def told(self, what: Callable[[Job], object], job: Job) -> bool:
        """Whether it could be done; if not, why not is said."""
        try:
            what(job)
        except EdgeftError as error:
            self.notify(error.message, severity="warning", markup=False)
            return False
        return True

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        state = self.job.state
        if action == "next":
            return state is State.DONE and self.job.made is not None
        if action == "pause":
            return state in (State.RUNNING, State.PAUSED)
        if action == "cancel":
            return not state.ended
        return state.ended and state is not State.DONE if action == "retry" else True

    def action_next(self) -> None:
        if step := next_step(self.job):
            application(self).do(step)

    def action_pause(self) -> None:
        self.see_job()
        self.told(jobs.resume if self.job.state is State.PAUSED else jobs.pause, self.job)

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
            self.notify(error.message, severity="warning", markup=False)
        else:
            application(self).switch_screen(watching(again, application(self).commands))
