"""What a server answered, how well and how fast, in one SQLite file: feedback goes beside the request it is about.

No prompt and no answer is stored unless the server was told to. The oldest requests make room for new ones.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from edgeft.errors import WriteError

Rating = Literal["up", "down"]
KEPT = 100_000
"""Requests kept; about 30 MB."""
_SPARE = 1_000
"""How far the file may grow past that before it is cut."""
_BUSY_S = 10.0


@dataclass(frozen=True)
class Request:
    """One request and what became of it."""

    id: str
    """The id of the answer, as the client saw it."""
    at: float
    """Unix time of arrival, seconds."""
    model: str
    """The name that was asked for."""
    served: str
    """The name that answered: of a split, the side that was taken."""
    client: str
    """Number of the key, or the address; never the key."""
    status: int
    finish: str | None = None
    error: str | None = None
    """Code of the error, where there was one."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    queued_ms: float = 0.0
    ttft_ms: float | None = None
    """From arrival to the first token."""
    total_ms: float = 0.0
    tokens_per_s: float | None = None
    confidence: float | None = None
    """Mean natural-log probability of the answer's tokens."""
    deferral: str | None = None
    """Why the cloud was asked; None when it was not."""
    cost: float = 0.0
    messages: str | None = None
    answer: str | None = None


@dataclass(frozen=True)
class Rated:
    """A request with what its reader thought of it: 1 up, -1 down, None no word."""

    request: Request
    rating: int | None


_TYPES = {"str": "TEXT", "float": "REAL", "int": "INTEGER"}
_COLUMNS = {field.name: _TYPES[str(field.type).split(" ")[0]] for field in fields(Request)}
_NAMES = ", ".join(_COLUMNS)
_MIGRATIONS = (
    f"""CREATE TABLE requests (
        number INTEGER PRIMARY KEY AUTOINCREMENT,
        {", ".join(f"{name} {kind}" for name, kind in _COLUMNS.items())},
        rating INTEGER,
        comment TEXT
    );
    CREATE UNIQUE INDEX requests_by_id ON requests (id);
    CREATE INDEX requests_by_time ON requests (at);""",
)
"""What brings the file from version n to n + 1; only ever append."""


class RequestLog:
    """The file; any one thread at a time may use it.

    Raises:
        WriteError: the file cannot be opened or is no log.
    """

    def __init__(self, path: Path, kept: int = KEPT) -> None:
        self._path, self._kept, self._added = path, kept, 0
        with self._border():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(path, timeout=_BUSY_S, check_same_thread=False, isolation_level=None)
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = NORMAL")
            version = self._db.execute("PRAGMA user_version").fetchone()[0]
            for number, script in enumerate(_MIGRATIONS[version:], version + 1):
                self._db.executescript(f"BEGIN IMMEDIATE; {script} PRAGMA user_version = {number}; COMMIT;")
            path.chmod(0o600)

    def __enter__(self) -> RequestLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._db.close()

    @contextlib.contextmanager
    def _border(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise WriteError(f"cannot use the request log {self._path}: {error}") from error

    def add(self, request: Request) -> None:
        with self._border():
            marks = ", ".join("?" * len(_COLUMNS))
            self._db.execute(f"INSERT INTO requests ({_NAMES}) VALUES ({marks})", tuple(asdict(request).values()))
        self._added += 1
        if self._added % _SPARE == 0:
            self.prune()

    def prune(self) -> None:
        """Forget the oldest requests beyond those that are kept."""
        with self._border():
            self._db.execute(
                "DELETE FROM requests WHERE number <= (SELECT max(number) FROM requests) - ?", (self._kept,)
            )

    def rate(self, identity: str, rating: Rating, comment: str | None = None) -> Request | None:
        """Store what a reader thought of an answer; the request it was, or None when there is none."""
        value = 1 if rating == "up" else -1
        with self._border():
            self._db.execute("UPDATE requests SET rating = ?, comment = ? WHERE id = ?", (value, comment, identity))
            row = self._db.execute(f"SELECT {_NAMES} FROM requests WHERE id = ?", (identity,)).fetchone()
        return Request(*row) if row else None

    def since(self, begin: float, end: float = float("inf")) -> list[Rated]:
        """Requests that arrived at `begin` or later and before `end` (Unix time, seconds), oldest first."""
        with self._border():
            rows = self._db.execute(
                f"SELECT {_NAMES}, rating FROM requests WHERE at >= ? AND at < ? ORDER BY number", (begin, end)
            ).fetchall()
        return [Rated(Request(*row[:-1]), row[-1]) for row in rows]


def read_log(path: Path) -> list[Rated]:
    """All requests of a server's log, or of a cascade's audit log (`edgeft/cascade/audit.py`), oldest first.

    Raises:
        WriteError: it is neither.
    """
    with contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as db:
        try:
            columns = {row[1] for row in db.execute("PRAGMA table_info(requests)")}
            if "author" in columns:
                rows = db.execute("SELECT record FROM requests ORDER BY number").fetchall()
                return [_audited(json.loads(row[0])) for row in rows]
        except (sqlite3.Error, ValueError, KeyError) as error:
            raise WriteError(f"cannot read {path}: {error}") from error
    with RequestLog(path) as log:
        return log.since(0)


def _audited(record: Mapping[str, Any]) -> Rated:
    """What an audit log knows of a request. It has no feedback: that is in the server's log."""
    decode_s = (record["total_ms"] - (record["ttft_ms"] or 0)) / 1000
    tokens = record["completion_tokens"]
    request = Request(
        record["id"],
        record["at"],
        "cascade",
        "cascade",
        "",
        503 if record["finish"] in ("refused", "broken") else 200,
        record["finish"],
        record["error"] or None,
        record["prompt_tokens"],
        tokens,
        ttft_ms=record["ttft_ms"],
        total_ms=record["total_ms"],
        tokens_per_s=(tokens - 1) / decode_s if tokens > 1 and decode_s > 0 else None,
        confidence=record["confidence"],
        deferral=None if record["author"] == "local" else deferral_of(record["reason"]),
        cost=record["cost"],
    )
    return Rated(request, None)


def deferral_of(reason: str) -> str:
    """A reason without its figures, which come after a colon: few words that repeat, fit for counting."""
    return reason.partition(":")[0].partition(";")[0]


def as_line(request: Request) -> str:
    """A request as one JSON line, without what it does not have."""
    values = {name: value for name, value in asdict(request).items() if value is not None}
    return json.dumps({"event": "request", **values}, ensure_ascii=False)
