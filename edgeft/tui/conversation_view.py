"""The messages of a conversation: those near where one looks are widgets, however long the conversation is."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from textual import work
from textual.containers import VerticalScroll
from textual.css.query import NoMatches

from edgeft.history import Conversation, StoredMessage
from edgeft.tui.talk import Piece, Said

PAGE = 40
"""Messages that are drawn at first."""
STEP = 10
"""So many more are drawn when one scrolls to an end of them: one frame's work, not a pause that one feels."""
MOST = 2 * PAGE
"""Messages that are drawn at a time."""


class ConversationView(VerticalScroll):
    """Follows the end unless one has scrolled away from it."""

    conversation: Conversation | None = None
    _first = 0
    """Of all messages, the first that is drawn."""
    _turning = False

    def on_mount(self) -> None:
        self.anchor()

    @property
    def _messages(self) -> Sequence[StoredMessage]:
        return self.conversation.messages if self.conversation else ()

    @property
    def _drawn(self) -> list[Said]:
        return list(self.query_children(Said))

    async def show(self, conversation: Conversation) -> None:
        """Draw a conversation from its end."""
        self.conversation = conversation
        self._first = max(0, len(self._messages) - PAGE)
        with self.app.batch_update():
            await self.remove_children()
            await self.mount(*map(Said.of, self._messages[self._first :]))
        self.anchor()

    async def add(self, said: Said) -> None:
        """The newest message, which the conversation has already."""
        if self._first + len(self.children) < len(self._messages) - 1:  # its end is not drawn
            assert self.conversation is not None
            await self.show(self.conversation)
            await self._drawn[-1].remove()
        await self.mount(said)
        if len(self.children) > PAGE + 20 and self.is_vertical_scroll_end:
            await self._drop(self._drawn[: len(self.children) - PAGE], before=True)

    def position(self, said: Said) -> int:
        """Of a message, in the conversation."""
        return self._first + self._drawn.index(said)

    async def take_back(self, said: Said) -> int:
        """Remove a message and what comes after it from the view; how many messages of the conversation that is."""
        count = len(self._messages) - self.position(said)
        drawn = self._drawn
        await self.remove_children(drawn[drawn.index(said) :])
        return count

    def watch_scroll_y(self, old: float, new: float) -> None:
        super().watch_scroll_y(old, new)
        if not self.is_mounted:
            return
        if new < self.max_scroll_y - 1:
            self.call_after_refresh(self._wake)
        if self._turning:
            return
        if new < old and new <= 1 and self._first > 0:
            self._turn(before=True)
        elif new > old and new >= self.max_scroll_y - 1 and self._first + len(self.children) < len(self._messages):
            self._turn(before=False)

    def on_resize(self) -> None:
        self.call_after_refresh(self._wake)

    @work(exclusive=True, group="wake")
    async def _wake(self) -> None:
        """Draw what is near where one looks."""
        seen = self.region.grow((self.size.height, 0, self.size.height, 0))
        for piece in self.query(Piece):
            if piece.asleep and piece.region.overlaps(seen):
                await piece.wake()

    async def rest(self, said: Said) -> None:
        """What has gone far up while an answer grows needs no widgets, unless one looks there."""
        if self.is_vertical_scroll_end:
            await said.rest(2 * self.size.height)

    @work(exclusive=True, group="page")
    async def _turn(self, *, before: bool) -> None:
        """Draw some more at one end, leave out as much at the other; what one reads stays in its place."""
        self._turning = True
        try:
            with contextlib.suppress(NoMatches):
                await self._draw_more(before)
        finally:
            self._turning = False

    async def _draw_more(self, before: bool) -> None:
        drawn = self._drawn
        end = self._first + len(drawn)
        kept = drawn[0] if before else drawn[-1]
        place = kept.virtual_region.y - self.scroll_y
        if before:
            more = self._messages[max(0, self._first - STEP) : self._first]
            await self.mount(*map(Said.of, more), before=0)
            self._first -= len(more)
        else:
            await self.mount(*map(Said.of, self._messages[end : end + STEP]))
        if (extra := len(self.children) - MOST) > 0:
            await self._drop(self._drawn[-extra:] if before else self._drawn[:extra], before=not before)
        self.call_after_refresh(
            lambda: self.scroll_to(y=kept.virtual_region.y - place, animate=False, force=True, immediate=True)
        )

    async def _drop(self, said: Sequence[Said], *, before: bool) -> None:
        await self.remove_children(said)
        if before:
            self._first += len(said)
