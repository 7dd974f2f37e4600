"""Hedged requests: a second endpoint is asked when the first takes unusually long to begin (Dean and Barroso 2013,
"The Tail at Scale", Communications of the ACM 56(2)). Who begins first answers; the other is told to stop."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from queue import Empty, SimpleQueue

from edgeft.cascade.features import quantile
from edgeft.chat import Cancel

_FEWEST = 20
"""Answers from which on an endpoint's own times say what is unusual."""

Piece = tuple[str, str]
"""Endpoint and text."""


class Pace:
    """How long an endpoint took to begin, lately. Any thread; seconds."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seconds: deque[float] = deque(maxlen=200)

    def began(self, seconds: float) -> None:
        """It began after so long; or had not yet, when another was faster: left out, the slow would look fast."""
        with self._lock:
            self._seconds.append(seconds)

    def unusual(self, percentile: float, otherwise: float) -> float:
        """What it begins within in so many of a hundred cases; `otherwise` while too few are known."""
        with self._lock:
            known = list(self._seconds)
        return quantile(known, percentile / 100) if len(known) >= _FEWEST else otherwise


class Runner:
    """One endpoint in the race, in a thread of its own."""

    def __init__(self, pieces: Callable[[Cancel], Iterator[Piece]], heard: SimpleQueue[tuple[Runner, object]]) -> None:
        self.cancel = Cancel()
        self._pieces, self._heard = pieces, heard
        self._thread = threading.Thread(target=self._run, name="edgeft-hedge", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        end: object = None
        try:
            for piece in self._pieces(self.cancel):
                self._heard.put((self, piece))
        except Exception as error:  # the border of a thread: whatever it is belongs to the one that asked
            end = error
        self._heard.put((self, end))

    def join(self) -> None:
        """Wait until it has ended, and it is known what it cost."""
        self._thread.join()


class Race:
    """Who begins first answers. The next one starts when the one before has failed; and one does, once, when the first
    has not begun after a delay."""

    def __init__(self, starts: Sequence[Callable[[Cancel], Iterator[Piece]]], delay_s: float, cancel: Cancel) -> None:
        self._ahead, self._cancel = list(starts), cancel
        self._heard: SimpleQueue[tuple[Runner, object]] = SimpleQueue()
        self._runners: list[Runner] = []
        self._running = 0
        self._winner: Runner | None = None
        self._hedge_at: float | None = time.monotonic() + delay_s

    def pieces(self) -> Iterator[Piece]:
        """Of the winner. Raises: what the winner raised, or the last one when nobody began."""
        try:
            with self._cancel.calls(self._stop_all):
                self._start()
                while (said := self._next()) is not None:
                    yield said
        finally:
            self._stop_all()
            for runner in self._runners:
                runner.join()

    def _start(self) -> None:
        runner = Runner(self._ahead.pop(0), self._heard)
        self._runners.append(runner)
        self._running += 1
        if self._cancel:  # thrown before it was in the list
            runner.cancel.set()

    def _stop_all(self, but: Runner | None = None) -> None:
        for runner in list(self._runners):
            if runner is not but:
                runner.cancel.set()

    def _next(self) -> Piece | None:
        while True:
            try:
                runner, said = self._heard.get(timeout=self._patience())
            except Empty:
                self._hedge_at = None
                self._start()
                continue
            if isinstance(said, tuple):
                if self._winner is None:
                    self._winner = runner
                    self._stop_all(but=runner)
                if runner is self._winner:
                    return said
                continue
            self._running -= 1
            if runner is self._winner or (self._winner is None and not self._running):
                if said is not None and (runner is self._winner or not self._ahead or self._cancel):
                    raise said  # type: ignore[misc]
                if said is None:
                    return None
                self._start()

    def _patience(self) -> float | None:
        """Seconds until the next one starts beside the first; None when none does."""
        if self._winner or self._hedge_at is None or not self._ahead or self._cancel:
            return None
        return max(self._hedge_at - time.monotonic(), 0.0)
