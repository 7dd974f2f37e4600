"""Answers of the cloud to the very same request, or to one that asks nearly the same; in memory, for a while."""

from __future__ import annotations

import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgeft.cascade.settings import CacheSettings

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Vector = NDArray[np.float32]

_NUMBER = re.compile(r"\d+")


@dataclass(frozen=True)
class Asked:
    """A request as the cache knows it."""

    key: str
    """Of the whole request."""
    scope: str
    """Of all of it but its last question: system prompt, earlier turns, sampling."""
    question: str


@dataclass(frozen=True)
class Found:
    author: str
    text: str
    similarity: float
    """Cosine of the two questions; 1 for the same request."""


@dataclass(frozen=True)
class _Entry:
    until: float
    author: str
    text: str
    asked: Asked
    vector: Any
    """Of the question; None without an embedder."""


class AnswerCache:
    """Least recently used entries go first; times by a monotonic clock. Any thread."""

    def __init__(
        self,
        settings: CacheSettings,
        clock: Callable[[], float] = time.monotonic,
        embed: Callable[[str], Vector | None] | None = None,
    ) -> None:
        """
        Args:
            embed: gives a text a vector of length one; without it only the same request is the same.
        """
        self._settings, self._clock, self._embed = settings, clock, embed
        self._lock = threading.Lock()
        self._entries: OrderedDict[str, _Entry] = OrderedDict()

    def get(self, asked: Asked) -> Found | None:
        vector = self._vector(asked)
        with self._lock:
            now = self._clock()
            for key in [key for key, entry in self._entries.items() if entry.until <= now]:
                del self._entries[key]
            if asked.key in self._entries:
                entry, similarity = self._entries[asked.key], 1.0
            elif (near := self._nearest(asked, vector)) is not None:
                entry, similarity = near
            else:
                return None
            self._entries.move_to_end(entry.asked.key)
            return Found(entry.author, entry.text, similarity)

    def _nearest(self, asked: Asked, vector: Vector | None) -> tuple[_Entry, float] | None:
        """The nearest question under the same system prompt, after the same turns, with the same numbers in it.

        Vectors hardly tell "in 2019" from "in 2020", and an answer to one is none to the other.
        """
        if vector is None:
            return None
        numbers = _NUMBER.findall(asked.question)
        near = [
            (float(entry.vector @ vector), entry)
            for entry in self._entries.values()
            if entry.vector is not None
            and entry.asked.scope == asked.scope
            and _NUMBER.findall(entry.asked.question) == numbers
        ]
        similarity, entry = max(near, key=lambda pair: pair[0], default=(0.0, None))
        return (entry, similarity) if entry is not None and similarity >= self._settings.near else None

    def _vector(self, asked: Asked) -> Vector | None:
        return self._embed(asked.question) if self._embed and self._settings.near > 0 else None

    def put(self, asked: Asked, author: str, text: str, personal: bool = False) -> None:
        """
        Args:
            personal: the request had personal data in it; its answer may, too, and is given to the same request only.
        """
        if self._settings.expire_s <= 0:
            return
        vector = None if personal else self._vector(asked)
        with self._lock:
            until = self._clock() + self._settings.expire_s
            self._entries[asked.key] = _Entry(until, author, text, asked, vector)
            while len(self._entries) > self._settings.entries:
                self._entries.popitem(last=False)
