"""What the cloud may cost: spending is reserved before a request and kept in a file that outlives the process."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgeft.cascade.settings import BudgetSettings, Settings
from edgeft.errors import WriteError


@dataclass(frozen=True)
class Reservation:
    number: int
    money: float
    tokens: int


@dataclass(frozen=True)
class Spent:
    """Of one period; a limit of 0 is none."""

    period: str
    money: float
    money_limit: float
    tokens: int
    tokens_limit: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def spending(settings: Settings) -> list[Spent]:
    """What this day and this month have cost. Raises: WriteError."""
    limits = settings.budget
    spent: dict[str, tuple[float, int]] = {"day": (0.0, 0), "month": (0.0, 0)}
    if settings.spending_file.is_file():  # looking makes no file
        budget = Budget(limits, settings.spending_file)
        try:
            spent = budget.spent()
        finally:
            budget.close()
    most = {"day": (limits.day_money, limits.day_tokens), "month": (limits.month_money, limits.month_tokens)}
    return [Spent(name, money, most[name][0], tokens, most[name][1]) for name, (money, tokens) in spent.items()]


class Budget:
    """Money and tokens per request, day and month (UTC). Any thread, any number of processes.

    Spending that a wrong clock put into the future counts as today's: setting a clock back wins nothing.

    Raises:
        WriteError: the file cannot be used.
    """

    def __init__(self, settings: BudgetSettings, path: Path, clock: Callable[[], float] = time.time) -> None:
        self._settings, self._path, self._clock = settings, path, clock
        self._lock = threading.Lock()
        with self._border():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(path, timeout=10.0, check_same_thread=False, isolation_level=None)
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = NORMAL")
            self._db.execute(
                "CREATE TABLE IF NOT EXISTS spending "
                "(number INTEGER PRIMARY KEY, day TEXT NOT NULL, money REAL NOT NULL, tokens INTEGER NOT NULL)"
            )
            self._db.execute("CREATE INDEX IF NOT EXISTS spending_by_day ON spending (day)")

    @contextlib.contextmanager
    def _border(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise WriteError(f"cannot use the record of spending {self._path}: {error}") from error

    def close(self) -> None:
        with self._lock:
            self._db.close()

    def reserve(self, money: float, tokens: int, before: tuple[float, int] = (0.0, 0)) -> Reservation | str:
        """Set aside what a request may cost at most, or say which limit stands against it.

        Args:
            before: money and tokens that the same request has cost, or has set aside, already.
        """
        most, count = self._settings.request_money, self._settings.request_tokens
        limit = _over("request", before[0] + money, before[1] + tokens, most, count)
        if limit:
            return limit
        with self._lock, self._border():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                limit = self._limit(money, tokens)
                if not limit:
                    number = self._insert(money, tokens)
            finally:
                self._db.execute("COMMIT")
        return limit or Reservation(number, money, tokens)

    def _limit(self, money: float, tokens: int) -> str:
        day = self._day()
        for name, since, most, count in (
            ("day", day, self._settings.day_money, self._settings.day_tokens),
            ("month", day[:7], self._settings.month_money, self._settings.month_tokens),
        ):
            if most or count:
                spent, used = self._since(since)
                if limit := _over(name, spent + money, used + tokens, most, count):
                    return limit
        return ""

    def _insert(self, money: float, tokens: int) -> int:
        row = self._db.execute(
            "INSERT INTO spending (day, money, tokens) VALUES (?, ?, ?)", (self._day(), money, tokens)
        )
        return int(row.lastrowid or 0)

    def _since(self, day: str) -> tuple[float, int]:
        row = self._db.execute("SELECT total(money), total(tokens) FROM spending WHERE day >= ?", (day,)).fetchone()
        return float(row[0]), int(row[1])

    def settle(self, reservation: Reservation, money: float, tokens: int) -> None:
        """Replace what was set aside by what it was."""
        with self._lock, self._border():
            self._db.execute(
                "UPDATE spending SET money = ?, tokens = ? WHERE number = ?", (money, tokens, reservation.number)
            )

    def spent(self) -> dict[str, tuple[float, int]]:
        """Money and tokens of this day and this month."""
        with self._lock, self._border():
            return {"day": self._since(self._day()), "month": self._since(self._day()[:7])}

    def _day(self) -> str:
        return time.strftime("%Y-%m-%d", time.gmtime(self._clock()))


def _over(name: str, money: float, tokens: int, most: float, count: int) -> str:
    if most and money > most + 1e-12:
        return f"the {name}'s budget of money"
    return f"the {name}'s budget of tokens" if count and tokens > count else ""
