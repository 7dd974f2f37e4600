"""A conversation with a model: streamed Markdown, cancel, edit, try again, branch, copy, search."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import ClassVar

from textual import on, work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.css.query import NoMatches
from textual.screen import Screen
from textual.timer import Timer
from textual.widgets import Footer, Static, TextArea
from textual.worker import Worker, WorkerCancelled

from edgeft.chat import Usage
from edgeft.errors import EdgeftError
from edgeft.history import Conversation
from edgeft.paths import write_text
from edgeft.tui.actions import command_line
from edgeft.tui.answer import PAGE, figures, lasting, load_options, open_history, sampling_of_config, write_answer
from edgeft.tui.conversations import ConversationsScreen
from edgeft.tui.model import ModelProcess, Opened
from edgeft.tui.place import ChatPlace, keep_chat, leave_chat
from edgeft.tui.settings import SettingsScreen, State
from edgeft.tui.talk import Prompt, Said, as_file

DRAFT_S = 0.5
"""From a key to the disk: the most typing that a killed process can lose."""
TOO_LATE_S = 1.0
"""Esc so soon after the end of an answer meant to stop it, not to leave."""


class ChatScreen(Screen[None]):
    """One conversation. What the user says is stored before it is answered, an answer while it grows."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "stop", "Stop / back"),
        Binding("ctrl+r", "retry", "Again"),
        Binding("ctrl+n", "new", "New"),
        Binding("ctrl+o", "conversations", "Old ones"),
        Binding("ctrl+t", "settings", "Settings"),
        Binding("ctrl+b", "branch", "Branch", show=False),
        Binding("f2", "edit", "Edit last", show=False),
        Binding("ctrl+g", "save", "Save as Markdown", show=False),
        Binding("f3", "copy_command", "Copy command", show=False),
    ]
    HELP = """**Enter** sends, **Shift+Enter** or **Ctrl+J** begins a new line; a paste is one message.

**Esc** stops an answer and keeps what is there; with nothing to stop it goes back. **Ctrl+R** answers again, **F2**
takes the last message back to edit it, **Ctrl+B** goes on in a copy. **Shift+Tab** goes up to the messages: **c**
copies one, **k** the first code block in it, **e** edits it, **b** branches there. **Ctrl+O** lists and searches what
was said before, **Ctrl+T** changes the system prompt, sampling and adapters, **Ctrl+G** writes a file."""

    def __init__(
        self,
        model: str,
        adapters: Sequence[tuple[str, float]] = (),
        resume: int | None = None,
        process: ModelProcess | None = None,
        opened: Opened | None = None,
        draft: str = "",
    ) -> None:
        """
        Args:
            process: one that may have a model loaded; it ends with the screen.
            opened: what it has loaded, which is then not loaded again.
        """
        super().__init__()
        self._draft = draft
        self.model = model
        self.adapters = list(adapters)
        self.sampling = sampling_of_config()
        self._resume = resume
        self._process = process or ModelProcess()
        self._opened = opened
        self._answer: Worker[None] | None = None
        self._history, self._trouble = open_history()
        self.conversation = Conversation(lasting(model), "", None, self._history)
        self._usage: Usage | None = None
        self._retries = 0
        self._ended = 0.0
        self._place_timer: Timer | None = None

    def compose(self) -> ComposeResult:
        yield VerticalScroll(id="talk")
        yield Static("", id="status", markup=False)
        yield Prompt(id="prompt")
        yield Footer(show_command_palette=False)

    def on_mount(self) -> None:
        self.query_one("#talk", VerticalScroll).anchor()
        prompt = self.query_one(Prompt)
        prompt.load_text(self._draft)
        prompt.focus()
        if self._trouble:
            self.notify(self._trouble[1], title=self._trouble[0], severity="error", timeout=20, markup=False)
        self._load(self._resume)

    async def on_unmount(self) -> None:
        if self._place_timer is not None:
            self._place_timer.stop()
        await self._process.close()
        if self._history is not None:
            self._history.close()

    # --- Where one is ---------------------------------------------------------

    @on(TextArea.Changed)
    def _typed(self) -> None:
        """Kept soon, not at every key."""
        if self._place_timer is None:
            self._place_timer = self.set_timer(DRAFT_S, self._keep_place)

    def _keep_place(self) -> None:
        self._place_timer = None
        draft = self.query_one(Prompt).text
        if draft or self.conversation.messages:
            keep_chat(ChatPlace(lasting(self.model), tuple(self.adapters), self.conversation.id, draft))
        else:
            leave_chat()

    def cut_off(self) -> None:
        """Keep what was typed and what was received; the screen is about to end."""
        if self.answering and self.conversation.messages:
            last = self.query(Said).last()
            self._keep(lambda: self.conversation.end_answer(last.text, None))
        self._keep_place()

    @property
    def answering(self) -> bool:
        return self._answer is not None and not self._answer.is_finished

    # --- Opening --------------------------------------------------------------

    @work(exclusive=True, group="load")
    async def _load(self, resume: int | None) -> None:
        if resume is not None and self._history is not None:
            try:
                await self._show(Conversation.resume(self._history, resume))
            except EdgeftError as error:
                self._failed(error)
        if self._opened is None:
            await self._open()

    async def _open(self) -> bool:
        self._status(f"loading {Path(self.model).name} …")
        try:
            self._opened = await self._process.open(self.model, *load_options(), self.adapters)
        except EdgeftError as error:
            self._failed(error)
            return False
        if not self.conversation.runtime:
            self.conversation.runtime = self._opened.runtime
            self.conversation.system = self.conversation.system or self._opened.system
        self._status()
        return True

    def _failed(self, error: EdgeftError) -> None:
        self._status("not loaded" if self._opened is None else "failed")
        self.notify(error.hint or "", title=error.message, severity="error", timeout=15, markup=False)

    # --- Saying ---------------------------------------------------------------

    @on(Prompt.Sent)
    async def _sent(self, event: Prompt.Sent) -> None:
        if self.answering:
            self.notify("an answer is being written: Esc stops it", severity="warning")
            return
        self.query_one(Prompt).clear()
        self._retries = 0
        if not self._keep(lambda: self.conversation.say(event.text)):
            self.query_one(Prompt).load_text(event.text)
            return
        await self._add(Said("user", event.text, self.conversation.messages[-1].id))
        self._keep_place()
        self._begin()

    def _begin(self) -> None:
        self.query_one("#talk", VerticalScroll).anchor()
        self._answer = self._write_answer()

    @work(group="answer")
    async def _write_answer(self) -> None:
        if not self._process.alive and not await self._open():
            return
        conversation, said = self.conversation, Said("assistant", "", 0)
        if not self._keep(conversation.begin_answer):
            return
        said.message = conversation.messages[-1].id
        await self._add(said)
        usage = None
        sampling = dataclasses.replace(self.sampling, seed=self.sampling.seed + self._retries)
        try:
            events = self._process.generate(conversation.prompt()[:-1], sampling)
            usage = await write_answer(events, said, conversation, self._keep, self._status)
        except EdgeftError as error:
            self._failed(error)
        finally:
            self._usage, self._ended = usage, time.monotonic()
            if usage is not None:
                self._status()

    def _keep(self, store: Callable[[], object]) -> bool:
        """Write to the history; when that fails the conversation goes on unstored, and says so."""
        try:
            store()
        except EdgeftError as error:
            self._history = self.conversation.history = None
            self.notify(
                error.hint or "", title=f"Nothing more is stored: {error.message}", severity="error", timeout=30
            )
            return self._keep(store)
        return True

    async def _add(self, said: Said) -> None:
        talk = self.query_one("#talk", VerticalScroll)
        await talk.mount(said)
        if len(talk.children) > PAGE + 20:
            await talk.remove_children(list(talk.children)[: len(talk.children) - PAGE])

    async def _show(self, conversation: Conversation) -> None:
        """Draw a stored conversation from its end."""
        self.conversation, self._usage = conversation, None
        talk = self.query_one("#talk", VerticalScroll)
        await talk.remove_children()
        last = conversation.messages[-PAGE:]
        await talk.mount(*(Said(one.role, one.content, one.id, stopped=one.state != "done") for one in last))
        talk.anchor()
        self._status()

    # --- Keys -----------------------------------------------------------------

    async def action_stop(self) -> None:
        if self.answering:
            self._process.cancel()
        elif self.focused is not self.query_one(Prompt):
            self.query_one(Prompt).focus()
        elif time.monotonic() - self._ended > TOO_LATE_S:
            self.left()
            self.app.pop_screen()

    def left(self) -> None:
        """By intention; a draft is kept all the same."""
        self._keep_place()
        if not self.query_one(Prompt).text:
            leave_chat()

    async def _stopped(self) -> None:
        """Wait until nothing is being written."""
        if self._answer is not None and self.answering:
            self._process.cancel()
            with contextlib.suppress(WorkerCancelled):
                await self._answer.wait()

    async def action_retry(self) -> None:
        await self._stopped()
        if self.conversation.messages and self.conversation.messages[-1].role == "assistant":
            self._keep(lambda: self.conversation.withdraw("assistant"))
            await self.query("#talk Said").last().remove()
        if self.conversation.messages:
            self._retries += 1
            self._begin()

    async def action_edit(self) -> None:
        """Take the last thing the user said back into the prompt, with all that came after it."""
        said = [one for one in self.query(Said) if one.role == "user"]
        if said:
            await self._edit(said[-1])

    @on(Said.Edit)
    async def _edit_message(self, event: Said.Edit) -> None:
        await self._edit(event.said)

    async def _edit(self, said: Said) -> None:
        await self._stopped()
        shown = list(self.query(Said))
        for one in reversed(shown[shown.index(said) :]):
            self._keep(partial(self.conversation.withdraw, one.role))
            await one.remove()
        self.query_one(Prompt).load_text(said.text)
        self.query_one(Prompt).focus()

    async def action_branch(self) -> None:
        if self.conversation.messages:
            await self._branch(self.conversation.messages[-1].id)

    @on(Said.Branch)
    async def _branch_message(self, event: Said.Branch) -> None:
        await self._branch(event.said.message)

    async def _branch(self, last: int) -> None:
        history, number = self.conversation.history, self.conversation.id
        if history is None or number is None:
            self.notify("nothing is stored yet", severity="warning")
            return
        await self._stopped()
        try:
            copy = history.branch(number, last)
            await self._show(Conversation.resume(history, copy))
        except EdgeftError as error:
            self._failed(error)
            return
        self.notify(f"now in conversation {copy}, a copy of {number}")

    async def action_new(self) -> None:
        await self._stopped()
        old = self.conversation
        await self._show(Conversation(old.model, old.runtime, old.system, self._history))

    def action_conversations(self) -> None:
        if self._history is None:
            self.notify("nothing is stored", severity="warning")
            return
        self.app.push_screen(ConversationsScreen(self._history), self._chosen)

    def _chosen(self, number: int | None) -> None:
        self._resume_other(number)

    @work(exclusive=True, group="load")
    async def _resume_other(self, number: int | None) -> None:
        if number is None or self._history is None:
            return
        await self._stopped()
        try:
            other = Conversation.resume(self._history, number)
        except EdgeftError as error:
            self._failed(error)
            return
        await self._show(other)
        if other.model != lasting(self.model):
            self.model, self._opened = other.model, None
            await self._open()

    def action_settings(self) -> None:
        state = State(self.conversation.system or "", self.sampling, tuple(self.adapters))
        self.app.push_screen(SettingsScreen(state), self._set)

    def _set(self, state: State | None) -> None:
        if state is not None:
            self._change(state)

    @work(exclusive=True, group="load")
    async def _change(self, state: State) -> None:
        await self._stopped()
        self.sampling = state.sampling
        if (state.system or None) != self.conversation.system:
            self._keep(lambda: self.conversation.change_system(state.system or None))
        if list(state.adapters) != self.adapters:
            before, self.adapters = self.adapters, list(state.adapters)
            try:
                await self._process.set_adapters(self.adapters)
            except EdgeftError as error:
                self.adapters = before
                self._failed(error)
        self._status()

    def action_save(self) -> None:
        number = self.conversation.id or 0
        file = Path(f"conversation-{number}.md")
        try:
            write_text(file, as_file(self.conversation, self.sampling, self._opened))
        except EdgeftError as error:
            self._failed(error)
        else:
            self.notify(f"written: {file.absolute()}", markup=False)

    def action_copy_command(self) -> None:
        more = [word for name, scale in self.adapters for word in ("--adapter", f"{name}={scale:g}")]
        self.app.copy_to_clipboard(command_line(("chat", self.model, *more)))
        self.notify("copied")

    # --- The line below -------------------------------------------------------

    def _status(self, doing: str = "") -> None:
        """What changes comes first: a narrow window cuts the end."""
        opened = self._opened
        parts = figures(opened, self._usage, doing) if opened else [doing] if doing else []
        parts.append(Path(self.model).name)
        if opened:
            parts.append(opened.runtime)
        if self.conversation.id:
            parts.append(f"conversation {self.conversation.id}")
        with contextlib.suppress(NoMatches):  # the screen is closing
            self.query_one("#status", Static).update(" · ".join(parts))
