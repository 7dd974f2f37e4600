"""What a model's process says, straight from the pipe to who listens.

A callback of the event loop and not a stream reader with a task: a token then costs one turn of the loop less, which
counts when it is made in a few milliseconds and the caches hold weights and not the server.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable
from typing import Any

_CHUNK = 1 << 16

Said = Callable[[dict[str, Any]], None]


class Lines:
    """JSON objects, one a line, from a file descriptor that is closed at its end."""

    def __init__(self, descriptor: int, said: Said) -> None:
        self.said = said
        self.ended = asyncio.Event()
        self._descriptor, self._held = descriptor, b""
        os.set_blocking(descriptor, False)
        asyncio.get_running_loop().add_reader(descriptor, self._ready)

    def _ready(self) -> None:
        try:
            data = os.read(self._descriptor, _CHUNK)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.close()
            return
        *whole, self._held = (self._held + data).split(b"\n")
        for line in whole:
            self.said(json.loads(line))

    def close(self) -> None:
        """Stop listening. Calling it again does nothing."""
        if not self.ended.is_set():
            self.ended.set()
            asyncio.get_running_loop().remove_reader(self._descriptor)
            os.close(self._descriptor)
