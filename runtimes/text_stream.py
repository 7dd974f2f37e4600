"""Turning a stream of token bytes into text: whole characters only, and stop strings that are never shown."""

from __future__ import annotations

import codecs
from collections.abc import Sequence


class TextStream:
    """Holds back bytes of an unfinished character and text that may be the beginning of a stop string."""

    def __init__(self, stop: Sequence[str] = ()) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._stop = [text for text in stop if text]
        self._held = ""
        self.stopped = False
        """A stop string was completed; what came before it has been given out, it and the rest never will be."""

    def push(self, piece: bytes) -> str:
        """Text that is certain after one more token."""
        return self._release(self._decoder.decode(piece))

    def flush(self) -> str:
        """What is still held when the model has finished."""
        if self.stopped:
            return ""
        rest = self._release(self._decoder.decode(b"", final=True)) + self._held
        self._held = ""
        return rest

    def _release(self, text: str) -> str:
        if self.stopped:
            return ""
        self._held += text
        # The one that is complete first, so that it does not matter how the text was cut into tokens.
        ends = [(at + len(stop), at) for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if ends:
            self.stopped = True
            ready, self._held = self._held[: min(ends)[1]], ""
            return ready
        keep = max((_overlap(self._held, stop) for stop in self._stop), default=0)
        ready, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return ready


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
