"""Conversations in one SQLite file: stored before they are answered, so that nothing said is ever lost.

A user's message is written before its answer is begun, and an answer while it grows: after a crash or a power cut the
file holds what was on the screen. Several processes may use the file at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from edgeft.chat import Message, Usage
from edgeft.errors import EdgeftError, UsageError, WriteError

State = Literal["writing", "done", "stopped"]
"""An answer that is still being written, or was when its process died; a finished one; one that the user stopped."""

_MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        """CREATE TABLE conversations (
            id INTEGER PRIMARY KEY AUTOINCREMENT,
            created TEXT NOT NULL,
            model TEXT NOT NULL,
            runtime TEXT NOT NULL,
            system TEXT
        )""",
        """CREATE TABLE messages (
            id INTEGER PRIMARY KEY AUTOINCREMENT,
            conversation INTEGER NOT NULL REFERENCES conversations (id) ON DELETE CASCADE,
            created TEXT NOT NULL,
            role TEXT NOT NULL CHECK (role IN ('user', 'assistant')),
            content TEXT NOT NULL,
            state TEXT NOT NULL CHECK (state IN ('writing', 'done', 'stopped')),
            withdrawn INTEGER NOT NULL DEFAULT 0,
            usage TEXT
        )""",
        "CREATE INDEX messages_by_conversation ON messages (conversation, id)",
    ),
    (
        "ALTER TABLE conversations ADD COLUMN title TEXT",
        "CREATE VIRTUAL TABLE messages_text USING fts5 (content, content = 'messages', content_rowid = 'id')",
        "INSERT INTO messages_text (messages_text) VALUES ('rebuild')",
        """CREATE TRIGGER messages_added AFTER INSERT ON messages BEGIN
            INSERT INTO messages_text (rowid, content) VALUES (new.id, new.content);
        END""",
        """CREATE TRIGGER messages_changed AFTER UPDATE OF content ON messages BEGIN
            INSERT INTO messages_text (messages_text, rowid, content) VALUES ('delete', old.id, old.content);
            INSERT INTO messages_text (rowid, content) VALUES (new.id, new.content);
        END""",
        """CREATE TRIGGER messages_removed AFTER DELETE ON messages BEGIN
            INSERT INTO messages_text (messages_text, rowid, content) VALUES ('delete', old.id, old.content);
        END""",
    ),
    ("ALTER TABLE messages ADD COLUMN made TEXT",),
)
"""What brings the file from version n to n + 1; `PRAGMA user_version` says where it is. Only ever append."""

_TITLE = (
    "coalesce(title, (SELECT content FROM messages AS said WHERE said.conversation = conversations.id"
    " AND said.role = 'user' ORDER BY withdrawn, id LIMIT 1), '')"
)
_BUSY_S = 10.0
"""How long to wait for another process that is writing."""
_GROWTH_S = 0.25
"""How often a growing answer is written: the most that a crash can lose."""


@dataclass(frozen=True)
class StoredMessage:
    id: int
    role: str
    content: str
    state: State
    created: str
    usage: dict[str, Any] | None = None
    made: Mapping[str, Any] | None = None
    """Of an answer, how it was made: "sampling", "adapters", and in a cascade "route": who wrote it, why, its cost."""


@dataclass(frozen=True)
class StoredConversation:
    id: int
    created: str
    """ISO 8601, UTC."""
    model: str
    runtime: str
    system: str | None
    messages: tuple[StoredMessage, ...]
    title: str | None = None
    """What the user named it."""


@dataclass(frozen=True)
class Summary:
    id: int
    created: str
    model: str
    messages: int
    title: str
    """What the user named it, else the first thing the user said."""


@dataclass(frozen=True)
class Found:
    """A message that a search found."""

    conversation: int
    title: str
    role: str
    snippet: str
    """The words around what was looked for, which is between « and »."""


class History:
    """The file. Used by one thread; other processes may have it open too."""

    def __init__(self, path: Path) -> None:
        """Open, and create or bring up to date.

        Raises:
            WriteError: the folder cannot be written.
            EdgeftError: the file is damaged, or made by a newer edgeft.
        """
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # What people say is theirs alone; SQLite gives its side files the same mode.
            os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
        except OSError as error:
            raise WriteError.from_os_error(error, path) from error
        with self._errors():
            self._db = sqlite3.connect(path, timeout=_BUSY_S, isolation_level=None)
            try:
                self._prepare()
            except BaseException:
                self._db.close()
                raise

    def __enter__(self) -> History:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._db.close()

    def begin(self, model: str, runtime: str, system: str | None) -> int:
        """A new conversation; its id."""
        return self._insert(
            "INSERT INTO conversations (created, model, runtime, system) VALUES (?, ?, ?, ?)",
            (_now(), model, runtime, system),
        )

    def add(
        self, conversation: int, role: str, content: str, state: State = "done", made: Mapping[str, Any] | None = None
    ) -> int:
        """A new message at the end; its id."""
        return self._insert(
            "INSERT INTO messages (conversation, created, role, content, state, made) VALUES (?, ?, ?, ?, ?, ?)",
            (conversation, _now(), role, content, state, _json(made)),
        )

    def update(
        self,
        message: int,
        content: str,
        state: State,
        usage: Mapping[str, Any] | None = None,
        made: Mapping[str, Any] | None = None,
    ) -> None:
        self._execute(
            "UPDATE messages SET content = ?, state = ?, usage = ?, made = ? WHERE id = ?",
            (content, state, _json(usage), _json(made), message),
        )

    def withdraw(self, message: int) -> None:
        """Take a message out of its conversation; the file keeps it."""
        self._execute("UPDATE messages SET withdrawn = 1 WHERE id = ?", (message,))

    def set_system(self, conversation: int, system: str | None) -> None:
        self._execute("UPDATE conversations SET system = ? WHERE id = ?", (system, conversation))

    def rename(self, conversation: int, title: str) -> None:
        self._execute("UPDATE conversations SET title = ? WHERE id = ?", (title.strip() or None, conversation))

    def branch(self, conversation: int, last: int) -> int:
        """A new conversation that begins as this one does, up to and including the message `last`; its id."""
        old = self.conversation(conversation)
        new = self.begin(old.model, old.runtime, old.system)
        self._execute(
            "INSERT INTO messages (conversation, created, role, content, state, usage, made)"
            " SELECT ?, created, role, content, iif(state = 'writing', 'stopped', state), usage, made FROM messages"
            " WHERE conversation = ? AND NOT withdrawn AND id <= ? ORDER BY id",
            (new, conversation, last),
        )
        return new

    def remove(self, conversation: int) -> None:
        """Delete a conversation and what was said in it. Raises: UsageError when there is none of that number."""
        self.conversation(conversation)
        self._execute("DELETE FROM conversations WHERE id = ?", (conversation,))

    def search(self, text: str, limit: int = 50) -> list[Found]:
        """Messages with words that begin as those of `text` do, the best first."""
        words = " ".join('"' + word.replace('"', '""') + '"*' for word in text.split())
        if not words:
            return []
        rows = self._execute(
            "SELECT conversation, role, snippet(messages_text, 0, '«', '»', '…', 12)"
            " FROM messages_text JOIN messages ON messages.id = messages_text.rowid"
            " WHERE messages_text MATCH ? AND NOT withdrawn ORDER BY rank LIMIT ?",
            (words, limit),
        )
        # A title may be the first thing said: found once for each conversation, not for each of its messages.
        titles = {number: self._title(number) for number in {row[0] for row in rows}}
        return [Found(conversation, titles[conversation], role, snippet) for conversation, role, snippet in rows]

    def _title(self, conversation: int) -> str:
        rows = self._execute(f"SELECT {_TITLE} FROM conversations WHERE id = ?", (conversation,))
        return str(rows[0][0])

    def conversation(self, number: int) -> StoredConversation:
        """Raises: UsageError when there is none of that number."""
        rows = self._execute("SELECT created, model, runtime, system, title FROM conversations WHERE id = ?", (number,))
        if not rows:
            raise UsageError(f"no conversation {number} in {self.path}", "edgeft history list shows what there is.")
        messages = self._execute(
            "SELECT id, role, content, state, created, usage, made FROM messages"
            " WHERE conversation = ? AND NOT withdrawn ORDER BY id",
            (number,),
        )
        created, model, runtime, system, title = rows[0]
        return StoredConversation(
            number, created, model, runtime, system, tuple(_message(*message) for message in messages), title
        )

    def latest(self, model: str | None = None) -> int | None:
        """The conversation in which something was said last, with `model` if given."""
        rows = self._execute(
            "SELECT conversation FROM messages JOIN conversations ON conversations.id = conversation"
            " WHERE ? IS NULL OR model = ? ORDER BY messages.id DESC LIMIT 1",
            (model, model),
        )
        return int(rows[0][0]) if rows else None

    def summaries(self, limit: int = 50) -> list[Summary]:
        """Conversations, newest first."""
        rows = self._execute(
            "SELECT id, created, model,"
            " (SELECT count(*) FROM messages WHERE conversation = conversations.id AND NOT withdrawn),"
            f" {_TITLE}"
            " FROM conversations ORDER BY id DESC LIMIT ?",
            (limit,),
        )
        return [Summary(*row) for row in rows]

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """All of what is written within, or nothing of it."""
        self._execute("BEGIN IMMEDIATE", ())
        try:
            yield
        except BaseException:
            with contextlib.suppress(EdgeftError):  # a full disk has ended it already
                self._execute("ROLLBACK", ())
            raise
        self._execute("COMMIT", ())

    def _prepare(self) -> None:
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA foreign_keys = ON")
        # The lock comes first: two processes may find the file empty at the same moment.
        self._db.execute("BEGIN IMMEDIATE")
        version = int(self._db.execute("PRAGMA user_version").fetchone()[0])
        if version > len(_MIGRATIONS):
            raise EdgeftError(
                f"{self.path} was written by a newer edgeft (version {version}; this one knows {len(_MIGRATIONS)})",
                "Update edgeft, or use --no-history.",
            )
        for statements in _MIGRATIONS[version:]:
            for statement in statements:
                self._db.execute(statement)
        self._db.execute(f"PRAGMA user_version = {len(_MIGRATIONS)}")
        self._db.execute("COMMIT")

    def _insert(self, statement: str, values: Sequence[Any]) -> int:
        with self._errors():
            return int(self._db.execute(statement, values).lastrowid or 0)

    def _execute(self, statement: str, values: Sequence[Any]) -> list[Any]:
        with self._errors():
            return self._db.execute(statement, values).fetchall()

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise EdgeftError(
                f"the history {self.path} cannot be used: {error}", "Move the file away, or use --no-history."
            ) from error


def open_or_begin_anew(path: Path) -> tuple[History, Path | None]:
    """The history; a damaged file is set aside and a new one begun.

    Returns:
        The history, and where the damaged file is now, if it was damaged.

    Raises:
        EdgeftError: the file cannot be used for another reason, such as a newer version or a full disk.
    """
    try:
        return History(path), None
    except EdgeftError as error:
        if not _is_damage(error):
            raise
    aside = _set_aside(path)
    return History(path), aside


def _is_damage(error: EdgeftError) -> bool:
    cause = error.__cause__
    # The low byte is the primary code: https://sqlite.org/rescode.html
    code = getattr(cause, "sqlite_errorcode", 0) & 0xFF
    return isinstance(cause, sqlite3.DatabaseError) and code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def _set_aside(path: Path) -> Path:
    """Rename the file and what SQLite keeps beside it, under a name that is free."""
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    names = (path.with_name(f"{path.name}.damaged-{stamp}{more}") for more in ("", *(f"-{n}" for n in range(1, 1000))))
    aside = next(name for name in names if not name.exists())
    try:
        path.rename(aside)
        for suffix in ("-wal", "-shm"):
            side = path.with_name(path.name + suffix)
            if side.exists():
                side.rename(aside.with_name(aside.name + suffix))
    except OSError as error:
        raise WriteError.from_os_error(error, path) from error
    return aside


@dataclass
class Conversation:
    """What has been said so far, in memory and, with a history, in the file.

    The conversation is stored with its first message; one in which nothing is said leaves no trace.
    """

    model: str
    runtime: str
    system: str | None = None
    history: History | None = None
    id: int | None = None
    messages: list[StoredMessage] = field(default_factory=list)
    _written: float = 0.0

    @classmethod
    def resume(cls, history: History, number: int) -> Conversation:
        """Raises: UsageError when there is no such conversation."""
        stored = history.conversation(number)
        return cls(stored.model, stored.runtime, stored.system, history, number, list(stored.messages))

    def prompt(self) -> list[Message]:
        """The messages as a model's template wants them."""
        system: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, *({"role": message.role, "content": message.content} for message in self.messages)]

    def say(self, text: str) -> None:
        """Add what the user says."""
        self._add("user", text, "done")

    def begin_answer(self, made: Mapping[str, Any] | None = None) -> None:
        """Args: made: how; see `StoredMessage`."""
        self._add("assistant", "", "writing", made)

    def grow_answer(self, text: str) -> None:
        """`text` is the whole answer so far."""
        now = time.monotonic()
        if now - self._written >= _GROWTH_S:
            self._written = now
            self._set_last(text, "writing", None)

    def end_answer(self, text: str, usage: Usage | None, route: Mapping[str, Any] | None = None) -> None:
        """The answer is complete, or was stopped; without usage, by a failure.

        Args:
            route: how a cascade answered.
        """
        stopped = usage is None or usage.finish_reason == "cancel"
        self._set_last(text, "stopped" if stopped else "done", usage, route)

    def withdraw(self, role: str) -> StoredMessage | None:
        """Take back the last message if it is of this role."""
        if not self.messages or self.messages[-1].role != role:
            return None
        if self.history is not None:
            self.history.withdraw(self.messages[-1].id)
        return self.messages.pop()

    def store_anew(self, history: History) -> None:
        """Store all of it as a new conversation, after the file could not be used for a while. Raises: EdgeftError."""
        with history.at_once():
            number = history.begin(self.model, self.runtime, self.system)
            stored = []
            for one in self.messages:
                message = history.add(number, one.role, one.content, one.state, one.made)
                if one.usage:
                    history.update(message, one.content, one.state, one.usage, one.made)
                stored.append(dataclasses.replace(one, id=message))
        self.history, self.id, self.messages = history, number, stored

    def change_system(self, system: str | None) -> None:
        self.system = system
        if self.history is not None and self.id is not None:
            self.history.set_system(self.id, system)

    def _add(self, role: str, text: str, state: State, made: Mapping[str, Any] | None = None) -> None:
        number = 0
        if self.history is not None:
            if self.id is None:
                self.id = self.history.begin(self.model, self.runtime, self.system)
            number = self.history.add(self.id, role, text, state, made)
        self.messages.append(StoredMessage(number, role, text, state, _now(), None, made))

    def _set_last(self, text: str, state: State, usage: Usage | None, route: Mapping[str, Any] | None = None) -> None:
        last = self.messages[-1]
        made = {**(last.made or {}), "route": route} if route else last.made
        self.messages[-1] = now = dataclasses.replace(
            last, content=text, state=state, usage=usage.as_dict() if usage else None, made=made
        )
        if self.history is not None:
            self.history.update(now.id, text, state, now.usage, made)


def _message(*row: Any) -> StoredMessage:
    number, role, content, state, created, usage, made = row
    usage, made = (json.loads(value) if value else None for value in (usage, made))
    return StoredMessage(number, role, content, state, created, usage, made)


def _json(value: Mapping[str, Any] | None) -> str | None:
    return json.dumps(value) if value else None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
