"""`edgeft chat`: a conversation, line by line, on a terminal or through pipes."""

from __future__ import annotations

import contextlib
import dataclasses
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from edgeft.chat import SAMPLING, Sampling, TokenIds, Usage, changed_sampling
from edgeft.cli._generate import (
    adapter_option,
    ask_for,
    by_option,
    explain,
    fitted,
    open_model,
    parse_adapter,
    run_options,
    sampling,
    settings,
    stream,
    system_prompt,
)
from edgeft.cli._output import json_option, note, print_json
from edgeft.cli.history import print_conversations, print_found
from edgeft.conversation_file import made_with, route_of, write_conversation
from edgeft.errors import EdgeftError, ExitCode, UsageError
from edgeft.history import Conversation, History
from edgeft.paths import history_file
from edgeft.sessions import Opened

LATEST = "latest"

COMMANDS = """\
/help          this list
/reset         begin a new conversation; the old one stays in the history
/system TEXT   change the system prompt from here on; without TEXT: show it
/set NAME X    change the sampling from here on, such as: /set temperature 0.7; without X: show it
/adapter FILE  from here on with this adapter, or several: FILE=SCALE FILE; without FILE: with none
/by WHO        who of a cascade answers: policy, device or cloud
/retry         take back the last answer and try again, with the next seed
/edit TEXT     take back what was said last, with its answer, and say TEXT instead
/save FILE     write the conversation: .json with all parameters, .jsonl without, both to train on; else Markdown
/list          stored conversations
/search WORDS  stored messages with these words
/title TEXT    name this conversation
/branch        go on in a copy of this conversation; the old one stays as it is
/exit          leave (also Ctrl-D)

End a line with \\ to go on in the next one, or put a text of many lines between two lines of \"\"\".
A message that begins with a slash needs two. Ctrl-C stops an answer and keeps what is there."""

EXAMPLES = """\b
Examples:
  edgeft chat smollm2-135m
  edgeft chat mine-q4.gguf --system "Answer in one sentence."
  edgeft chat --resume            go on with the last conversation
  edgeft chat mine-q4.gguf --against smollm2-135m
  edgeft chat --list
  printf 'hello\\n/retry\\n' | edgeft chat mine-q4.gguf
"""


@click.command(epilog=EXAMPLES)
@click.argument("model", required=False)
@click.option("--system", help="System prompt; default: the one the model was trained with, if any. '' for none.")
@adapter_option
@click.option("--resume", is_flag=False, flag_value=LATEST, metavar="[ID]", help="Go on with a stored conversation.")
@click.option("--list", "list_only", is_flag=True, help="Show stored conversations.")
@click.option("--search", metavar="WORDS", help="Show stored messages with these words.")
@click.option(
    "--explain",
    "explaining",
    is_flag=True,
    help="Say with what settings a model runs and why, or how a cascade answered.",
)
@click.option("--no-history", is_flag=True, help="Store nothing.")
@by_option
@click.option(
    "--against", metavar="MODEL", help="Two answers side by side, on the whole screen; adapters are for the first."
)
@click.option("--screen", is_flag=True, help="On the whole screen; as in edgeft tui.")
@run_options
@json_option
def chat(
    model: str | None,
    system: str | None,
    adapters: tuple[str, ...],
    resume: str | None,
    list_only: bool,
    search: str | None,
    explaining: bool,
    no_history: bool,
    by: str,
    against: str | None,
    screen: bool,
    as_json: bool,
    **flags: Any,
) -> int:
    """Talk to MODEL. /help inside lists what can be typed.

    Without MODEL, --resume takes the one of that conversation. With --json every answer is one JSON object.
    """
    if list_only:
        print_conversations(as_json)
        return ExitCode.OK
    if search is not None:
        print_found(search, as_json)
        return ExitCode.OK
    if no_history and resume:
        raise UsageError("--resume needs the history that --no-history leaves out")
    if no_history and (screen or against):
        raise UsageError("--no-history is for a conversation line by line; the screen stores what is said")
    if against and resume:
        raise UsageError("--against begins two new conversations; --resume goes on with one", "Leave one of them out.")
    if screen or against:
        return _on_screen(model, adapters, resume, against or "", by)
    with contextlib.ExitStack() as stack:
        history = None if no_history else stack.enter_context(History(history_file()))
        old = _resumed(history, resume, model) if history and resume else None
        model = model or (old.model if old else None)
        if model is None:
            raise UsageError("which model?", "edgeft chat MODEL; edgeft models list shows what there is.")
        values = settings(flags)
        opened = open_model(model, values, [parse_adapter(adapter) for adapter in adapters])
        stack.enter_context(opened.session)
        ask_for(opened, by)
        conversation = old or Conversation(_lasting(model), opened.runtime, system_prompt(system, opened), history)
        if old and system is not None:
            conversation.change_system(system or None)
        return _Chat(opened, conversation, sampling(values), as_json, explaining=explaining).run()


