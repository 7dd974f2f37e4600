"""Answers of the cloud to the very same request, in memory, for a while."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable

from edgeft.cascade.settings import CacheSettings


class AnswerCache:
    """Least recently used entries go first; times by a monotonic clock. Any thread."""

    def __init__(self, settings: CacheSettings, clock: Callable[[], float] = time.monotonic) -> None:
        self._settings, self._clock = settings, clock
        self._lock = threading.Lock()
        self._entries: OrderedDict[str, tuple[float, str, str]] = OrderedDict()

    def get(self, key: str) -> tuple[str, str] | None:
        """Author and text."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is None or entry[0] <= self._clock():
                self._entries.pop(key, None)
                return None
            self._entries.move_to_end(key)
            return entry[1], entry[2]

    def put(self, key: str, author: str, text: str) -> None:
        if self._settings.expire_s <= 0:
            return
        with self._lock:
            self._entries[key] = self._clock() + self._settings.expire_s, author, text
            while len(self._entries) > self._settings.entries:
                self._entries.popitem(last=False)
