"""`edgeft history`: what was said in conversations: find, show, export, name, copy, remove."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgeft.cli._output import dry_run_option, json_option, note, print_json, print_table
from edgeft.errors import UsageError
from edgeft.paths import history_file

if TYPE_CHECKING:
    from edgeft.history import History, StoredConversation

LAST = "last"

_EXAMPLES = """\b
Examples:
  edgeft history search kitchen lamp
  edgeft history show last --last --code > answer.py
  edgeft history export 12 talk.json
  edgeft history rename 12 "The kitchen"
"""


@click.group(epilog=_EXAMPLES)
def history() -> None:
    """What was said: list, search, show, export, name, copy and remove conversations.

    A conversation is named by its number, or by `last`. What `edgeft chat` and `edgeft tui` store is the same.
    """


@history.command("list")
@json_option
def list_all(as_json: bool) -> None:
    """Conversations, newest first."""
    print_conversations(as_json)


@history.command("search")
@click.argument("words", nargs=-1, required=True)
@json_option
def search(words: Sequence[str], as_json: bool) -> None:
    """Messages with words that begin as WORDS do."""
    print_found(" ".join(words), as_json)


@history.command("show")
@click.argument("number")
@click.option("--last", "last_only", is_flag=True, help="The last answer only, as it was written.")
@click.option("--code", is_flag=True, help="With --last: the last code block in it.")
@json_option
def show(number: str, last_only: bool, code: bool, as_json: bool) -> None:
    """A conversation with all that is known of it, as Markdown."""
    from edgeft.conversation_file import as_json as whole
    from edgeft.conversation_file import as_markdown

    if code and not last_only:
        raise UsageError("--code needs --last")
    found = _conversation(number)
    if last_only:
        text = _last_answer(found, code)
        print_json({"text": text}) if as_json else click.echo(text, nl=not text.endswith("\n"))
    elif as_json:
        print_json(whole(found))
    else:
        click.echo(as_markdown(found), nl=False)


@history.command("export")
@click.argument("number")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@json_option
@dry_run_option
def export(number: str, file: Path, as_json: bool, dry_run: bool) -> None:
    """Write a conversation to FILE: .json with all parameters, .jsonl without, both to train on; else Markdown."""
    from edgeft.conversation_file import write_conversation

    found = _conversation(number)
    if file.exists():
        raise UsageError(f"{file} exists", "Choose another name.")
    if dry_run:
        note(f"would write {len(found.messages)} messages to {file}")
        return
    write_conversation(found, file)
    _done(as_json, f"saved to {file}", conversation=found.id, file=str(file))


@history.command("rename")
@click.argument("number")
@click.argument("title")
@json_option
@dry_run_option
def rename(number: str, title: str, as_json: bool, dry_run: bool) -> None:
    """Name a conversation; '' takes its name away."""
    with _opened() as stored:
        found = _number(stored, number)
        if dry_run:
            note(f"would name conversation {found} {title!r}")
            return
        stored.rename(found, title)
    _done(as_json, f"conversation {found}: {title or 'no title'}", conversation=found, title=title)


@history.command("branch")
@click.argument("number")
@json_option
@dry_run_option
def branch(number: str, as_json: bool, dry_run: bool) -> None:
    """Copy a conversation, to go on in the copy; prints its number."""
    with _opened() as stored:
        found = _number(stored, number)
        if dry_run:
            note(f"would copy conversation {found}")
            return
        messages = stored.conversation(found).messages
        copy = stored.branch(found, messages[-1].id if messages else 0)
    if as_json:
        print_json({"conversation": copy, "of": found})
    else:
        click.echo(copy)
        note(f"edgeft chat --resume {copy}")


@history.command("rm")
@click.argument("number")
@json_option
@dry_run_option
def remove(number: str, as_json: bool, dry_run: bool) -> None:
    """Delete a conversation for good."""
    with _opened() as stored:
        found = _number(stored, number)
        if dry_run:
            note(f"would delete conversation {found}, {len(stored.conversation(found).messages)} messages")
            return
        stored.remove(found)
    _done(as_json, f"deleted: conversation {found}", conversation=found)


def print_conversations(as_json: bool) -> None:
    summaries = []
    if history_file().is_file():
        with _opened() as stored:
            summaries = stored.summaries()
    if as_json:
        print_json([vars(summary) for summary in summaries])
        return
    rows = [
        (one.id, one.created[:16].replace("T", " "), Path(one.model).name, one.messages, _short(one.title))
        for one in summaries
    ]
    print_table(("id", "begun (UTC)", "model", "messages", "conversation"), rows)


def print_found(words: str, as_json: bool) -> None:
    found = []
    if history_file().is_file():
        with _opened() as stored:
            found = stored.search(words)
    if as_json:
        print_json([vars(one) for one in found])
        return
    rows = [(one.conversation, _short(one.title, 30), one.role, " ".join(one.snippet.split())) for one in found]
    print_table(("id", "conversation", "who", "text"), rows)


def _short(text: str, length: int = 60) -> str:
    line = " ".join(text.split())
    return line if len(line) <= length else line[: length - 1] + "…"


def _opened() -> History:
    from edgeft.history import History

    return History(history_file())


def _number(stored: History, name: str) -> int:
    """Raises: UsageError for what is no number of a conversation."""
    number = stored.latest() if name == LAST else int(name) if name.isdecimal() else None
    if number is None:
        hint = "edgeft history list shows what there is."
        raise UsageError("nothing was said yet" if name == LAST else f"no conversation {name!r}", hint)
    return stored.conversation(number).id


def _conversation(name: str) -> StoredConversation:
    with _opened() as stored:
        return stored.conversation(_number(stored, name))


def _last_answer(found: StoredConversation, code: bool) -> str:
    from edgeft.conversation_file import code_blocks

    answers = [one.content for one in found.messages if one.role == "assistant"]
    texts = [block for text in answers for block in code_blocks(text)] if code else answers
    if not texts:
        raise UsageError(f"no {'code block' if code else 'answer'} in conversation {found.id}")
    return texts[-1]


def _done(as_json: bool, text: str, **values: object) -> None:
    print_json(values) if as_json else note(text)
