"""System prompt, sampling and adapters of a conversation."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Button, Input, Label, TextArea

from edgeft import config
from edgeft.chat import SAMPLING, Sampling

FIELDS = tuple(name.replace("-", "_") for name in SAMPLING)


@dataclass(frozen=True)
class State:
    system: str
    sampling: Sampling
    adapters: tuple[tuple[str, float], ...]
    """(file, scale)."""


class SettingsScreen(ModalScreen["State | None"]):
    """Dismissed with the new state, or None."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "dismiss(None)", "Back"),
        Binding("ctrl+s", "keep", "Keep"),
    ]
    HELP = "What holds from the next message on. **Ctrl+S** keeps it, **Esc** leaves everything as it was."

    def __init__(self, state: State) -> None:
        super().__init__()
        self._state = state

    def compose(self) -> ComposeResult:
        keys = {key.name: key for key in config.SCHEMA}
        with VerticalScroll(classes="dialog"):
            yield Label("system prompt")
            yield TextArea(self._state.system, id="system", tab_behavior="focus")
            yield Label("adapters, as FILE or FILE=SCALE, separated by commas")
            yield Input(",".join(f"{name}={scale:g}" for name, scale in self._state.adapters), id="adapters")
            for name in FIELDS:
                yield Label(f"{name.replace('_', '-')}: {keys['run.' + name.replace('_', '-')].help}", markup=False)
                yield Input(f"{getattr(self._state.sampling, name):g}", id=name, type="number")
            yield Button("Keep", variant="primary")

    @on(Button.Pressed)
    def action_keep(self) -> None:
        try:
            state = self._read()
        except ValueError as error:
            self.notify(str(error), severity="error", markup=False)
        else:
            self.dismiss(state)

    def _read(self) -> State:
        """Raises: ValueError for a number that is none."""
        values = {}
        for name in FIELDS:
            kind = type(getattr(self._state.sampling, name))
            values[name] = kind(self.query_one(f"#{name}", Input).value)
        adapters = tuple(map(_adapter, filter(None, self.query_one("#adapters", Input).value.split(","))))
        system = self.query_one("#system", TextArea).text.strip()
        return State(system, dataclasses.replace(self._state.sampling, **values), adapters)


def _adapter(text: str) -> tuple[str, float]:
    name, found, scale = text.strip().rpartition("=")
    return (name, float(scale)) if found else (text.strip(), 1.0)
