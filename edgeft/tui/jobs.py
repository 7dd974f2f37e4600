"""One job: its progress, what it writes, cancel, try again, the next step."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.message import Message
from textual.widgets import Footer, Label, ProgressBar, RichLog, Static

from edgeft import jobs
from edgeft.jobs import Event, Job
from edgeft.tui.actions import command_line
from edgeft.tui.control import CONTROLS, JobControl

REFRESH_S = 0.5


class JobScreen(JobControl):
    """Reads the job's folder, as `edgeft jobs watch` in another terminal may do at the same time."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,q", "app.pop_screen", "Back"),
        *CONTROLS,
        Binding("p", "curves", "Curves"),
        Binding("c", "copy", "Copy command"),
    ]
    HELP = """The job goes on when you leave this screen, or edgeft, or the connection breaks.

**x** stops it as Ctrl-C would: training writes a checkpoint first. **Space** pauses it and lets it go on. **r** starts
a job that failed again; a training goes on where it was. **p** shows the curves of a training. When it has ended well,
**Enter** does what one would do next with what it made."""

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
        was = self.job
        self.see_job()
        now = self.job
        code = f" (exit code {now.code})" if now.code else ""
        self.query_one("#state", Label).update(f"{now.id}: {now.state}{code}, in {now.directory}{self.then()}")
        self._show_progress()
        for name in self._read:
            self._copy(name, now.folder / name)
        if now.state is not was.state:
            self.refresh_bindings()
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
            self.query_one("#stage", Label).update(_stage(event))

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
    def _say(self) -> None:
        self.say_ended()

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        if action == "curves":
            return self.job.command[0] == "train" and self.job.made is not None
        return super().check_action(action, parameters)

    def action_curves(self) -> None:
        from edgeft.run import Run
        from edgeft.tui.curves import CurvesScreen

        if self.job.made:
            self.app.push_screen(CurvesScreen([Run(self.job.made)]))

    def action_copy(self) -> None:
        self.app.copy_to_clipboard(command_line(self.job.command))
        self.notify("copied")


def _stage(event: Event) -> str:
    unit = (
        f"{event.done:.0f} of {event.total:.0f} {event.unit}".strip()
        if event.total and event.unit not in ("bytes", "B")
        else ""
    )
    return f"{event.label}  {unit}  {event.note}"
