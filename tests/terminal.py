"""A program in a pseudo-terminal of its own: a session leader, which loses its terminal as by a cut connection."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

_ESCAPES = re.compile(rb"\x1b(\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(\x07|\x1b\\)|[PX^_].*?\x1b\\|[()].|.)", re.DOTALL)


class Terminal:
    """Text that the program draws is in `drawn`, without control sequences."""

    def __init__(
        self,
        command: Sequence[str],
        folder: Path,
        environment: Mapping[str, str] | None = None,
        size: tuple[int, int] = (80, 24),
    ) -> None:
        """
        Args:
            size: columns and rows.
        """
        self._master, slave = pty.openpty()
        self.resize(*size)

        def attach() -> None:
            os.setsid()
            fcntl.ioctl(slave, termios.TIOCSCTTY, 0)

        variables = {**os.environ, "TERM": "xterm-256color", "COLORTERM": "truecolor", **(environment or {})}
        self.process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, cwd=folder, env=variables, preexec_fn=attach
        )
        os.close(slave)
        self.raw = b""

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self.hang_up()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()

    def resize(self, columns: int, rows: int) -> None:
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def window_changed(self, columns: int, rows: int) -> None:
        self.resize(columns, rows)
        self.process.send_signal(signal.SIGWINCH)

    def send(self, keys: str) -> None:
        os.write(self._master, keys.encode())

    def read(self, seconds: float) -> bytes:
        """What comes within so long; empty when nothing does."""
        ready, _, _ = select.select([self._master], [], [], seconds)
        if not ready:
            return b""
        try:
            new = os.read(self._master, 1 << 16)
        except OSError:  # the program is gone
            return b""
        self.raw += new
        return new

    @property
    def drawn(self) -> str:
        return _ESCAPES.sub(b"", self.raw).decode(errors="replace")

    def wait_for(self, text: str, seconds: float = 60) -> None:
        """Raises: AssertionError when it is not drawn in time."""
        self.wait_until(lambda: text in self.drawn, text, seconds)

    def wait_until(self, condition: Callable[[], bool], what: str, seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"not within {seconds} s: {what}; drawn: {self.drawn[-2000:]}"
            self.read(0.1)

    def hang_up(self) -> None:
        """The terminal goes away: its programs get SIGHUP."""
        if self._master >= 0:
            os.close(self._master)
            self._master = -1

    def ends(self, seconds: float = 30) -> int:
        """The exit code; what is drawn meanwhile is read."""
        end = time.monotonic() + seconds
        while self.process.poll() is None:
            assert time.monotonic() < end, f"still running after {seconds} s"
            if self._master >= 0:
                self.read(0.1)
            else:
                time.sleep(0.05)
        return self.process.returncode
