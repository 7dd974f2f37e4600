"""Which adapter a model wears, when several answers share its weights."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator

from edgeft.chat import Cancel


class Wardrobe:
    """Answers under one adapter are made together; those that want another wait until they have ended.

    First come, first served: once somebody waits for another adapter, nobody overtakes, so that all have their turn.
    """

    def __init__(self, change: Callable[[str | None], None]) -> None:
        """
        Args:
            change: puts an adapter on; None is the model as it is. Called while no answer is made.
        """
        self._change = change
        self._worn: str | None = None
        self._wearing = 0
        self._line: deque[object] = deque()
        self._moved = threading.Condition()

    @contextlib.contextmanager
    def wearing(self, name: str | None, cancel: Cancel) -> Iterator[None]:
        """Hold the model under an adapter; at once, and under any, when the answer was cancelled while it waited.

        Raises: what `change` raises.
        """
        place = object()
        with self._moved, cancel.calls(self._look_again):
            self._line.append(place)
            try:
                self._moved.wait_for(lambda: cancel or (self._line[0] is place and self._may(name)))
                if not cancel and name != self._worn:
                    self._change(name)
                    self._worn = name
            finally:
                self._line.remove(place)
                self._moved.notify_all()
            self._wearing += 1
        try:
            yield
        finally:
            with self._moved:
                self._wearing -= 1
                self._moved.notify_all()

    def _may(self, name: str | None) -> bool:
        return name == self._worn or not self._wearing

    def _look_again(self) -> None:
        with self._moved:
            self._moved.notify_all()
