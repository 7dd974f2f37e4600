"""Stored conversations: the newest, or those with the words one looks for."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.screen import ModalScreen
from textual.widgets import DataTable, Input

from edgeft.errors import EdgeftError
from edgeft.history import History
from edgeft.tui.inputs import Field

LIMIT = 200


class ConversationsScreen(ModalScreen[int | None]):
    """Dismissed with the number of a conversation, or None."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "dismiss(None)", "Back"),
        Binding("down", "app.focus_next", show=False),
        Binding("f2", "rename", "Rename"),
    ]
    HELP = "Type words to search all that was said; **↓** and **Enter** open one, **F2** names it after what you typed."

    def __init__(self, history: History) -> None:
        super().__init__()
        self._history = history
        self._numbers: list[int] = []

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog"):
            yield Field(placeholder="words to look for; F2 names the chosen conversation so")
            yield DataTable[str](cursor_type="row")

    def on_mount(self) -> None:
        self.query_one(DataTable).add_columns("id", "begun (UTC)", "conversation", "text")
        self._show("")

    @on(Input.Changed)
    def _typed(self, event: Input.Changed) -> None:
        self._show(event.value)

    def _show(self, words: str) -> None:
        table = self.query_one(DataTable)
        table.clear()
        try:
            rows = self._found(words) if words.strip() else self._latest()
        except EdgeftError as error:
            self.notify(error.message, severity="error", markup=False)
            return
        self._numbers = [int(row[0]) for row in rows]
        for row in rows:
            table.add_row(*row)

    @property
    def _room(self) -> int:
        """Columns for a title, so that what follows it is seen too."""
        return max(16, self.app.size.width // 2 - 20)

    def _latest(self) -> list[tuple[str, str, str, str]]:
        return [
            (
                str(one.id),
                one.created[:16].replace("T", " "),
                _short(one.title, self._room),
                f"{one.messages} messages, {Path(one.model).name}",
            )
            for one in self._history.summaries(LIMIT)
        ]

    def _found(self, words: str) -> list[tuple[str, str, str, str]]:
        return [
            (str(one.conversation), "", _short(one.title, self._room), _around(one.snippet, self._room))
            for one in self._history.search(words, LIMIT)
        ]

    @on(Input.Submitted)
    @on(DataTable.RowSelected)
    def _chosen(self) -> None:
        row = self.query_one(DataTable).cursor_row
        if 0 <= row < len(self._numbers):
            self.dismiss(self._numbers[row])

    def action_rename(self) -> None:
        row, field = self.query_one(DataTable).cursor_row, self.query_one(Input)
        if 0 <= row < len(self._numbers):
            try:
                self._history.rename(self._numbers[row], field.value)
            except EdgeftError as error:
                self.notify(error.message, severity="error", markup=False)
            else:
                field.value = ""


def _around(snippet: str, length: int) -> str:
    """A snippet in so many columns, with the word that was looked for."""
    line = " ".join(snippet.split())
    begin = max(0, line.find("«") - length // 3)
    return ("…" if begin else "") + _short(line[begin:], length)


def _short(text: str, length: int = 60) -> str:
    line = " ".join(text.split())
    return line if len(line) <= length else line[: length - 1] + "…"
