"""Two models, one prompt: both answer at once, each in a conversation of its own that the history keeps."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar

from textual import on, work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Container, Vertical
from textual.css.query import NoMatches
from textual.screen import Screen
from textual.timer import Timer
from textual.widgets import Footer, Label, Static, TextArea
from textual.worker import Worker, WorkerCancelled

from edgeft.chat import Usage
from edgeft.conversation_file import made_with
from edgeft.errors import EdgeftError
from edgeft.history import Conversation, History
from edgeft.tui.actions import command_line
from edgeft.tui.answer import (
    close_history,
    figures,
    is_offline,
    last_usage,
    lasting,
    next_by,
    open_history,
    route_state,
    run_settings,
    sampling_of_config,
    store_again,
    write_answer,
)
from edgeft.tui.chat import DRAFT_S, TOO_LATE_S, ChatScreen
from edgeft.tui.conversation_view import ConversationView
from edgeft.tui.model import ModelProcess, Opened
from edgeft.tui.place import ChatPlace, keep_chat, leave_chat
from edgeft.tui.talk import Prompt, Said


class Side(Vertical):
    """One of the two models and what was said with it."""

    def __init__(
        self,
        number: int,
        model: str,
        adapters: Sequence[tuple[str, float]],
        history: History | None,
        resume: int | None,
        by: str = "policy",
    ) -> None:
        """
        Args:
            by: who of a cascade is to answer.
        """
        super().__init__(id=f"side-{number}")
        self.by, self._offline = by, False
        self.number, self.model, self.adapters = number, model, list(adapters)
        self.process = ModelProcess()
        self.opened: Opened | None = None
        self.conversation = Conversation(lasting(model), "", None, history)
        self.ended = 0.0
        """When the last answer ended, by the monotonic clock."""
        self._history, self._lost = history, False
        self._resume = resume
        self._usage: Usage | None = None
        self._opening = asyncio.Lock()
        self._answer: Worker[None] | None = None

    def compose(self) -> ComposeResult:
        with_adapters = "".join(f" + {Path(name).name}" for name, _ in self.adapters)
        yield Label(f"{self.number}  {Path(self.model).name}{with_adapters}", classes="which", markup=False)
        yield ConversationView(classes="talk")
        yield Static("", classes="status", markup=False)

    def on_mount(self) -> None:
        self._view.conversation = self.conversation
        self._load()

    async def on_unmount(self) -> None:
        await self.process.close()
        if self._lost or self.conversation.history is not self._history:
            close_history(self.conversation.history)

    @property
    def _view(self) -> ConversationView:
        return self.query_one(ConversationView)

    @property
    def answering(self) -> bool:
        return self._answer is not None and not self._answer.is_finished

    async def say(self, text: str) -> None:
        """Store and draw what the user says; `answer` is next."""
        self._keep(lambda: self.conversation.say(text))
        self._store_again()
        await self._view.add(Said("user", text))

    def answer(self) -> None:
        self._view.anchor()
        self._answer = self._write_answer()

    async def stopped(self) -> None:
        """Stop the answer, keep what is there, and wait until it is stored."""
        if self._answer is not None and self.answering:
            self.process.cancel()
            with contextlib.suppress(WorkerCancelled):
                await self._answer.wait()

    def cut_off(self) -> None:
        """Keep what was received; the screen is about to end."""
        if self.answering and self.conversation.messages and self.conversation.messages[-1].role == "assistant":
            text = self.query(Said).last().text
            self._keep(lambda: self.conversation.end_answer(text, None))

    def hand_over(self, draft: str) -> ChatScreen:
        """A screen that goes on with this conversation and its loaded model."""
        process, self.process = self.process, ModelProcess()
        return ChatScreen(self.model, self.adapters, self.conversation.id, process, self.opened, draft, self._asks)

    @work(exclusive=True, group="load")
    async def _load(self) -> None:
        history = self.conversation.history
        if self._resume is not None and history is not None:
            try:
                self.conversation = Conversation.resume(history, self._resume)
            except EdgeftError as error:
                self._failed(error)
            self._usage = last_usage(self.conversation)
            await self._view.show(self.conversation)
        await self._open()

    async def _open(self) -> bool:
        """Load the model unless it is loaded; whoever comes meanwhile waits. Whether it is."""
        async with self._opening:
            return bool(self.opened and self.process.alive) or await self._open_now()

    async def _open_now(self) -> bool:
        self.opened = None
        self._status("loading …")
        try:
            self.opened = await self.process.open(self.model, run_settings(), self.adapters)
        except EdgeftError as error:
            self._failed(error)
            return False
        self.screen.refresh_bindings()
        if not self.conversation.runtime:
            self.conversation.runtime, self.conversation.system = self.opened.runtime, self.opened.system
        self._status()
        return True

    @work(group="answer")
    async def _write_answer(self) -> None:
        if not await self._open():
            return
        sampling, said = sampling_of_config(), Said("assistant", "")
        self._keep(lambda: self.conversation.begin_answer(made_with(sampling, self.adapters)))
        await self._view.add(said)
        self._usage = None
        try:
            events = self.process.generate(self.conversation.prompt()[:-1], sampling, self._asks)
            self._usage = await write_answer(events, said, self.conversation, self._keep, self._status)
            self._offline = is_offline(self.conversation, before=self._offline)
            self._status()
        except EdgeftError as error:
            self._failed(error)
        finally:
            self.ended = time.monotonic()
            self._store_again()

    @property
    def cascade(self) -> bool:
        return bool(self.opened and self.opened.cascade)

    @property
    def _asks(self) -> str:
        return self.by if self.cascade else "policy"

    def ask(self, by: str) -> None:
        self.by = by
        self._status()

    def _keep(self, store: Callable[[], object]) -> None:
        """Write to the history; while that fails this side goes on unstored, and says so once."""
        try:
            store()
        except EdgeftError as error:
            self.conversation.history, self._lost = None, True
            store()
            self._store_again()
            if self._lost:
                title = f"{self.number}: nothing more is stored: {error.message}"
                hint = "It is tried again with every message."
                self.notify(hint, title=title, severity="error", timeout=30, markup=False)

    def _store_again(self) -> None:
        if self._lost and (told := store_again(self.conversation)):
            self._lost = False
            self.notify(told[1], title=f"{self.number}: {told[0]}", severity="warning", timeout=15, markup=False)

    def _failed(self, error: EdgeftError) -> None:
        self._status("failed" if self.opened else "not loaded")
        title = f"{self.number}: {error.message}"
        self.notify(error.hint or "", title=title, severity="error", timeout=15, markup=False)

    def _status(self, doing: str = "") -> None:
        parts = figures(self.opened, self._usage, doing, plain=self.app.has_class("plain")) if self.opened else [doing]
        if self.opened:
            parts = [*route_state(self._asks, self._offline), *parts, self.opened.runtime]
        with contextlib.suppress(NoMatches):  # the screen is closing
            self.query_one(".status", Static).update(" · ".join(parts))


class SideBySideScreen(Screen[None]):
    """What is said goes to both models, and is stored in both conversations before either answers."""

    HORIZONTAL_BREAKPOINTS = [(0, "-narrow"), (100, "-wide")]  # noqa: RUF012  (as Textual declares it)
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "stop", "Stop / back"),
        Binding("f8", "keep(1)", "Go on with 1"),
        Binding("f9", "keep(2)", "Go on with 2"),
        Binding("f6", "by", "Who answers", priority=True),
        Binding("f3", "copy_command", "Copy command"),
    ]
    HELP = """One prompt, two answers. **Enter** sends to both; **Esc** stops both and keeps what is there.

