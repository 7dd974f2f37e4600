"""`echo`: plays back scripted answers, byte by byte. For tests, demonstrations and as an example of a runtime.

The artifact is a `*.echo.json` file; every key is optional:

    {
      "script": {"part of the prompt": "answer", "joke": ["answer", "answer when sampled with another seed"]},
      "default": "answer when nothing in the script matches; without it the prompt is echoed",
      "delay_ms": 0,           per token of the answer
      "prompt_delay_ms": 0,    per token of the prompt that is not cached
      "chat": true             false: a model without a chat template
    }

A name that is no file echoes every prompt. Tokens are bytes, and six control tokens. Every token gets the same
probability, 1/262: log-probabilities are made up, but they sum to one and agree with `score`.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from edgeft.artifact import Artifact
from edgeft.chat import Cancel, Delta, FinishReason, Message, Sampling, TokenIds, Usage
from edgeft.errors import ModelError, UsageError
from edgeft.paths import parse_json
from edgeft.plugins import AdapterScale, LoadOptions, Session, Support

from .session_base import ClosingSession, check_score
from .text_stream import TextStream

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

BOS, END = 256, 257
ROLES = {"system": 258, "user": 259, "assistant": 260, "tool": 261}
VOCABULARY = 262
DEFAULT_CONTEXT = 4096
LOGPROB = -math.log(VOCABULARY)


@dataclass(frozen=True)
class Script:
    script: Mapping[str, str | Sequence[str]] = field(default_factory=dict)
    default: str | None = None
    delay_ms: float = 0.0
    prompt_delay_ms: float = 0.0
    chat: bool = True

    def answer(self, prompt: str, choice: int) -> str:
        """The first scripted answer whose key is in the prompt; `choice` picks among several."""
        for part, answers in self.script.items():
            if part in prompt:
                return answers if isinstance(answers, str) else answers[choice % len(answers)]
        return prompt if self.default is None else self.default


def read_script(path: Path) -> Script:
    """Raises: ModelError when the file is not a script."""
    if not path.is_file():
        return Script()
    try:
        return Script(**parse_json(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"{path} is not a script for the echo runtime: {error}") from error


@dataclass(frozen=True)
class EchoRuntime:
    name: str = "echo"
    lacks: Mapping[str, str] = field(
        default_factory=lambda: {"json": "a script says what it says", "adapters": "a script has no weights"}
    )

    def supports(self, artifact: Artifact) -> Support:
        # Never a real model: with no llama.cpp installed, "auto" would otherwise answer with an echo.
        if artifact.address or (artifact.path.exists() and not artifact.path.name.endswith(".echo.json")):
            return Support(False, f"{artifact.path.name} is not an .echo.json script")
        return Support(True)

    def load(self, artifact: Artifact, options: LoadOptions) -> Session:
        script, context = read_script(artifact.path), options.context or DEFAULT_CONTEXT
        return EchoSession(script, context) if options.parallel == 1 else EchoSlots(script, context, options.parallel)


class EchoSession(ClosingSession):
    """A session without a model."""

    vocabulary = VOCABULARY

    def __init__(self, script: Script, context: int) -> None:
        self.context = context
        self._script = script
        self._cached: TokenIds = []
        self._closed = False
        self._turn = 0

    def close(self) -> None:
        self._closed = True

    def _alive(self) -> None:
        if self._closed:
            raise ModelError("the echo session is closed")

    # --- Text ---------------------------------------------------------------

    def render(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None) -> TokenIds:
        """One control token per role, the content's bytes, an end token; the assistant's token invites the answer."""
        self._alive()
        if not self._script.chat:
            raise ModelError("this script has no chat template", "Use a plain-text prompt.")
        tokens = [BOS]
        for message in messages:
            if message["role"] not in ROLES:
                raise ModelError(f"the echo runtime knows no role {message['role']!r}")
            tokens += [ROLES[message["role"]], *str(message["content"]).encode(), END]
        return [*tokens, ROLES["assistant"]]

    def tokenize(self, text: str, *, special: bool = False, bos: bool = False) -> TokenIds:
        self._alive()
        return [*([BOS] if bos else []), *text.encode()]

    def detokenize(self, tokens: Sequence[int]) -> str:
        self._alive()
        return bytes(token for token in tokens if token < BOS).decode("utf-8", "replace")

    # --- Generation ---------------------------------------------------------

    def generate(self, prompt: TokenIds, sampling: Sampling, cancel: Cancel | None = None) -> Iterator[Delta]:
        self._alive()
        if not prompt:
            raise UsageError("the prompt is empty")
        if sampling.json_schema is not None:
            raise UsageError("the echo runtime cannot follow a JSON schema", "Script the JSON you want as an answer.")
        if len(prompt) >= self.context:
            raise ModelError(
                f"the prompt has {len(prompt)} tokens; the context holds {self.context}",
                "Shorten the conversation, or load the model with a longer --context.",
            )
        stopped = threading.Event()
        cancel = Cancel() if cancel is None else cancel  # an unthrown switch is false
        with cancel.calls(stopped.set):
            if cancel:
                stopped.set()
            yield from self._stream(prompt, sampling, stopped)

    def _stream(self, prompt: TokenIds, sampling: Sampling, stopped: threading.Event) -> Iterator[Delta]:
        started = first = last = time.perf_counter()
        stream = TextStream(sampling.stop)
        reused, turn = self._reuse(prompt, len(prompt) - 1), self._turn
        produced = 0
        reason: FinishReason = "cancel"
        if not _wait(stopped, self._script.prompt_delay_ms * (len(prompt) - reused)):
            self._cached = list(prompt)
            reason = "stop"
            for token in self._answer(prompt, sampling):
                if _wait(stopped, self._script.delay_ms if produced else 0):
                    reason = "cancel"
                    break
                last = time.perf_counter()
                first = last if produced == 0 else first
                produced += 1
                yield Delta(stream.push(bytes([token])), token, *_logprobs(token, sampling.top_logprobs))
                self._check_turn(turn)
                if stream.stopped:
                    break
                if produced >= sampling.max_tokens or len(self._cached) >= self.context:
                    reason = "length"
                    break
                self._cached.append(token)
        yield Delta(stream.flush(), usage=_usage(prompt, reused, produced, (started, first, last), reason))

    def _check_turn(self, turn: int) -> None:
        """A stream may be read on only while nothing else has used the session."""
        self._alive()
        if turn != self._turn:
            raise UsageError("this answer ended when the session was used for something else")

    def _answer(self, prompt: TokenIds, sampling: Sampling) -> bytes:
        return self._script.answer(_last_user_text(prompt), sampling.seed if sampling.temperature > 0 else 0).encode()

    def _reuse(self, tokens: TokenIds, most: int) -> int:
        """Length of the cached prefix of `tokens`, at most `most`; the rest of the cache is forgotten."""
        self._turn += 1
        shared = 0
        while shared < min(len(self._cached), most) and self._cached[shared] == tokens[shared]:
            shared += 1
        self._cached = self._cached[:shared]
        return shared

    # --- Scoring ------------------------------------------------------------

    def score(self, tokens: TokenIds, start: int = 0) -> NDArray[np.float32]:
        import numpy as np

        self._alive()
        check_score(len(tokens), start, self.context)
        self._reuse(tokens, start)
        return np.full((len(tokens) - start, VOCABULARY), LOGPROB, np.float32)

    # --- Adapters -----------------------------------------------------------

    def set_adapters(self, adapters: Sequence[AdapterScale]) -> None:
        self._alive()
        if adapters:
            raise ModelError(f"{adapters[0].path} is not an adapter for a script: the echo runtime takes none")
        self._reuse([], 0)


class EchoSlots(EchoSession):
    """Several answers at a time, each with a cache of its own."""

    def __init__(self, script: Script, context: int, parallel: int) -> None:
        super().__init__(script, context)
        self.parallel = parallel
        self._slots: SimpleQueue[EchoSession] = SimpleQueue()
        for _ in range(parallel):
            self._slots.put(EchoSession(script, context))

    def generate(self, prompt: TokenIds, sampling: Sampling, cancel: Cancel | None = None) -> Iterator[Delta]:
        self._alive()
        slot = self._slots.get()
        try:
            yield from slot.generate(prompt, sampling, cancel)
        finally:
            self._slots.put(slot)


def _last_user_text(prompt: TokenIds) -> str:
    """The last user message of a rendered conversation; all of a plain prompt."""
    if ROLES["user"] in prompt:
        begin = len(prompt) - prompt[::-1].index(ROLES["user"])
        prompt = prompt[begin : prompt.index(END, begin) if END in prompt[begin:] else None]
    return bytes(token for token in prompt if token < BOS).decode("utf-8", "replace")


def _wait(stopped: threading.Event, milliseconds: float) -> bool:
    """Sleep, unless and until the answer is stopped; whether it was."""
    return stopped.wait(milliseconds / 1000) if milliseconds else stopped.is_set()


def _logprobs(token: int, top: int) -> tuple[float | None, tuple[tuple[int, float], ...]]:
    if not top:
        return None, ()
    others = [other for other in range(min(top, VOCABULARY)) if other != token]
    return LOGPROB, tuple((one, LOGPROB) for one in [token, *others][:top])


def _usage(
    prompt: TokenIds, reused: int, produced: int, times: tuple[float, float, float], reason: FinishReason
) -> Usage:
    started, first, last = times
    return Usage(len(prompt), reused, produced, first - started, last - first, reason)


runtime = EchoRuntime()
