"""The widgets of a conversation: what was said, and the field to say more."""

from __future__ import annotations

import re
from typing import ClassVar

from textual import events
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.message import Message
from textual.widgets import Label, Markdown, TextArea
from textual.widgets.markdown import MarkdownStream

from edgeft.chat import Sampling
from edgeft.history import Conversation
from edgeft.tui.model import Opened

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
        self._stream: MarkdownStream | None = None

    def compose(self) -> ComposeResult:
        yield Label(self._title(), classes="who")
        yield Markdown(self.text, open_links=False)

    def _title(self) -> str:
        return ("you" if self.role == "user" else self.role) + (" (stopped)" if self._stopped else "")

    async def grow(self, text: str) -> None:
        """Add what came; the widget draws as often as it can."""
        self.text += text
        if self._stream is None:
            self._stream = Markdown.get_stream(self.query_one(Markdown))
        await self._stream.write(text)

    async def end(self, text: str, *, stopped: bool) -> None:
        """The whole message, drawn once more: a stream can leave a code block blank."""
        if self._stream is not None:
            await self._stream.stop()
        self.text, self._stopped = text, stopped
        self.query_one(Label).update(self._title())
        await self.query_one(Markdown).update(text)

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
