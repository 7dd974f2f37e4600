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
from textual.widgets import Button, Input, Label, OptionList, TextArea
from textual.widgets.option_list import Option

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
        Binding("space", "tick", "Tick", show=False),
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
            yield OptionList(id="known", compact=True)
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
        known = self.query_one("#known", OptionList)
        known.add_options(Option(Text(self._ticked(name)), name) for name in names)
        known.display = bool(names)
        known.highlighted = 0 if names else None

    @property
    def _typed(self) -> list[str]:
        return [word.strip() for word in self.query_one("#adapters", Input).value.split(",") if word.strip()]

    def _ticked(self, name: str) -> str:
        """Told by letters: a box in another colour says nothing to who sees none."""
        return f"[{'x' if any(_is(word, name) for word in self._typed) else ' '}] {name}"

    @on(Input.Changed, "#adapters")
    def _draw(self) -> None:
        known = self.query_one("#known", OptionList)
        for at, option in enumerate(known.options):
            known.replace_option_prompt_at_index(at, Text(self._ticked(str(option.id))))

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        return action != "tick" or isinstance(self.focused, OptionList)

    def action_tick(self) -> None:
        self.query_one("#known", OptionList).action_select()

    @on(OptionList.OptionSelected)
    def _toggle(self, event: OptionList.OptionSelected) -> None:
        """What is typed decides; ticking writes it there."""
        name = str(event.option_id)
        others = [word for word in self._typed if not _is(word, name)]
        kept = others if len(others) < len(self._typed) else [*others, f"{name}=1"]
        self.query_one("#adapters", Input).value = ",".join(kept)

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
