"""Fields one types into, which keep the order of what is typed.

In Textual 8.2 a letter is inserted where the key arrives, but Backspace or an arrow first travels up to the application
and back: when a slow line or a busy machine delivers them together, "a, Backspace, b" becomes nothing and not "b"
(Textualize/textual issue 6605, pull request 6631). Here a field does its own keys as they come.
"""

from __future__ import annotations

import time

from textual import events
from textual.widgets import Input, TextArea

_last_key = 0.0


def since_key() -> float:
    """Seconds since the last key in any field."""
    return time.monotonic() - _last_key


async def own_key(field: Input | TextArea, event: events.Key) -> None:
    """Do what the field itself binds the key to, if it does and the key is not one that it writes."""
    global _last_key
    _last_key = time.monotonic()
    if field.check_consume_key(event.key, event.character):
        return
    for binding in field._bindings.key_to_bindings.get(event.key, ()):
        if not binding.priority and await field.app.run_action(binding.action, field):
            event.stop()
            event.prevent_default()
            return


class Field(Input):
    """One line."""

    async def _on_key(self, event: events.Key) -> None:
        await own_key(self, event)


class Area(TextArea):
    """Several lines."""

    async def _on_key(self, event: events.Key) -> None:
        await own_key(self, event)
