"""The widgets of a conversation: what was said, and the field to say more."""

from __future__ import annotations

import contextlib
import re
from typing import ClassVar

from textual import events
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.css.query import NoMatches
from textual.message import Message
from textual.widgets import Label, Markdown, TextArea
from textual.widgets.markdown import MarkdownStream

from edgeft.chat import Sampling
from edgeft.history import Conversation
from edgeft.tui.model import Opened

PIECE = 4_000
"""Characters of a Markdown widget about: with every word that comes, a widget is laid out anew as a whole."""
_FENCE = re.compile(r"^ {0,3}(```|~~~)", re.MULTILINE)
_CODE = re.compile(r"```[^\n]*\n(.*?)```", re.DOTALL)


class Prompt(TextArea):
    """Enter sends; Shift+Enter, Alt+Enter and Ctrl+J begin a new line, because terminals swallow one or another."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("shift+enter,alt+enter,ctrl+j", "newline", "New line", show=False),
    ]

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
            return
        await super()._on_key(event)

    def action_newline(self) -> None:
        self.insert("\n")


class Said(Vertical, can_focus=True):
    """One message. The first word says who wrote it, so that colour need not."""

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

    def __init__(self, role: str, text: str, message: int, *, stopped: bool = False) -> None:
        super().__init__(classes=role)
        self.role, self.text, self.message = role, text, message
        self._stopped = stopped
        self._pieces = pieces(text)
        self._stream: MarkdownStream | None = None

    def compose(self) -> ComposeResult:
        yield Label(self._title(), classes="who")
        for piece in self._pieces:
            yield Markdown(piece, open_links=False)

    def _title(self) -> str:
        return ("you" if self.role == "user" else self.role) + (" (stopped)" if self._stopped else "")

    async def grow(self, text: str) -> None:
        """Add what came; the widget draws as often as it can."""
        self.text += text
        *whole, self._pieces[-1] = pieces(self._pieces[-1] + text)
        with contextlib.suppress(NoMatches):  # the screen is closing
            if whole:
                await self._next_pieces(whole)
                return
            if self._stream is None:
                self._stream = Markdown.get_stream(self._last)
            await self._stream.write(text)

    async def end(self, text: str, *, stopped: bool) -> None:
        """The last piece is drawn once more: a stream can leave a code block blank."""
        await self._stop_stream()
        self.text, self._stopped = text, stopped
        with contextlib.suppress(NoMatches):
            self.query_one(Label).update(self._title())
            await self._last.update(self._pieces[-1])

    async def _next_pieces(self, whole: list[str]) -> None:
        """The last widget's piece is complete; others follow it."""
        await self._stop_stream()
        self._pieces[-1:] = [*whole, self._pieces[-1]]
        await self._last.update(whole[0])
        await self.mount(*(Markdown(piece, open_links=False) for piece in [*whole[1:], self._pieces[-1]]))

    async def _stop_stream(self) -> None:
        stream, self._stream = self._stream, None
        if stream is not None:
            await stream.stop()

    @property
    def _last(self) -> Markdown:
        return self.query(Markdown).last()

    def action_copy(self) -> None:
        self.app.copy_to_clipboard(self.text)
        self.notify("message copied")

    def action_copy_code(self) -> None:
        if found := _CODE.search(self.text):
            self.app.copy_to_clipboard(found.group(1))
            self.notify("code copied")
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


def as_file(conversation: Conversation, sampling: Sampling, opened: Opened | None) -> str:
    """Markdown with what one needs to know to repeat it."""
    head = {
        "model": conversation.model,
        "runtime": conversation.runtime,
        "context": str(opened.context) if opened else "",
        "sampling": f"temperature {sampling.temperature:g}, top-k {sampling.top_k}, top-p {sampling.top_p:g}, "
        f"min-p {sampling.min_p:g}, seed {sampling.seed}, at most {sampling.max_tokens} tokens",
        "system": conversation.system or "",
    }
    lines = [f"* {name}: {value}" for name, value in head.items() if value]
    said = [f"## {one.role}, {one.created}\n\n{one.content}\n" for one in conversation.messages]
    return "\n".join([*lines, "", *said])
