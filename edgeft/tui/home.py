"""The first screen: what there is, its state, and the next sensible step."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from textual import on, work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.screen import Screen
from textual.widgets import DataTable, Footer, Input, Static, Tab, Tabs

from edgeft.item import KINDS, Item
from edgeft.tui import place
from edgeft.tui.actions import Action, actions, first_steps, general
from edgeft.tui.choose import Choose
from edgeft.tui.inputs import Field

ALL = "all"
REFRESH_S = 3.0
"""Between looks at the disk: jobs and runs change without the screen."""


class HomeScreen(Screen[None]):
    """Tables of models, runs, artifacts, adapters, bundles, jobs and devices."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "next", "Next step", priority=False),
        Binding("a", "actions", "Actions"),
        Binding("n", "new", "New"),
        Binding("slash", "filter", "Filter", key_display="/", priority=True),
        Binding("c", "copy", "Copy command"),
        Binding("r", "refresh", "Refresh"),
        Binding("left", "tab(-1)", show=False),
        Binding("right", "tab(1)", show=False),
        Binding("escape", "clear", show=False),
        Binding("q", "app.quit", "Quit"),
    ]
    HELP = """What there is in the store, below this folder, running, and known of devices.

**Enter** does what the line at the bottom says. **a** lists everything that can be done with the row. **n** begins
something new: training, an export, a data set. **/** filters by any word. **←** and **→** change the kind."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self._items: list[Item] = []
        self._shown: list[Item] = []
        self._wanted: tuple[str, str] | None = None
        """Where the cursor was the last time, until there is something to put it on."""

    def compose(self) -> ComposeResult:
        yield Tabs(*(Tab(name, id=name) for name in (ALL, *KINDS)))
        yield DataTable[str](cursor_type="row", zebra_stripes=True)
        yield Static(_welcome(), id="welcome", markup=False)
        yield Field(placeholder="filter", id="filter")
        yield Static("", id="next", classes="command", markup=False)
        yield Footer(show_command_palette=False, compact=True)

    def on_mount(self) -> None:
        table = self._table
        for name, width in (("what", 9), ("name", None), ("state", None), ("about", None)):
            table.add_column(name, width=width, key=name)
        self.query_one("#filter").display = False
        self.query_one("#welcome").display = False
        table.focus()
        self._wanted = place.last_item()
        if (kind := place.remembered().get("kind")) in KINDS:
            self.query_one(Tabs).active = str(kind)
        self.action_refresh()
        self.set_interval(REFRESH_S, self._refresh_if_seen)

    def on_screen_resume(self) -> None:
        self.action_refresh()

    def _refresh_if_seen(self) -> None:
        if self.app.screen is self:
            self.action_refresh()

    @property
    def _table(self) -> DataTable[str]:
        return self.query_one(DataTable)

    @property
    def selected(self) -> Item | None:
        row = self._table.cursor_row
        return self._shown[row] if 0 <= row < len(self._shown) else None

    @work(thread=True, exclusive=True)
    def action_refresh(self) -> None:
        from edgeft.inventory import inventory  # after the first paint

        found = inventory(self.folder)
        self.app.call_from_thread(self._set_items, found)

    def _set_items(self, items: list[Item]) -> None:
        if items != self._items:
            self._items = items
            self._show()

    @on(Tabs.TabActivated)
    def _show(self) -> None:
        """Fill the table, keeping the cursor on the thing it was on."""
        before = before_key(self.selected) if self.selected else self._wanted
        kind, words = self.query_one(Tabs).active, self.query_one("#filter", Input).value.casefold().split()
        self._shown = [item for item in self._items if kind in (ALL, "", item.kind) and _matches(item, words)]
        if kind in (ALL, ""):
            self._shown = [item for item in self._shown if item.kind != "device"]
        table = self._table
        table.clear()
        for item in self._shown:
            table.add_row(item.kind, item.name, item.state, item.detail)
        same = [row for row, item in enumerate(self._shown) if before_key(item) == before]
        self.query_one("#welcome").display = kind in (ALL, "") and not words and not any(map(_is_own, self._items))
        table.move_cursor(row=same[0] if same else 0)
        self._show_next()

    @on(DataTable.RowHighlighted)
    def _show_next(self) -> None:
        item = self.selected
        text = f"{actions(item)[0].title}:  {actions(item)[0].line}" if item else "nothing here yet: n begins something"
        self.query_one("#next", Static).update(text)

    @on(DataTable.RowSelected)
    def action_next(self) -> None:
        if item := self.selected:
            self._do(actions(item)[0])

    def action_actions(self) -> None:
        if item := self.selected:
            self.app.push_screen(Choose(item.name, actions(item)), self._do)

    def action_new(self) -> None:
        begin = [] if any(map(_is_own, self._items)) else first_steps()
        more = [action for action in general() if action.command not in {one.command for one in begin}]
        self.app.push_screen(Choose("Begin", [*begin, *more]), self._do)

    def _do(self, action: Action | None) -> None:
        from edgeft.tui.app import EdgeftApp

        if action is not None:
            self.keep_place()
            assert isinstance(self.app, EdgeftApp)
            self.app.do(action)

    def keep_place(self) -> None:
        """The kind that is shown and the thing that the cursor is on: the next start begins there."""
        item = self.selected
        place.remember(kind=self.query_one(Tabs).active or ALL, item=before_key(item) if item else None)

    def action_copy(self) -> None:
        if item := self.selected:
            self.app.copy_to_clipboard(actions(item)[0].line)
            self.notify("copied")

    def action_tab(self, step: int) -> None:
        tabs = self.query_one(Tabs)
        names = (ALL, *KINDS)
        tabs.active = names[(names.index(tabs.active or ALL) + step) % len(names)]

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        return action != "filter" or not isinstance(self.focused, Input)

    def action_filter(self) -> None:
        field = self.query_one("#filter", Input)
        field.display = True
        self.set_focus(field)  # at once, and by a key that the table never sees: who types on means the filter

    def action_clear(self) -> None:
        field = self.query_one("#filter", Input)
        field.value, field.display = "", False
        self._table.focus()

    @on(Input.Changed, "#filter")
    def _filter(self) -> None:
        self._show()

    @on(Input.Submitted, "#filter")
    def _filtered(self) -> None:
        self._table.focus()


def before_key(item: Item) -> tuple[str, str]:
    return item.kind, item.name


def _is_own(item: Item) -> bool:
    """Something that was made or fetched here, not something that is only known of."""
    return item.kind != "device" and item.state != "not pulled"


def _welcome() -> str:
    steps = "\n".join(f"  {one.title}\n      {one.line}" for one in first_steps())
    return f"Nothing is here yet. n begins one of these:\n\n{steps}\n\n? explains the keys."


def _matches(item: Item, words: list[str]) -> bool:
    text = f"{item.kind} {item.name} {item.state} {item.detail}".casefold()
    return all(word in text for word in words)
