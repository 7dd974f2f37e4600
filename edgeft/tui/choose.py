"""A list of actions to choose from, each with the command it stands for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from rich.text import Text
from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.screen import ModalScreen
from textual.widgets import Label, OptionList
from textual.widgets.option_list import Option

from edgeft.tui.actions import Action


class Choose(ModalScreen[Action | None]):
    """Dismissed with the action, or None."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape", "dismiss(None)", "Back")]
    HELP = "Choose with the arrow keys and **Enter**; **Esc** goes back."

    def __init__(self, title: str, actions: Sequence[Action]) -> None:
        super().__init__()
        self._title, self._actions = title, list(actions)

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog"):
            yield Label(self._title, markup=False)
            yield OptionList(
                *(Option(Text.assemble(action.title, "\n", (action.line, "dim"))) for action in self._actions)
            )

    @on(OptionList.OptionSelected)
    def _chosen(self, event: OptionList.OptionSelected) -> None:
        self.dismiss(self._actions[event.option_index])
