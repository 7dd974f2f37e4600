"""A conversation with a model: streamed Markdown, cancel, edit, try again, branch, copy, search."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar

from textual import on, work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.css.query import NoMatches
from textual.screen import Screen
from textual.timer import Timer
from textual.widgets import Footer, Static, TextArea
from textual.worker import Worker, WorkerCancelled

from edgeft.chat import Usage
from edgeft.conversation_file import code_blocks, made_with, write_conversation
from edgeft.errors import EdgeftError
from edgeft.history import Conversation
from edgeft.tui.actions import Action, command_line
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
from edgeft.tui.ask import Ask
from edgeft.tui.chat_actions import Here, chat_actions
from edgeft.tui.choose import Choose
from edgeft.tui.conversation_view import ConversationView
from edgeft.tui.conversations import ConversationsScreen
from edgeft.tui.model import ModelProcess, Opened
from edgeft.tui.place import ChatPlace, keep_chat, leave_chat
from edgeft.tui.settings import SettingsScreen, State
from edgeft.tui.talk import Prompt, Said

DRAFT_S = 0.5
"""From a key to the disk: the most typing that a killed process can lose."""
TOO_LATE_S = 1.0
"""Esc so soon after the end of an answer meant to stop it, not to leave."""


class ChatScreen(Screen[None]):
    """One conversation. What the user says is stored before it is answered, an answer while it grows."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "stop", "Stop / back"),
        Binding("f4", "actions", "Actions"),
        Binding("ctrl+r", "retry", "Again"),
        Binding("f2", "edit", "Edit"),
        Binding("f6", "by", "Who answers", priority=True),
        Binding("ctrl+o", "conversations", "Old ones"),
        Binding("ctrl+t", "settings", "Settings"),
        Binding("ctrl+n", "new", "New", show=False),
        Binding("ctrl+b", "branch", "Go on in a copy", show=False),
        Binding("f7", "rename", "Name this conversation", show=False, priority=True),
        Binding("f8", "copy_answer", "Copy the last answer", show=False),
        Binding("f9", "copy_code", "Copy its last code block", show=False),
        Binding("ctrl+g", "save", "Write a file", show=False),
        Binding("f3", "copy_command", "Copy command", show=False),
    ]
    HELP = """**Esc** stops an answer and keeps what is there; with nothing to stop it goes back. **F4** lists all that
can be done here, each with its command. **Page Up** and **Page Down** scroll; **Shift+Tab** goes up to the messages,
to copy, edit or branch at any of them."""

    def __init__(
        self,
        model: str,
        adapters: Sequence[tuple[str, float]] = (),
        resume: int | None = None,
        process: ModelProcess | None = None,
        opened: Opened | None = None,
        draft: str = "",
        by: str = "policy",
    ) -> None:
        """
        Args:
            process: one that may have a model loaded; it ends with the screen.
            opened: what it has loaded, which is then not loaded again.
            by: who of a cascade is to answer.
        """
        super().__init__()
        self._draft = draft
        self.model = model
        self.adapters = list(adapters)
        self.sampling = sampling_of_config()
        self._resume = resume
        self._process = process or ModelProcess()
        self._opened = opened
        self._opening = asyncio.Lock()
        self._answer: Worker[None] | None = None
        self._history, self._trouble = open_history()
        self.conversation = Conversation(lasting(model), "", None, self._history)
        self._usage: Usage | None = None
        self._by = by
        self._offline = self._lost = False
        self._retries = 0
        self._ended = 0.0
        self._place_timer: Timer | None = None

    def compose(self) -> ComposeResult:
        yield ConversationView(id="talk")
        yield Static("", id="status", markup=False)
        yield Prompt(id="prompt")
        yield Footer(show_command_palette=False, compact=True)

    def on_mount(self) -> None:
        self._view.conversation = self.conversation
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
        close_history(self._history, self.conversation.history)

    @property
    def _view(self) -> ConversationView:
        return self.query_one("#talk", ConversationView)

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        return action != "by" or bool(self._opened and self._opened.cascade)

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
            keep_chat(ChatPlace(lasting(self.model), tuple(self.adapters), self.conversation.id, draft, by=self._by))
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
        await self._open()

    async def _open(self) -> bool:
        """Load the model unless it is loaded; whoever comes meanwhile waits. Whether it is."""
        async with self._opening:
            return bool(self._opened and self._process.alive) or await self._open_now()

    async def _open_now(self) -> bool:
        self._opened = None
        self._status(f"loading {Path(self.model).name} …")
        try:
            self._opened = await self._process.open(self.model, run_settings(), self.adapters)
        except EdgeftError as error:
            self._failed(error)
            return False
        if not self.conversation.runtime:
            self.conversation.runtime = self._opened.runtime
            self.conversation.system = self.conversation.system or self._opened.system
        if self._opened.note:
            self.notify(self._opened.note, severity="warning", timeout=15, markup=False)
        self.refresh_bindings()
        self._status()
        return True

    def _failed(self, error: EdgeftError) -> None:
        self._status("not loaded" if self._opened is None else "failed")
        self.notify(error.hint or "", title=error.message, severity="error", timeout=15, markup=False)

    # --- Saying ---------------------------------------------------------------

    @on(Prompt.Sent)
    async def _sent(self, event: Prompt.Sent) -> None:
        if self.answering:
            self.query_one(Prompt).give_back(event.text)
            self.notify("an answer is being written: Esc stops it", severity="warning")
            return
        self._retries = 0
        self._keep(lambda: self.conversation.say(event.text))
        self._store_again()
        await self._view.add(Said("user", event.text))
        self._keep_place()
        self._begin()

    def _begin(self) -> None:
        self._view.anchor()
        self._answer = self._write_answer()

    @work(group="answer")
    async def _write_answer(self) -> None:
        if not await self._open():
            await self._give_back()
            return
        conversation, said = self.conversation, Said("assistant", "")
        sampling = dataclasses.replace(self.sampling, seed=self.sampling.seed + self._retries)
        self._keep(lambda: conversation.begin_answer(made_with(sampling, self.adapters)))
        await self._view.add(said)
        usage = None
        try:
            events = self._process.generate(conversation.prompt()[:-1], sampling, self._by)
            usage = await write_answer(events, said, conversation, self._keep, self._status)
        except EdgeftError as error:
            self._failed(error)
            if not conversation.messages[-1].content:
                await self._give_back()
        finally:
            self._usage, self._ended = usage, time.monotonic()
            self._store_again()
            if usage is not None:
                self._offline = is_offline(conversation, before=self._offline)
                self._status()

    async def _give_back(self) -> None:
        """Left in, a message that got no answer would stand before every later one: it goes back to be sent again."""
        asked = [said for said in self.query(Said) if said.role == "user"][-1]
        await self._take_back(asked)
        self.query_one(Prompt).give_back(asked.text)
        self._keep_place()

    async def _take_back(self, said: Said) -> None:
        """A message and all that came after it."""
        for _ in range(await self._view.take_back(said)):
            self._keep(lambda: self.conversation.withdraw(self.conversation.messages[-1].role))

    def _keep(self, store: Callable[[], object]) -> None:
        """Write to the history; while that fails the conversation goes on unstored, and says so once."""
        try:
            store()
        except EdgeftError as error:
            self.conversation.history, self._lost = None, True
            store()
            self._store_again()
            if self._lost:
                hint = "It is tried again with every message; Ctrl+G writes the conversation elsewhere."
                title = f"Nothing more is stored: {error.message}"
                self.notify(hint, title=title, severity="error", timeout=30, markup=False)

    def _store_again(self) -> None:
        if self._lost and (told := store_again(self.conversation)):
            close_history(self._history)
            self._history, self._lost = self.conversation.history, False
            self.notify(told[1], title=told[0], severity="warning", timeout=15, markup=False)

    async def _show(self, conversation: Conversation) -> None:
        """Draw a stored conversation from its end."""
        self.conversation, self._usage = conversation, last_usage(conversation)
        await self._view.show(conversation)
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
            await self._take_back(self.query(Said).last())
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
        await self._take_back(said)
        self.query_one(Prompt).load_text(said.text)
        self.query_one(Prompt).focus()

    async def action_branch(self) -> None:
        if self.conversation.messages:
            await self._branch(self.conversation.messages[-1].id)

    @on(Said.Branch)
    async def _branch_message(self, event: Said.Branch) -> None:
        await self._branch(self.conversation.messages[self._view.position(event.said)].id)

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
        await self._show(Conversation(old.model, old.runtime, old.system, old.history))

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
        made = next((one.made for one in reversed(other.messages) if one.made), {})
        adapters = [(str(name), float(scale)) for name, scale in made.get("adapters", ()) if Path(name).is_file()]
        if other.model != lasting(self.model):
            self.model, self.adapters, self._opened = other.model, adapters, None
            await self._open()
        elif adapters != self.adapters:
            await self._adapt(adapters)

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
            await self._adapt(list(state.adapters))
        self._status()

    async def _adapt(self, adapters: list[tuple[str, float]]) -> None:
        try:
            await self._process.set_adapters(adapters)
        except EdgeftError as error:
            self._failed(error)
        else:
            self.adapters = adapters

    @property
    def _here(self) -> Here:
        return Here(self.model, self.conversation, self.adapters)

    def action_actions(self) -> None:
        found = chat_actions(self._here, bool(self._opened and self._opened.cascade))
        names = {action: name for name, action in found.items()}

        async def do(action: Action | None) -> None:
            if action is not None:
                await self.run_action(names[action])

        self.app.push_screen(Choose("This conversation", list(names)), do)

    def action_save(self) -> None:
        number = self._here.number
        line = lambda name: command_line(("history", "export", number, name))  # noqa: E731
        title = "Write to: .md to read; .json with all parameters, .jsonl without, both to train on"
        self.app.push_screen(Ask(title, f"conversation-{number}.md", line, _no_new_file), self._save)

    def _save(self, name: str | None) -> None:
        if name is None:
            return
        file = Path(name).expanduser()
        try:
            write_conversation(self.conversation, file)
        except EdgeftError as error:
            self._failed(error)
        else:
            self.notify(f"written: {file.absolute()}", markup=False)

    def action_rename(self) -> None:
        number, history = self.conversation.id, self.conversation.history
        if number is None or history is None:
            self.notify("nothing is stored yet", severity="warning")
            return
        line = lambda title: command_line(("history", "rename", str(number), title))  # noqa: E731
        rename = lambda title: None if title is None else self._rename(title)  # noqa: E731
        before = history.conversation(number).title or ""
        self.app.push_screen(Ask("The name of this conversation", before, line, lambda _: ""), rename)

    def _rename(self, title: str) -> None:
        number, history = self.conversation.id, self.conversation.history
        assert history is not None and number is not None
        try:
            history.rename(number, title)
        except EdgeftError as error:
            self._failed(error)
        else:
            self.notify(f"conversation {number}: {title or 'no title'}", markup=False)

    def action_copy_answer(self) -> None:
        if said := self._last_answer():
            said.action_copy()

    def action_copy_code(self) -> None:
        found = [said for said in self.query(Said) if code_blocks(said.text)]
        if found:
            found[-1].action_copy_code()
        else:
            self.notify("no code block here", severity="warning")

    def _last_answer(self) -> Said | None:
        found = [said for said in self.query(Said) if said.role == "assistant"]
        return found[-1] if found else None

    def action_copy_command(self) -> None:
        self.app.copy_to_clipboard(command_line(self._here.resume))
        self.notify("copied")

    def action_by(self) -> None:
        """Of a cascade: whom the policy chooses, the device, or the cloud. Privacy rules hold all the same."""
        self._by = next_by(self._by)
        self._status()

    # --- The line below -------------------------------------------------------

    def _status(self, doing: str = "") -> None:
        """What changes comes first: a narrow window cuts the end."""
        opened = self._opened
        plain = self.app.has_class("plain")
        parts = figures(opened, self._usage, doing, plain=plain) if opened else [doing] if doing else []
        parts.append(Path(self.model).name)
        if opened:
            parts.append(opened.runtime)
            parts[:0] = route_state(self._by, self._offline) if opened.cascade else []
        if self.conversation.id:
            parts.append(f"conversation {self.conversation.id}")
        with contextlib.suppress(NoMatches):  # the screen is closing
            self.query_one("#status", Static).update(" · ".join(parts))


def _no_new_file(name: str) -> str:
    if not name.strip():
        return "which file?"
    return f"{name} exists: choose another name" if Path(name).expanduser().exists() else ""
