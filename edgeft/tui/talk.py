"""The widgets of a conversation: what was said, and the field to say more."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Mapping
from typing import Any, ClassVar

from textual import events
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical, VerticalScroll
from textual.css.query import NoMatches
from textual.message import Message
from textual.widget import MountError
from textual.widgets import Label, Markdown, Static

from edgeft.conversation_file import code_blocks, said_of
from edgeft.history import StoredMessage
from edgeft.tui.inputs import Area

PIECE = 2_000
"""Characters of a Markdown widget about: with every word that comes, a widget is laid out anew as a whole."""
PAINTED_S = 1.0
"""How long to wait for a picture that nobody may see."""
_FENCE = re.compile(r"^ {0,3}(```|~~~)", re.MULTILINE)


class Prompt(Area):
    """Enter sends; Shift+Enter, Alt+Enter and Ctrl+J begin a new line, because terminals swallow one or another."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("shift+enter,alt+enter,ctrl+j", "newline", "New line", show=False),
        Binding("pageup", "page(-1)", "Scroll up", show=False),
        Binding("pagedown", "page(1)", "Scroll down", show=False),
    ]
    HELP = """**Enter** sends, **Shift+Enter**, **Alt+Enter** or **Ctrl+J** begins a new line; a paste is one message.
"""

    class Sent(Message):
        def __init__(self, text: str) -> None:
            super().__init__()
            self.text = text

    def __init__(self, *, id: str) -> None:  # noqa: A002  (Textual's name)
        super().__init__(
            id=id, soft_wrap=True, show_line_numbers=False, tab_behavior="focus", placeholder="Say something"
        )

    async def _on_key(self, event: events.Key) -> None:
        if event.key == "enter":
            event.prevent_default()
            event.stop()
            if self.text.strip():
                self.post_message(self.Sent(self.text.strip()))
                self.clear()  # here, so that what is typed next belongs to the next message

    def give_back(self, text: str) -> None:
        """What could not be sent, before what was typed since."""
        self.load_text("\n".join(filter(None, (text, self.text))))
        self.move_cursor(self.document.end)

    def action_newline(self) -> None:
        self.insert("\n")

    def action_page(self, pages: int) -> None:
        """Of what was said: while one types, that is what one looks something up in."""
        for view in self.screen.query(VerticalScroll):
            view.scroll_relative(y=pages * max(1, view.size.height - 1), animate=False)


class Piece(Markdown):
    """Part of an answer. Far from where one looks it is an empty space as high as its text.

    Whenever a word comes, all widgets that are there are laid out: at 40,000 characters that took 40 ms a time.
    """

    asleep = False

    def __init__(self, text: str) -> None:
        super().__init__(text, open_links=False)

    async def sleep(self) -> None:
        if not self.asleep and self.size.height:
            self.asleep = True
            self.styles.height = self.size.height
            await self.remove_children()

    async def wake(self) -> None:
        if self.asleep:
            self.asleep = False
            await self.update(self.source)
            self.styles.height = "auto"


class Said(Vertical, can_focus=True):
    """One message. The first word says who wrote it, so that colour need not."""

    HELP = """A message. **c** copies all of it, **k** its last code block and, pressed again, the one before; **e**
takes it back to be changed and sent again, **b** goes on from it in a copy. **↑** and **↓** go to its neighbours."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("c", "copy", "Copy"),
        Binding("k", "copy_code", "Copy code"),
        Binding("e", "edit", "Edit"),
        Binding("b", "branch", "Branch"),
        Binding("up", "app.focus_previous", show=False),
        Binding("down", "app.focus_next", show=False),
    ]

    class Edit(Message):
        def __init__(self, said: Said) -> None:
            super().__init__()
            self.said = said

    class Branch(Message):
        def __init__(self, said: Said) -> None:
            super().__init__()
            self.said = said

    def __init__(self, role: str, text: str, *, stopped: bool = False, route: Mapping[str, Any] | None = None) -> None:
        """
        Args:
            route: of a cascade's answer: who wrote it, why, and what it cost.
        """
        super().__init__(classes=role)
        self.role, self.text = role, text
        self._stopped, self._route = stopped, route
        self._copied = 0
        """Code blocks of it that were copied one after another."""
        self._pieces = pieces(text) if role != "user" else []

    def compose(self) -> ComposeResult:
        yield Label(self._title(), classes="who", markup=False)
        if self.role == "user":  # as it was typed
            yield Static(self.text, markup=False)
            return
        yield from map(Piece, self._pieces)

    @classmethod
    def of(cls, one: StoredMessage) -> Said:
        """A message of the history."""
        route = (one.made or {}).get("route")
        return cls(one.role, one.content, stopped=one.state != "done", route=route)

    def _title(self) -> str:
        who = "you" if self.role == "user" else said_of(self._route) if self._route else self.role
        return who + (" (stopped)" if self._stopped else "")

    def written_by(self, route: Mapping[str, Any]) -> None:
        """Of a cascade's answer: "author" and "reason", and at the end all of `edgeft.model_worker.route_of`."""
        self._route = route
        with contextlib.suppress(NoMatches):  # the screen is closing
            self.query_one(Label).update(self._title())

    async def grow(self, text: str) -> None:
        """Add what came; done when it is laid out, so that who waits draws no more than the screen can."""
        self.text += text
        before = self._pieces[-1]
        first, *more = pieces(before + text)
        self._pieces[-1:] = [first, *more]
        with contextlib.suppress(NoMatches, MountError):  # the screen is closing
            await self._last.append(first[len(before) :])
            if more:
                await self.mount(*map(Piece, more))
            await self._painted()

    async def end(self, text: str, *, stopped: bool) -> None:
        """The last piece is drawn once more: growing can leave a code block blank."""
        self.text, self._stopped = text, stopped
        with contextlib.suppress(NoMatches):
            self.query_one(Label).update(self._title())
            await self._last.update(self._pieces[-1])

    async def _painted(self) -> None:
        painted = asyncio.Event()
        self.call_after_refresh(painted.set)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(painted.wait(), PAINTED_S)

    async def rest(self, height: int) -> None:
        """What is more than so many lines above the end needs no widgets for now."""
        for piece in reversed(self.query(Piece)):
            if height < 0:
                await piece.sleep()
            height -= piece.size.height

    @property
    def _last(self) -> Piece:
        return self.query(Piece).last()

    def action_copy(self) -> None:
        self.app.copy_to_clipboard(self.text)
        self.notify("message copied")

    def action_copy_code(self) -> None:
        """One block after another, the last first: an answer ends with what it was asked for."""
        if found := code_blocks(self.text):
            self.app.copy_to_clipboard(found[-1 - self._copied % len(found)])
            which = f"code block {len(found) - self._copied % len(found)} of {len(found)}"
            self._copied += 1
            self.notify(f"{which} copied" + ("; again for the one before" if len(found) > 1 else ""))
        else:
            self.notify("no code block here", severity="warning")

    def action_edit(self) -> None:
        self.post_message(self.Edit(self))

    def action_branch(self) -> None:
        self.post_message(self.Branch(self))


def pieces(text: str) -> list[str]:
    """Cut after paragraphs, outside of code blocks, into pieces of about `PIECE` characters; at least one piece."""
    found, begin = [], 0
    while len(text) - begin > PIECE:
        cut = text.find("\n\n", begin + PIECE)
        while cut >= 0 and len(_FENCE.findall(text, begin, cut)) % 2:
            cut = text.find("\n\n", cut + 2)
        if cut < 0:
            break
        found.append(text[begin:cut])
        begin = cut + 2
    return [*found, text[begin:]]
