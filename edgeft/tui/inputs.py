"""Fields one types into, which keep the order of what is typed.

In Textual 8.2 a letter is inserted where the key arrives, but Backspace or an arrow first travels up to the application
and back: when a slow line or a busy machine delivers them together, "a, Backspace, b" becomes nothing and not "b"
(Textualize/textual issue 6605, pull request 6631). Here a field does its own keys as they come.
"""

from __future__ import annotations

import time

from textual import events
from textual.widget import Widget
from textual.widgets import Input, TextArea

_last_key = 0.0


def since_key() -> float:
    """Seconds since the last key in any field."""
    return time.monotonic() - _last_key


async def own_key(widget: Widget, event: events.Key) -> bool:
    """Do what the widget itself binds the key to; whether it binds it."""
    for binding in widget._bindings.key_to_bindings.get(event.key, ()):
        if not binding.priority and await widget.app.run_action(binding.action, widget):
            event.stop()
            event.prevent_default()
            return True
    return False


def _heard() -> None:
    global _last_key
    _last_key = time.monotonic()


class Field(Input):
    """One line."""

    async def _on_key(self, event: events.Key) -> None:
        _heard()
        if not self.check_consume_key(event.key, event.character):
            await own_key(self, event)


class Area(TextArea):
    """Several lines."""

    async def _on_key(self, event: events.Key) -> None:
        _heard()
        if not self.check_consume_key(event.key, event.character):
            await own_key(self, event)
