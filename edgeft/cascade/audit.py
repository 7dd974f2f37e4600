"""The audit log: what left the device, why, and what it cost, in one SQLite file without any text.

Table `requests`: number, id, at (Unix time, s), author, reason, finish, cost, cloud_tokens, ttft_ms, total_ms,
confidence, risk, left_device, record (the whole `Record` as JSON). Only ever grows by columns.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edgeft.cascade.settings import AuditSettings
from edgeft.cascade.types import Record
from edgeft.errors import WriteError

_COLUMNS = (
    "id TEXT",
    "at REAL",
    "author TEXT",
    "reason TEXT",
    "finish TEXT",
    "cost REAL",
    "cloud_tokens INTEGER",
    "ttft_ms REAL",
    "total_ms REAL",
    "confidence REAL",
    "risk REAL",
    "left_device INTEGER",
)
_NAMES = [column.split()[0] for column in _COLUMNS]
_CHECKED = 64
"""The size is looked at once in so many requests."""


class AuditLog:
    """Any thread. Raises: WriteError when the file cannot be used."""

    def __init__(self, path: Path, settings: AuditSettings) -> None:
        self._path, self._settings = path, settings
        self._lock = threading.Lock()
        self._added = 0
        self._db: sqlite3.Connection | None = self._open() if settings.enabled else None

    def _open(self) -> sqlite3.Connection:
        with self._border():
            self._path.parent.mkdir(parents=True, exist_ok=True)
            db = sqlite3.connect(self._path, timeout=10.0, check_same_thread=False, isolation_level=None)
            db.execute("PRAGMA auto_vacuum = INCREMENTAL")
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = NORMAL")
            db.execute(
                f"CREATE TABLE IF NOT EXISTS requests (number INTEGER PRIMARY KEY, {', '.join(_COLUMNS)}, record TEXT)"
            )
            self._path.chmod(0o600)
            return db

    @contextlib.contextmanager
    def _border(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise WriteError(f"cannot use the audit log {self._path}: {error}") from error

    def close(self) -> None:
        with self._lock:
            if self._db is not None:
                self._db.close()
                self._db = None

    def add(self, record: Record) -> None:
        if self._db is None:
            return
        values = record.as_dict()
        with self._lock, self._border():
            marks = ", ".join("?" * (len(_NAMES) + 1))
            row = [*(values[name] for name in _NAMES), json.dumps(values, ensure_ascii=False)]
            self._db.execute(f"INSERT INTO requests ({', '.join(_NAMES)}, record) VALUES ({marks})", row)
            self._added += 1
            if self._added % _CHECKED == 0:
                self._shrink(self._db)

    def _shrink(self, db: sqlite3.Connection) -> None:
        """Forget the oldest quarter when the file is too large."""
        pages, size, free = (db.execute(f"PRAGMA {name}").fetchone()[0] for name in _SIZES)
        if (pages - free) * size <= self._settings.max_mb * 1e6:
            return
        low, high = db.execute("SELECT min(number), max(number) FROM requests").fetchone()
        db.execute("DELETE FROM requests WHERE number <= ?", (low + (high - low) // 4,))
        db.execute("PRAGMA incremental_vacuum").fetchall()
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    def records(self, limit: int = 100) -> list[dict[str, Any]]:
        """The latest records, newest first."""
        if self._db is None:
            return []
        with self._lock, self._border():
            rows = self._db.execute("SELECT record FROM requests ORDER BY number DESC LIMIT ?", (limit,)).fetchall()
        return [json.loads(row[0]) for row in rows]


_SIZES = ("page_count", "page_size", "freelist_count")
