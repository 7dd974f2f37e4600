"""An engine in a process of its own: for libraries that live in a toolchain, or that talk without being asked."""

from __future__ import annotations

import contextlib
import json
import subprocess
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from edgeft.chat import TokenIds
from edgeft.errors import ModelError, UsageError
from edgeft.paths import parse_json
from edgeft.plugins import AdapterScale, LoadOptions

from .hf_text import HfText
from .onnx_session import OnnxSession, Shape

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_END_S = 5.0
"""Seconds a process has to end when it is told to."""


class ChildEngine:
    """The worker's side is `edgeft/toolchain/workers/engine_loop.py`."""

    def __init__(self, command: Sequence[str], request: Mapping[str, Any], shown: Path) -> None:
        """
        Args:
            shown: the file that errors name.

        Raises: ModelError when the process cannot load the model.
        """
        self._shown, self._length = shown, 0
        self._said: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said)
        try:
            about, _ = self._ask({"open": dict(request)}, "load")
            self.context, self.vocabulary = int(about["context"]), int(about["vocabulary"])
            self._batch = int(about["batch"])
        except BaseException:
            self.close()
            raise

    def _ask(self, request: Mapping[str, Any], doing: str) -> tuple[Mapping[str, Any], bytes]:
        """Raises: ModelError."""
        assert self._process.stdin and self._process.stdout
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
            answer = parse_json(line) if line.strip() else {"error": self._last_words()}
            data = self._process.stdout.read(int(answer.get("bytes", 0)))
        except (OSError, ValueError) as error:
            raise ModelError(f"cannot {doing} {self._shown}: {self._last_words()}") from error
        except BaseException:
            self.close()  # half an answer would be taken for the next one
            raise
        if "error" in answer:
            raise ModelError(f"cannot {doing} {self._shown}: {answer['error']}", "Copy or export the model again.")
        return answer, data

    def _last_words(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(1)
        self._said.seek(0)
        lines = self._said.read()[-4000:].decode("utf-8", "replace").strip().splitlines()
        return f"its process ended (exit code {self._process.returncode}): {lines[-1] if lines else 'no reason given'}"

    def evaluate(self, tokens: TokenIds, stopped: threading.Event) -> NDArray[np.float32] | None:
        """Logits of the last token: (1, vocabulary)."""
        import numpy as np

        if stopped.is_set():
            return None
        _, data = self._ask({"evaluate": tokens, "at": self._length}, "run")
        self._length += len(tokens)
        logits: NDArray[np.float32] = np.frombuffer(data, "<f4").reshape(1, -1)
        return logits

    def fill(self, tokens: TokenIds, stopped: threading.Event) -> bool:
        """Add tokens to the cache without their logits; False and nothing added when it was stopped."""
        before = self._length
        for at in range(0, len(tokens), self._batch):
            if stopped.is_set():
                self._length = before
                return False
            part = tokens[at : at + self._batch]
            self._ask({"fill": part, "at": self._length}, "run")
            self._length += len(part)
        return True

    def rewind(self, length: int) -> None:
        self._length = length

    def interrupt(self) -> None:
        """Only between calls."""

    def close(self) -> None:
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._said.close()


class ChildSession(OnnxSession):
    """The prompt but for its last token goes in without logits; what is scored goes in token by token."""

    def __init__(self, engine: ChildEngine, text: HfText, context: int, path: Path, options: LoadOptions) -> None:
        super().__init__(engine, text, Shape("", 0, 0, 0, engine.vocabulary, context), path, options)
        self._batch = 1

    def _prefill(self, tokens: TokenIds, start: int, stopped: threading.Event) -> NDArray[np.float32] | None:
        engine = self._alive()
        assert isinstance(engine, ChildEngine)
        part = tokens[start:-1]
        if part:
            if stopped.is_set() or not engine.fill(part, stopped):
                return None
            self._cached += part
        return self._evaluate(tokens[-1:], stopped) if tokens[start:] else None

    def set_adapters(self, adapters: Sequence[AdapterScale]) -> None:
        self._alive()
        if adapters:
            raise ModelError(
                f"{adapters[0].path} cannot be loaded: {self.engine_name} takes no adapters at run time",
                "Export base and adapter together.",
            )
        self._reuse([], 0)


def check_context(options: LoadOptions, longest: int) -> int:
    """Tokens of context: as asked for, at most what the file was made for. Raises: UsageError."""
    if options.context is not None and options.context < 1:
        raise UsageError("a context has at least one token")
    return min(options.context or longest, longest)
