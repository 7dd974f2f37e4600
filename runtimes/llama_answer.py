"""One answer of llama.cpp's as it grows: its text, when and why it ends, and what it took."""

from __future__ import annotations

import time

from edgeft.chat import Delta, FinishReason, Sampling, Usage

from .text_stream import TextStream

Logprobs = tuple[float | None, tuple[tuple[int, float], ...]]
"""Of the token, and of the most probable ones; natural log."""


class Answer:
    """Begins when it is made; `reason` is set once no more tokens are wanted."""

    def __init__(self, prompt_tokens: int, sampling: Sampling) -> None:
        self._prompt_tokens, self._most = prompt_tokens, sampling.max_tokens
        self._text = TextStream(sampling.stop)
        self._started = self._first = self._last = time.perf_counter()
        self._produced = 0
        self.reused = 0
        """Prompt tokens that were in the cache."""
        self.reason: FinishReason | None = None

    @property
    def room(self) -> int:
        """Tokens that it may still get."""
        return self._most - self._produced

    def sampled(self, end: bool) -> bool:
        """There is a token; whether it is one of the answer, and not the model's own end."""
        self._last = time.perf_counter()
        if end:
            self.reason = "stop"
            return False
        self._first = self._last if self._produced == 0 else self._first
        self._produced += 1
        return True

    def add(self, token: int, piece: bytes, logprobs: Logprobs, full: bool) -> Delta:
        """What the reader gets for the token; `full`: the context has no room for another."""
        text = self._text.push(piece)
        if self._text.stopped:
            self.reason = "stop"
        elif self._produced >= self._most or full:
            self.reason = "length"
        return Delta(text, token, *logprobs)

    def last(self) -> Delta:
        """The end of the text, and the usage."""
        first = self._first if self._produced else self._last
        usage = Usage(
            self._prompt_tokens,
            self.reused,
            self._produced,
            first - self._started,
            max(self._last - first, 0.0),
            self.reason or "cancel",
        )
        return Delta(self._text.flush(), usage=usage)
