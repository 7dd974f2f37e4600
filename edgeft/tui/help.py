"""Help for where one is: the focused widget, the screen, and every key that works there now."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.dom import DOMNode
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
    """Markdown: what the focused widget and the screen say of themselves, then the keys that work there now."""
    texts = [getattr(widget, "HELP", None) for widget in _about(screen)]
    # What the screen itself does comes before the two dozen keys that move a cursor in a text.
    active = sorted(screen.active_bindings.values(), key=lambda one: not isinstance(one.node, (Screen, App)))
    rows = [
        f"| {screen.app.get_key_display(one.binding)} | {one.binding.description} |"
        for one in active
        if one.binding.description and one.enabled
    ]
    about = [f"{text}\n" for text in texts if text]
    return "\n".join([*about, "| key | what it does |", "|---|---|", *dict.fromkeys(rows)])


def _about(screen: Screen[Any]) -> Iterator[DOMNode]:
    """From the focused widget outwards, as far as the screen."""
    for node in screen.focused.ancestors_with_self if screen.focused else [screen]:
        yield node
        if node is screen:
            return
