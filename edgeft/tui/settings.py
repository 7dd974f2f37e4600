"""System prompt, sampling and adapters of a conversation."""

from __future__ import annotations

import asyncio
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from rich.text import Text
from textual import on, work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Button, Input, Label, SelectionList, TextArea
from textual.widgets.selection_list import Selection

from edgeft import config
from edgeft.chat import SAMPLING, Sampling
from edgeft.tui.inputs import Area, Field
from edgeft.tui.workflows import application

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
    HELP = """What holds from the next message on. Adapters that are in this folder can be ticked with **Space**; a
scale is typed behind the name. **Ctrl+S** keeps it, **Esc** leaves everything as it was."""

    def __init__(self, state: State) -> None:
        super().__init__()
        self._state = state

    def compose(self) -> ComposeResult:
        keys = {key.name: key for key in config.SCHEMA}
        with VerticalScroll(classes="dialog"):
            yield Label("system prompt")
            yield Area(self._state.system, id="system", tab_behavior="focus")
            yield Label("adapters, as FILE or FILE=SCALE, separated by commas")
            yield Field(",".join(f"{name}={scale:g}" for name, scale in self._state.adapters), id="adapters")
            yield SelectionList[str](id="known", compact=True)
            for name in FIELDS:
                yield Label(f"{name.replace('_', '-')}: {keys['run.' + name.replace('_', '-')].help}", markup=False)
                yield Field(f"{getattr(self._state.sampling, name):g}", id=name, type="number")
            yield Button("Keep", variant="primary")

    def on_mount(self) -> None:
        self.query_one("#known").display = False
        self._offer()

    @work
    async def _offer(self) -> None:
        """The adapters that are here, to choose from."""
        from edgeft.inventory import inventory

        items = await asyncio.to_thread(inventory, application(self).folder)
        names = [item.name for item in items if item.kind == "adapter"]
        known = self.query_one("#known", SelectionList)
        chosen = {_place(name) for name, _ in self._state.adapters}
        known.add_options(Selection(Text(name), name, _place(name) in chosen) for name in names)
        known.display = bool(names)

    @on(SelectionList.SelectionToggled)
    def _toggled(self, event: SelectionList.SelectionToggled[str]) -> None:
        """What is typed decides; choosing writes it there."""
        name, field = event.selection.value, self.query_one("#adapters", Input)
        typed = [word.strip() for word in field.value.split(",") if word.strip()]
        others = [word for word in typed if not _is(word, name)]
        ticked = name in event.selection_list.selected
        if not ticked:
            field.value = ",".join(others)
        elif len(others) == len(typed):  # it is not typed yet
            field.value = ",".join([*typed, f"{name}=1"])

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


def _place(name: str) -> Path:
    return Path(name).absolute()


def _is(word: str, name: str) -> bool:
    """Whether what was typed, with a scale or without, is that file."""
    return _place(name) in (_place(word), _place(word.rpartition("=")[0]))


def _adapter(text: str) -> tuple[str, float]:
    name, found, scale = text.strip().rpartition("=")
    return (name, float(scale)) if found else (text.strip(), 1.0)
