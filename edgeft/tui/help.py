"""Help for the screen one is on: what it is for, and every key."""

from __future__ import annotations

from typing import Any, ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.screen import ModalScreen, Screen
from textual.widgets import Markdown


class HelpScreen(ModalScreen[None]):
    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,q,question_mark,f1", "dismiss", "Back")]

    def __init__(self, about: Screen[Any]) -> None:
        super().__init__()
        self._about = about

    def compose(self) -> ComposeResult:
        with VerticalScroll(classes="dialog"):
            yield Markdown(help_text(self._about))


def help_text(screen: Screen[Any]) -> str:
    """Markdown: what the screen says of itself, then the keys that work on it now."""
    text = getattr(screen, "HELP", "") or ""
    rows = [
        f"| {screen.app.get_key_display(active.binding)} | {active.binding.description} |"
        for active in screen.active_bindings.values()
        if active.binding.description and active.enabled
    ]
    return "\n".join([text, "", "| key | what it does |", "|---|---|", *dict.fromkeys(rows)])