def _on_screen(model: str | None, adapters: tuple[str, ...], resume: str | None, against: str, by: str) -> int:
    from edgeft.cli.tui import show
    from edgeft.tui.place import ChatPlace

    number = None
    if resume:
        with History(history_file()) as history:
            old = _resumed(history, resume, model)
        model, number = model or old.model, old.id
    if model is None:
        raise UsageError("which model?", "edgeft chat MODEL --screen; edgeft models list shows what there is.")
    parsed = tuple((str(one.path), one.scale) for one in map(parse_adapter, adapters))
    return show(Path.cwd(), chat=ChatPlace(model, parsed, number, against=against, by=by))


def _lasting(reference: str) -> str:
    """A reference that means the same from another folder."""
    path = Path(reference).expanduser()
    return str(path.absolute()) if path.exists() else reference


def _resumed(history: History, which: str, model: str | None) -> Conversation:
    if which == LATEST:
        number = history.latest(_lasting(model) if model else None)
        if number is None:
            raise UsageError("there is no conversation to resume" + (f" with {model}" if model else ""))
    elif which.isdecimal():
        number = int(which)
    else:
        raise UsageError(f"{which!r} is not the number of a conversation", f"edgeft chat {which} --resume")
    return Conversation.resume(history, number)


@dataclass
class _Chat:
    """The loop: read, answer, again."""

    opened: Opened
    conversation: Conversation
    sampling: Sampling
    as_json: bool
    retries: int = 0
    explaining: bool = False

    def run(self) -> int:
        if sys.stdin.isatty():
            note(_dim(f"{Path(self.conversation.model).name} on {self.opened.runtime} · /help · Ctrl-D leaves"))
        if self.conversation.messages:
            note(_dim(f"conversation {self.conversation.id}, {len(self.conversation.messages)} messages so far"))
        for text in _inputs():
            try:
                if text == "/exit":
                    break
                self._handle(text)
            except EdgeftError as error:
                if not sys.stdin.isatty():
                    raise
                note(f"error: {error.message}" + (f"\n  {error.hint}" if error.hint else ""))
            except _Interrupted:
                return ExitCode.INTERRUPTED
        return ExitCode.OK

    def _handle(self, text: str) -> None:
        name, _, argument = text.partition(" ")
        if not text.startswith("/") or text.startswith("//"):
            self.retries = 0
            self.conversation.say(text.replace("//", "/", 1) if text.startswith("//") else text)
            self._answer()
        elif command := self._commands().get(name):
            command(argument.strip())
        else:
            raise UsageError(f"no command {name}", "/help lists them. A message that begins with a slash needs two.")

    def _commands(self) -> dict[str, Callable[[str], None]]:
        return {
            "/help": lambda _: note(COMMANDS),
            "/reset": lambda _: self._reset(),
            "/system": self._system,
            "/retry": lambda _: self._retry(),
            "/edit": self._edit,
            "/set": self._set,
            "/adapter": self._adapt,
            "/by": self._by,
            "/save": self._save,
            "/list": lambda _: print_conversations(self.as_json),
            "/search": lambda words: print_found(words, self.as_json),
            "/title": self._title,
            "/branch": lambda _: self._branch(),
        }

    def _reset(self) -> None:
        old = self.conversation
        self.conversation = Conversation(old.model, old.runtime, old.system, old.history)
        note(_dim("a new conversation"))

    def _stored(self) -> tuple[History, int]:
        """Raises: UsageError when the conversation is not in the history."""
        if self.conversation.history is None or self.conversation.id is None:
            raise UsageError("this conversation is not stored yet", "Say something first; --no-history stores nothing.")
        return self.conversation.history, self.conversation.id

    def _title(self, text: str) -> None:
        history, number = self._stored()
        history.rename(number, text)
        note(_dim(f"conversation {number}: {text or 'no title'}"))

    def _branch(self) -> None:
        history, number = self._stored()
        copy = history.branch(number, self.conversation.messages[-1].id if self.conversation.messages else 0)
        self.conversation = Conversation.resume(history, copy)
        note(_dim(f"now in conversation {copy}, a copy of {number}"))

    def _system(self, text: str) -> None:
        if text:
            self.conversation.change_system(text)
        note(_dim(f"system prompt: {self.conversation.system or 'none'}"))

    def _retry(self) -> None:
        self.conversation.withdraw("assistant")
        if not self.conversation.messages:
            raise UsageError("there is nothing to retry")
        self.retries += 1
        self._answer()

    def _edit(self, text: str) -> None:
        if not text:
            raise UsageError("what shall it be instead?", "/edit TEXT")
        self.conversation.withdraw("assistant")
        if self.conversation.withdraw("user") is None:
            raise UsageError("there is nothing to edit")
        self.retries = 0
        self.conversation.say(text)
        self._answer()

    def _set(self, text: str) -> None:
        name, _, value = text.partition(" ")
        if value:
            self.sampling = changed_sampling(self.sampling, name, value.strip())
        shown = {key: getattr(self.sampling, key.replace("-", "_")) for key in SAMPLING}
        note(_dim(", ".join(f"{key} {number:g}" for key, number in shown.items())))

    def _adapt(self, text: str) -> None:
        adapters = [parse_adapter(word) for word in shlex.split(text)]
        self.opened.session.set_adapters(adapters)
        self.opened = dataclasses.replace(self.opened, adapters=tuple(adapters))
        note(_dim(f"adapters: {text or 'none'}"))

    def _by(self, who: str) -> None:
        ask_for(self.opened, who)
        note(_dim(f"who answers: {who}"))

    def _save(self, name: str) -> None:
        arguments = shlex.split(name)
        if len(arguments) != 1:
            raise UsageError("which file?", "/save FILE")
        path = Path(arguments[0]).expanduser()
        if path.exists():
            raise UsageError(f"{path} exists", "Choose another name.")
        write_conversation(self.conversation, path)
        note(_dim(f"saved to {path}"))

    def _answer(self) -> None:
        """Answer the last message."""
        conversation = self.conversation
        how = dataclasses.replace(self.sampling, seed=self.sampling.seed + self.retries)
        try:
            text, usage = self._generate(fitted(self.opened, conversation.prompt(), how.max_tokens), how)
        except EdgeftError:
            # Left in, a message that cannot be answered would stand before every later one.
            if conversation.messages[-1].role == "user" or not conversation.messages[-1].content:
                conversation.withdraw("assistant")
                conversation.withdraw("user")
            raise
        self._close_answer(text, usage)

    def _generate(self, prompt: TokenIds, how: Sampling) -> tuple[str, Usage]:
        """Stream an answer to stdout and into the conversation; whatever happens, what came so far is kept."""
        text, usage = "", None
        adapters = [(str(one.path), one.scale) for one in self.opened.adapters]
        self.conversation.begin_answer(made_with(how, adapters))
        try:
            with contextlib.closing(stream(self.opened.session, prompt, how)) as answer:
                for delta in answer:
                    text, usage = text + delta.text, delta.usage
                    if not self.as_json:
                        click.echo(delta.text, nl=False)
                    self.conversation.grow_answer(text)
        finally:
            self.conversation.end_answer(text, usage, route_of(self.opened.session) if usage else None)
        assert usage is not None
        return text, usage

    def _close_answer(self, text: str, usage: Usage) -> None:
        if self.as_json:
            print_json({"text": text, "conversation": self.conversation.id, "usage": usage.as_dict()})
        else:
            click.echo()
        note(_dim(_summary(usage, self.opened.session.context)))
        if self.explaining:
            explain(self.opened)
        if usage.finish_reason == "cancel" and not sys.stdin.isatty():
            raise _Interrupted


