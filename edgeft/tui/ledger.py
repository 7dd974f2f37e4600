"""What each step from training to the file costs, as `edgeft verify` measured it last."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from rich.text import Text
from textual import work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.screen import Screen
from textual.widgets import DataTable, Footer, Static

from edgeft.tui.actions import Action, How, command_line
from edgeft.tui.output import run_command
from edgeft.tui.workflows import application

CHECKS = ("check", "result", "value", "limit", "what")


class LedgerScreen(Screen[None]):
    """The ledger out of the file's manifest, the step that loses most marked; below it the checks."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,q", "app.pop_screen", "Back"),
        Binding("v", "verify", "Verify"),
        Binding("f2", "form", "All options"),
        Binding("p", "package", "Package"),
        Binding("t", "chat", "Chat"),
        Binding("d", "fit", "Devices"),
        Binding("c", "copy", "Copy command"),
    ]
    HELP = """Every step on the way from training to the file was given the same held-out tokens. NLL is the loss in
nats per token, KL how far the answers are from the reference, *lost here* the KL from the step before. **▶** marks the
step where most is lost; the line below says what to try. A check that failed says so.

**v** measures again, as a job; **F2** with options, such as a report with plots. **p** packs the file for a device,
**t** talks to it, **d** says where it fits."""

    def __init__(self, artifact: str, start: Callable[[Sequence[str]], None]) -> None:
        """
        Args:
            start: begins a command as a job.
        """
        super().__init__()
        self.artifact, self._start = artifact, start
        self.found: dict[str, Any] = {}

    @property
    def command(self) -> tuple[str, ...]:
        return ("verify", self.artifact, "--last")

    def compose(self) -> ComposeResult:
        yield Static(f"$ {command_line(self.command)}", classes="command", markup=False)
        yield Static("…", id="about", classes="command", markup=False)
        yield DataTable[Text](cursor_type="row", id="steps")
        yield Static("", id="advice", classes="command", markup=False)
        yield DataTable[Text](cursor_type="row", id="checks", zebra_stripes=True)
        yield Footer(show_command_palette=False)

    def on_mount(self) -> None:
        from edgeft.verify.stored import COLUMNS

        self.query_one("#steps", DataTable).add_columns(*COLUMNS)
        self.query_one("#checks", DataTable).add_columns(*CHECKS)
        self.set_focus(self.query_one("#steps"))

    @work(exclusive=True)
    async def on_screen_resume(self) -> None:
        code, out, remarks = await run_command((*self.command, "--json"))
        self.found = {} if code else json.loads(out)
        self.query_one("#about", Static).update(remarks.strip() if code else self._about())
        self._fill()
        self.refresh_bindings()

    def _about(self) -> str:
        found = self.found
        good = "as it should be" if found.get("ok") else "NOT the trained model within the limits"
        where = (
            f"{found.get('examples')} examples of {found.get('data')} ({found.get('split')}), in {found.get('runtime')}"
        )
        return f"{self.artifact}: {good}. {found.get('tokens')} tokens, {where}; KL from “{found.get('reference')}”"

    def _fill(self) -> None:
        from edgeft.verify.stored import stored_steps

        steps, checks = self.query_one("#steps", DataTable), self.query_one("#checks", DataTable)
        steps.clear()
        checks.clear()
        for step in stored_steps(self.found):
            steps.add_row(*(Text(cell, "bold" if step.worst else "") for cell in step.cells))
        for finding in self.found.get("findings", ()):
            checks.add_row(*_finding(finding))
        self.query_one("#advice", Static).update(self.found.get("advice", ""))

    def _do(self, title: str, command: Sequence[str], how: How) -> None:
        application(self).do(Action(title, tuple(command), how))

    def action_verify(self) -> None:
        self._start(("verify", self.artifact))

    def action_form(self) -> None:
        self._do("Verify", ("verify", str(self.found.get("run") or ""), self.artifact), How.FORM)

    def action_package(self) -> None:
        self._do("Package", ("package", self.artifact), How.FORM)

    def action_chat(self) -> None:
        self._do("Chat", ("chat", self.artifact), How.CHAT)

    def action_fit(self) -> None:
        self._do("Will it fit?", ("devices", "fit", self.artifact), How.FIT)

    def action_copy(self) -> None:
        self.app.copy_to_clipboard(command_line(self.command))
        self.notify("copied")


def _finding(finding: dict[str, Any]) -> list[Text]:
    failed = not finding["ok"]
    result = "skipped" if finding["skipped"] else "FAILED" if failed else "ok"
    figures = ["" if finding[key] is None else f"{finding[key]:.4g}" for key in ("value", "limit")]
    cells = (finding["name"], result, *figures, finding["detail"])
    return [Text(cell, "bold" if failed else "") for cell in cells]
