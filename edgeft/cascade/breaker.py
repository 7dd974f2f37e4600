"""Whether an endpoint is worth a request now: what failed lately is left alone for a while."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from edgeft.cascade.settings import ResilienceSettings


class Breaker:
    """Closed, open, or half-open with one request that tries. Any thread; times by a monotonic clock (seconds)."""

    def __init__(self, settings: ResilienceSettings, clock: Callable[[], float] = time.monotonic) -> None:
        self._settings, self._clock = settings, clock
        self._lock = threading.Lock()
        self._failures = 0
        self._until = 0.0
        self._why = ""
        self._probing = False

    def admit(self) -> str:
        """Why no request may be made now; "" when one may, which must end in a call of one of the others."""
        with self._lock:
            if not self._why:
                return ""
            if self._clock() < self._until or self._probing:
                return self._why
            self._probing = True
            return ""

    def succeeded(self) -> None:
        with self._lock:
            self._failures, self._why, self._probing = 0, "", False

    def let_go(self) -> None:
        """The request ended without a verdict on the endpoint, such as when the reader left."""
        with self._lock:
            self._probing = False

    def failed(self) -> None:
        with self._lock:
            self._failures += 1
            if self._probing or self._failures >= self._settings.failures:
                self._open(self._settings.open_s, "open circuit")
            self._probing = False

    def offline(self) -> None:
        with self._lock:
            self._open(self._settings.offline_s, "offline")
            self._probing = False

    def hold(self, seconds: float, why: str) -> None:
        """Leave it alone for so long."""
        with self._lock:
            self._open(seconds, why)
            self._probing = False

    def _open(self, seconds: float, why: str) -> None:
        self._until, self._why = self._clock() + seconds, why