class _Interrupted(Exception):
    """Ctrl-C with nobody at the keyboard to say what comes next."""


def _summary(usage: Usage, context: int) -> str:
    used = usage.prompt_tokens + usage.completion_tokens
    parts = [
        f"{usage.decode_tokens_per_s:.1f} tokens/s",
        f"first token {usage.ttft_s * 1000:.0f} ms",
        f"context {used}/{context}",
    ]
    ended = {"cancel": ["stopped"], "length": ["cut at the longest answer or the end of the context"]}
    return " · ".join(ended.get(usage.finish_reason, []) + parts)


def _dim(text: str) -> str:
    return click.style(text, dim=True)


def _inputs() -> Iterator[str]:
    """What the user types, without empty messages; ends with the input."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (gives `input` editing and a memory of lines)
    while True:
        try:
            text = _read_message().strip()
        except EOFError:
            if sys.stdin.isatty():
                note("")
            return
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
            note(_dim("\nCtrl-D leaves"))
            continue
        if text:
            yield text


def _read_message() -> str:
    """One message: a line, lines joined by a backslash, or a block between two lines of three quotes."""
    line = _read_line("> ")
    if line.strip() == '"""':
        return "\n".join(_block())
    lines = [line]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        with contextlib.suppress(EOFError):
            lines.append(_read_line("… "))
    return "\n".join(lines)


def _block() -> Iterator[str]:
    """Lines up to the closing quotes, or to the end of the input: what was typed is not thrown away."""
    with contextlib.suppress(EOFError):
        while (line := _read_line("… ")).strip() != '"""':
            yield line


def _read_line(prompt: str) -> str:
    if not sys.stdin.isatty():
        line = sys.stdin.buffer.readline()
        if not line:
            raise EOFError
        try:
            return line.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise UsageError(f"the input is not UTF-8: {error}") from error
    if sys.stdout.isatty():
        return input(prompt)
    # `input` would put the prompt into the answers.
    click.echo(prompt, nl=False, err=True)
    return input()
