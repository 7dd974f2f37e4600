"""One line of text, asked for; the command that does the same is shown while one types."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.screen import ModalScreen
from textual.widgets import Input, Label, Static

from edgeft.tui.inputs import Field


class Ask(ModalScreen[str | None]):
    """Dismissed with the text, or None."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "dismiss(None)", "Back"),
        Binding("f3", "copy", "Copy command"),
    ]
    HELP = "**Enter** does it, **Esc** goes back, **F3** copies the command that does the same."

    def __init__(self, title: str, value: str, line: Callable[[str], str], problem: Callable[[str], str]) -> None:
        """
        Args:
            line: the command line, of the text.
            problem: what is wrong with the text; "" when nothing is.
        """
        super().__init__()
        self._title, self._value, self._line, self._problem = title, value, line, problem

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog"):
            yield Label(self._title, markup=False)
            yield Field(self._value)
            yield Static("", classes="command", markup=False)

    @on(Input.Changed)
    def _typed(self, event: Input.Changed) -> None:
        problem = self._problem(event.value)
        self.query_one(Static).update(problem or f"$ {self._line(event.value)}")

    @on(Input.Submitted)
    def _done(self, event: Input.Submitted) -> None:
        if not self._problem(event.value):
            self.dismiss(event.value)

    def action_copy(self) -> None:
        self.app.copy_to_clipboard(self._line(self.query_one(Input).value))
        self.notify("copied")
