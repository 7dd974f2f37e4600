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
from textual.widgets import Input, Label, OptionList
from textual.widgets.option_list import Option

from edgeft.tui.actions import Action
from edgeft.tui.inputs import Field


class Choose(ModalScreen[Action | None]):
    """Dismissed with the action, or None."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "back", "Back"),
        Binding("slash", "filter", "Filter", key_display="/", priority=True),
        Binding("c", "copy", "Copy command"),
    ]
    HELP = """Choose with the arrow keys and **Enter**; **c** copies the command instead of doing it. **/** shows only
what has the words that one types; **Esc** shows all again, or goes back."""

    def __init__(self, title: str, actions: Sequence[Action]) -> None:
        super().__init__()
        self._title, self._actions = title, list(actions)
        self._shown = list(actions)

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog") as dialog:
            dialog.border_subtitle = "Enter: do it · c: copy its command · /: filter"
            yield Label(self._title, markup=False)
            yield Field(placeholder="filter", id="filter")
            yield OptionList(*map(_option, self._actions))

    def on_mount(self) -> None:
        self.query_one(Input).display = False
        self.query_one(OptionList).focus()

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        return action != "filter" or not isinstance(self.focused, Input)

    def action_filter(self) -> None:
        field = self.query_one(Input)
        field.display = True
        self.set_focus(field)

    def action_back(self) -> None:
        field = self.query_one(Input)
        if not field.display:
            self.dismiss(None)
            return
        field.value, field.display = "", False
        self.query_one(OptionList).focus()

    @on(Input.Changed)
    def _filter(self, event: Input.Changed) -> None:
        words = event.value.casefold().split()
        self._shown = [one for one in self._actions if _matches(one, words)]
        options = self.query_one(OptionList)
        options.clear_options()
        options.add_options(map(_option, self._shown))
        options.highlighted = 0 if self._shown else None

    @on(Input.Submitted)
    def _filtered(self) -> None:
        self.query_one(OptionList).focus()

    def action_copy(self) -> None:
        if (at := self.query_one(OptionList).highlighted) is not None:
            self.app.copy_to_clipboard(self._shown[at].line)
            self.notify("copied")

    @on(OptionList.OptionSelected)
    def _chosen(self, event: OptionList.OptionSelected) -> None:
        self.dismiss(self._shown[event.option_index])


def _matches(action: Action, words: list[str]) -> bool:
    text = f"{action.title} {action.line}".casefold()
    return all(word in text for word in words)


def _option(action: Action) -> Option:
    return Option(Text.assemble(action.title, "\n", (action.line, "dim")))
