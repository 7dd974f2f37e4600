"""Bundles on devices: where each device stands while a version is sent, what is installed there, and the way back."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import click
from textual import on, work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal
from textual.screen import Screen
from textual.widgets import DataTable, Footer, Input, Label, Static

from edgeft import jobs
from edgeft.errors import EdgeftError
from edgeft.jobs import Event, Job
from edgeft.tui.actions import Action, How, command_line
from edgeft.tui.forms import arguments, find_command, values_of
from edgeft.tui.inputs import Field
from edgeft.tui.output import run_command
from edgeft.tui.workflows import application

REFRESH_S = 0.5
DEVICES = ("device", "in use", "now", "progress", "said")
VERSIONS = ("name", "version", "", "installed", "id")
_REACH = ("inventory", "only", "identity", "port", "known_hosts", "python", "root", "bin_folder")
"""What status and rollback need to know of devices, besides their addresses."""


class DeployScreen(Screen[None]):
    """Devices above, each with its progress; below the versions on the one under the cursor."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "app.pop_screen", "Back"),
        Binding("ctrl+s", "send", "Send"),
        Binding("f5", "status", "Status"),
        Binding("f7", "rollback", "Roll back"),
        Binding("f6", "cancel", "Cancel"),
        Binding("f2", "form", "All options"),
        Binding("f3", "copy", "Copy"),
        Binding("f4", "log", "Output"),
    ]
    HELP = """A bundle, and the devices it goes to: addresses as for ssh, separated by spaces, or the file of a fleet.

**Ctrl+S** sends what each device lacks, as a job: the first device alone, then several at a time; the table follows
each of them. **F5** asks all devices what is installed. **F7** takes the device under the cursor back to the version
before. **F2** has every option: a key to log in with, how many may fail, the public key that must have signed."""

    def __init__(self, commands: click.Group, command: Sequence[str], job: Job | None = None) -> None:
        """
        Args:
            command: `deploy send`, as far as it is known.
            job: the one that runs this command.
        """
        super().__init__()
        self._commands = commands
        self._click, self._names, words = find_command(commands, command)
        self._values = values_of(self._click, words)
        self.job = job
        self.answers: dict[str, dict[str, Any]] = {}
        self.parts: dict[str, Event] = {}

    def compose(self) -> ComposeResult:
        yield Static("", id="line", classes="command", markup=False)
        with Horizontal(classes="ask"):
            yield Label("bundle")
            yield Field(str(self._values.get("bundle", "")), id="bundle", compact=True)
        with Horizontal(classes="ask"):
            yield Label("devices")
            addresses = str(self._values.get("addresses", "")).replace(",", " ")
            yield Field(addresses, id="addresses", compact=True, placeholder="user@host …")
            yield Label("fleet")
            yield Field(str(self._values.get("inventory", "")), id="inventory", compact=True, placeholder="file.toml")
        yield Static("", id="state", classes="command", markup=False)
        yield DataTable[str](cursor_type="row", id="devices", zebra_stripes=True)
        yield DataTable[str](cursor_type="row", id="versions")
        yield Footer(show_command_palette=False)

    def on_mount(self) -> None:
        for name, columns in (("devices", DEVICES), ("versions", VERSIONS)):
            self.query_one(f"#{name}", DataTable).add_columns(*columns)
        self._say()
        empty = next((field for field in self.query(Input) if not field.value), None)
        self.set_focus(self.query_one("#devices") if self.job or empty is None else empty)
        self._follow()
        self.set_interval(REFRESH_S, self._follow)

    # Commands

    def words(self, *verb: str, **others: Any) -> tuple[str, ...]:
        """A command on the devices that are named here."""
        found, _, _ = find_command(self._commands, verb)
        typed = {field.id or "": field.value.strip() for field in self.query(Input)}
        known = {name: self._values.get(name) for name in _REACH} if verb != self._names else self._values
        return (*verb, *arguments({**known, **typed, **others}, found))

    @property
    def command(self) -> tuple[str, ...]:
        return self.job.command if self.job else self.words("deploy", "send")

    @on(Input.Changed)
    def _say(self) -> None:
        if self.is_mounted:
            self.query_one("#line", Static).update("$ " + command_line(self.command))
            self.refresh_bindings()

    @property
    def running(self) -> bool:
        return self.job is not None and not self.job.state.ended

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        if action == "send":
            return not self.running
        if action == "cancel":
            return self.running
        if action == "log":
            return self.job is not None
        return bool(self.selected and self._previous()) if action == "rollback" else True

    def action_send(self) -> None:
        self.job = None
        try:
            self.job = jobs.start(self.command, directory=application(self).folder)
        except EdgeftError as error:
            self.notify(error.message, severity="error", markup=False)
        self.parts.clear()
        self._follow()
        self.query_one("#devices").focus()

    def action_cancel(self) -> None:
        if self.job is not None and self.running:
            jobs.cancel(self.job)

    @work(exclusive=True, group="status")
    async def action_status(self) -> None:
        state = self.query_one("#state", Static)
        state.update("asking …")
        code, out, remarks = await run_command((*self.words("deploy", "status"), "--json"))
        if out.startswith("["):
            self.answers = {str(answer["device"]): answer for answer in json.loads(out)}
        state.update(remarks.strip() if code else f"{len(self.answers)} devices asked")
        self._fill()

    @work(exclusive=True, group="status")
    async def action_rollback(self) -> None:
        device = self.selected
        command = (*self.words("deploy", "rollback", name=self._app_name(), **self._where(device)), "--json")
        self.query_one("#state", Static).update(f"$ {command_line(command)} …")
        code, _, remarks = await run_command(command)
        self.query_one("#state", Static).update(remarks.strip() if code else f"{device}: back to the version before")
        self.action_status()

    def action_form(self) -> None:
        application(self).do(Action("Bring a bundle onto devices", self.command, How.FORM))

    def action_log(self) -> None:
        from edgeft.tui.jobs import JobScreen

        if self.job is not None:
            self.app.push_screen(JobScreen(self.job))

    def action_copy(self) -> None:
        self.app.copy_to_clipboard(command_line(self.command))
        self.notify("copied")

    # Tables

    def _follow(self) -> None:
        """What the job has written since."""
        if self.job is None or not self.job.folder.is_dir():
            return
        was, self.job = self.job, jobs.find_job(self.job.id)
        found = jobs.parts(self.job.folder)
        if found == self.parts and self.job.state is was.state and self.query_one("#devices", DataTable).row_count:
            return
        self.parts = found
        self.query_one("#state", Static).update(f"{self.job.id}: {self.job.state}{self._why()}")
        self._fill()
        self.refresh_bindings()
        if self.job.state.ended and not was.state.ended:
            self.notify(f"{self.job.id}: {self.job.state}")
            self.action_status()

    def _why(self) -> str:
        """What a job that failed before it reached a device said."""
        if self.job is None or not self.job.state.ended or self.parts:
            return ""
        return ", " + self.job.stderr.read_text(errors="replace").strip() if self.job.stderr.is_file() else ""

    def _fill(self) -> None:
        table = self.query_one("#devices", DataTable)
        at = table.cursor_row
        table.clear()
        for name in dict.fromkeys([*self.parts, *self.answers]):
            table.add_row(name, *_device_cells(self.parts.get(name), self.answers.get(name)), key=name)
        table.move_cursor(row=at)
        self._fill_versions()

    @on(DataTable.RowHighlighted, "#devices")
    def _fill_versions(self) -> None:
        table = self.query_one("#versions", DataTable)
        table.clear()
        for app in self.answers.get(self.selected, {}).get("apps", ()):
            for version in reversed(app["versions"]):
                used = "in use" if version["id"] == app["current"] else ""
                table.add_row(app["name"], version["version"], used, version["installed"], version["id"])
        self.refresh_bindings()

    @property
    def selected(self) -> str:
        table = self.query_one("#devices", DataTable)
        return str(table.get_row_at(table.cursor_row)[0]) if table.row_count else ""

    def _app(self) -> Mapping[str, Any] | None:
        """What a rollback would concern: the bundle's application on the device, or its only one."""
        apps = self.answers.get(self.selected, {}).get("apps", ())
        bundle = self.query_one("#bundle", Input).value
        named = [app for app in apps if app["name"] in bundle]
        return next(iter(named or apps), None)

    def _where(self, device: str) -> dict[str, str]:
        """How to name this device alone."""
        typed = self.query_one("#addresses", Input).value.split()
        address = next((one for one in typed if device in one), "")
        return {"addresses": address, "inventory": ""} if address else {"addresses": "", "only": device}

    def _app_name(self) -> str:
        app = self._app()
        return str(app["name"]) if app else ""

    def _previous(self) -> bool:
        app = self._app()
        return app is not None and len(app["versions"]) > 1


def _device_cells(event: Event | None, answer: Mapping[str, Any] | None) -> tuple[str, str, str, str]:
    """What is in use, the state, how far it is, and what it said."""
    return _in_use(answer), event.label if event else "", _bar(event), _note(event, answer)


def _in_use(answer: Mapping[str, Any] | None) -> str:
    if answer is None:
        return ""
    if "error" in answer:
        return "unreachable"
    used = [
        f"{app['name']} {version['version']}"
        for app in answer.get("apps", ())
        for version in app["versions"]
        if version["id"] == app["current"]
    ]
    return ", ".join(used) or "nothing"


def _bar(event: Event | None) -> str:
    if event is None or event.share is None:
        return ""
    return f"{'█' * round(10 * event.share):<10} {event.share:4.0%}"


def _note(event: Event | None, answer: Mapping[str, Any] | None) -> str:
    if event is not None and event.note:
        return event.note.splitlines()[0]
    return str((answer or {}).get("error") or "")