**F8** goes on with the first model alone, **F9** with the second. Each model has a conversation of its own: the other
one stays in the history too (**Ctrl+O** in a chat). Both compute at the same time, so each is slower than it would be
alone. Of a cascade **F6** asks whom its policy chooses, the device, or the cloud."""

    def __init__(self, place: ChatPlace) -> None:
        super().__init__()
        self._begin, self._by = place, place.by
        self._history, self._trouble = open_history()
        self._place_timer: Timer | None = None

    def compose(self) -> ComposeResult:
        at = self._begin
        with Container(id="sides"):
            yield Side(1, at.model, at.adapters, self._history, at.conversation, at.by)
            yield Side(2, at.against, (), self._history, at.other, at.by)
        yield Prompt(id="prompt")
        yield Footer(show_command_palette=False, compact=True)

    def on_mount(self) -> None:
        prompt = self.query_one(Prompt)
        prompt.load_text(self._begin.draft)
        prompt.focus()
        if self._trouble:
            self.notify(self._trouble[1], title=self._trouble[0], severity="error", timeout=20, markup=False)

    def on_unmount(self) -> None:
        if self._place_timer is not None:
            self._place_timer.stop()
        if self._history is not None:
            self._history.close()

    @property
    def sides(self) -> list[Side]:
        return list(self.query(Side))

    @property
    def answering(self) -> bool:
        return any(side.answering for side in self.sides)

    @on(Prompt.Sent)
    async def _sent(self, event: Prompt.Sent) -> None:
        if self.answering:
            self.query_one(Prompt).give_back(event.text)
            self.notify("answers are being written: Esc stops them", severity="warning")
            return
        for side in self.sides:
            await side.say(event.text)
        self._keep_place()
        for side in self.sides:
            side.answer()

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        return action != "by" or any(side.cascade for side in self.sides)

    def action_by(self) -> None:
        """Both of two cascades are asked the same way; who is none takes no notice."""
        self._by = next_by(self._by)
        for side in self.sides:
            side.ask(self._by)
        self._keep_place()

    def action_stop(self) -> None:
        if self.answering:
            for side in self.sides:
                side.process.cancel()
        elif self.focused is not self.query_one(Prompt):
            self.query_one(Prompt).focus()
        elif time.monotonic() - max(side.ended for side in self.sides) > TOO_LATE_S:
            self._keep_place()
            if not self.query_one(Prompt).text:
                leave_chat()
            self.app.pop_screen()

    @work(exclusive=True, group="keep")
    async def action_keep(self, number: int) -> None:
        kept = self.sides[number - 1]
        if kept.conversation.id is None:
            self.notify("say something first", severity="warning")
            return
        for side in self.sides:
            await side.stopped()
        self.app.switch_screen(kept.hand_over(self.query_one(Prompt).text))

    def action_copy_command(self) -> None:
        first, second = self.sides
        more = [word for name, scale in first.adapters for word in ("--adapter", f"{name}={scale:g}")]
        self.app.copy_to_clipboard(command_line(("chat", first.model, *more, "--against", second.model)))
        self.notify("copied")

    # --- Where one is ---------------------------------------------------------

    @on(TextArea.Changed)
    def _typed(self) -> None:
        if self._place_timer is None:
            self._place_timer = self.set_timer(DRAFT_S, self._keep_place)

    def _keep_place(self) -> None:
        self._place_timer = None
        first, second = self.sides
        draft = self.query_one(Prompt).text
        if not draft and not first.conversation.messages:
            leave_chat()
            return
        keep_chat(
            ChatPlace(
                lasting(first.model),
                tuple(first.adapters),
                first.conversation.id,
                draft,
                lasting(second.model),
                second.conversation.id,
                self._by,
            )
        )

    def cut_off(self) -> None:
        """Keep what was typed and what was received; the screen is about to end."""
        for side in self.sides:
            side.cut_off()
        self._keep_place()
