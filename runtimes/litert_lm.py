"""`litert-lm`: a .litertlm file in LiteRT-LM's engine, the one that apps on Android, iOS and desktops use."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any

from edgeft.artifact import Artifact
from edgeft.chat import Cancel, Delta, FinishReason, Message, Sampling, TokenIds, Usage
from edgeft.errors import ModelError, UsageError, require
from edgeft.models.litertlm import GRAPH, LitertFile, read_litertlm
from edgeft.plugins import AdapterScale, LoadOptions, Session, Support

from . import litert_file
from .cores import physical_cores
from .hf_text import HfText
from .text_stream import TextStream

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

DEFAULT_CONTEXT = 4096
"""Of a file that does not say what its graph was made for."""

_USUAL = Sampling()


@dataclass(frozen=True)
class LitertLmRuntime:
    name: str = "litert-lm"
    lacks: Mapping[str, str] = field(
        default_factory=lambda: {
            "tokens": "the engine takes and gives text",
            "logprobs": "the engine does not tell probabilities; litert does",
            "scores": "the engine does not tell probabilities; litert does",
            "json": "edgeft does not hand schemas to this engine",
            "adapters": "the graph takes no adapters at run time",
            "reuse": "every answer begins a session of its own",
        }
    )

    def supports(self, artifact: Artifact) -> Support:
        return litert_file.supports(artifact, ("litert_lm",))

    def ready(self) -> Support:
        return litert_file.ready(("litert_lm",))

    def load(self, artifact: Artifact, options: LoadOptions) -> Session:
        file = read_litertlm(artifact.path)
        file.section(GRAPH)
        return LitertLmSession(file, litert_file.text_of(file), options)


class LitertLmSession:
    """One engine; every answer is a session of its own in it."""

    def __init__(self, file: LitertFile, text: HfText, options: LoadOptions) -> None:
        """Raises: ModelError when the engine cannot load the file."""
        self._text, self._path, self._start = text, file.path, file.start
        self._turn = 0
        self._running: Generator[str, None, None] | None = None
        longest = file.context or DEFAULT_CONTEXT
        self.context = min(options.context or longest, longest)
        self.vocabulary = text.size
        self._lm: Any = require("litert_lm", "litert")
        self._lm.set_min_log_severity(self._lm.LogSeverity.SILENT)
        try:
            self._engine: Any = self._lm.Engine(
                str(file.path),
                backend=self._lm.Backend.CPU(thread_count=options.threads or physical_cores()),
                max_num_tokens=self.context,
                cache_dir=":nocache",
                enable_benchmark=True,
            )
        except Exception as error:  # a bare RuntimeError for whatever is wrong
            raise ModelError(
                f"LiteRT-LM cannot load {file.path}: {error}", "Copy or export the model again."
            ) from error

    def __enter__(self) -> LitertLmSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        if self._engine is not None:
            self._end_running()
            self._engine.close()
            self._engine = None

    def _alive(self) -> Any:
        if self._engine is None:
            raise ModelError(f"the session on {self._path} is closed")
        return self._engine

    # --- Text ---------------------------------------------------------------

    def render(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None) -> TokenIds:
        self._alive()
        return self._text.tokenize(self._text.template().render(messages, tools=tools), special=True)

    def tokenize(self, text: str, *, special: bool = False, bos: bool = False) -> TokenIds:
        self._alive()
        return self._text.tokenize(text, special=special, bos=bos)

    def detokenize(self, tokens: Sequence[int]) -> str:
        self._alive()
        return self._text.detokenize(tokens)

    # --- Generation ---------------------------------------------------------

    def generate(self, prompt: TokenIds, sampling: Sampling, cancel: Cancel | None = None) -> Iterator[Delta]:
        engine = self._alive()
        if not prompt:
            raise UsageError("the prompt is empty")
        if len(prompt) >= self.context:
            raise ModelError(
                f"the prompt has {len(prompt)} tokens; the context holds {self.context}",
                "Shorten the conversation, or export the model with a longer one: --set context=…",
            )
        check_sampling(sampling)
        text = self._spelled(engine, prompt)
        self._end_running()
        self._turn += 1
        cancel = Cancel() if cancel is None else cancel
        yield from self._stream(text, prompt, sampling, cancel)

    def _spelled(self, engine: Any, prompt: TokenIds) -> str:
        """The text that the engine reads as these very tokens. Raises: UsageError when there is none."""
        text = self._text.spell(prompt)
        if list(engine.tokenize(text)) != prompt:
            raise UsageError(
                "LiteRT-LM takes text, and would read this prompt as other tokens",
                "Control tokens as plain text cannot be said to it. --runtime litert takes any tokens.",
            )
        return text

    def _stream(self, text: str, prompt: TokenIds, sampling: Sampling, cancel: Cancel) -> Iterator[Delta]:
        started = first = last = time.perf_counter()
        stream, turn, produced = TextStream(sampling.stop), self._turn, 0
        said: list[str] = []
        reason: FinishReason
        limit = min(sampling.max_tokens, self.context - len(prompt))
        answer = _Answer(self._lm, self._engine, sampling, limit, self.vocabulary)
        self._running = pieces = answer.pieces(text, cancel)
        try:
            for piece in pieces:
                last = time.perf_counter()
                first = last if produced == 0 else first
                produced += 1
                said.append(piece)
                yield Delta(stream.push(piece.encode()), self._token(piece))
                self._check_turn(turn)
                if stream.stopped or cancel:
                    break
        finally:
            pieces.close()
        count, reason = produced, "stop"
        if cancel and not stream.stopped:
            reason = "cancel"
        elif not stream.stopped:
            count, reason = self._ended(answer.produced, limit, "".join(said))
        usage = Usage(len(prompt), 0, count, (first if produced else last) - started, max(last - first, 0.0), reason)
        yield Delta(stream.flush(), usage=usage)

    def _token(self, piece: str) -> int:
        """A token of the piece: the engine does not say which one it was."""
        return (self._text.tokenize(piece) or [0])[-1]

    def _ended(self, count: int, limit: int, text: str) -> tuple[int, FinishReason]:
        """Tokens of a whole answer, and why it ended; the engine counts the token that ends it, but does not say so."""
        ended = count < limit or len(self._text.tokenize(text)) == limit - 1
        return (count - 1, "stop") if ended else (count, "length")

    def _check_turn(self, turn: int) -> None:
        self._alive()
        if turn != self._turn:
            raise UsageError("this answer ended when the session was used for something else")

    def _end_running(self) -> None:
        if self._running is not None:
            with contextlib.suppress(ValueError):  # it is the one that is asking
                self._running.close()
            self._running = None

    # --- What the engine does not do ---------------------------------------------

    def score(self, tokens: TokenIds, start: int = 0) -> NDArray[np.float32]:
        self._alive()
        raise UsageError("LiteRT-LM does not tell the probabilities of a text", "Use --runtime litert.")

    def set_adapters(self, adapters: Sequence[AdapterScale]) -> None:
        self._alive()
        self._turn += 1
        if adapters:
            raise ModelError(
                f"{adapters[0].path} cannot be loaded: a .litertlm file takes no adapters at run time",
                "Export base and adapter together: edgeft export RUN --to litert.",
            )


class _Answer:
    """One session of the engine, from its prompt to its end."""

    def __init__(self, lm: Any, engine: Any, sampling: Sampling, limit: int, vocabulary: int) -> None:
        greedy = sampling.temperature <= 0
        config = lm.SamplerConfig(
            top_k=1 if greedy else min(sampling.top_k, vocabulary) or vocabulary,
            top_p=1.0 if greedy else sampling.top_p,
            temperature=max(sampling.temperature, 0.0),
            seed=sampling.seed & 0x7FFFFFFF,
        )
        self._session = engine.create_session(
            apply_prompt_template=False, sampler_config=config, max_output_tokens=limit
        )
        self.produced = 0
        """Tokens of the whole answer, known at its end."""

    def pieces(self, text: str, cancel: Cancel) -> Generator[str, None, None]:
        """Raises: ModelError when the engine fails."""
        parts: Any = iter(())
        try:
            with cancel.calls(self._session.cancel_process):
                if not cancel:
                    self._prefill(text, cancel)
                if not cancel:
                    parts = self._session.run_decode_async()
                    yield from (part.texts[0] for part in parts)
                    self.produced = int(self._session.get_benchmark_info().last_decode_token_count)
        except RuntimeError as error:
            raise ModelError(f"LiteRT-LM could not answer: {error}") from error
        finally:
            # Its thread writes into what is freed here, unless it has ended.
            self._session.cancel_process()
            with contextlib.suppress(RuntimeError):
                for _ in parts:
                    pass
            self._session.close()

    def _prefill(self, text: str, cancel: Cancel) -> None:
        try:
            self._session.run_prefill([text])
        except RuntimeError:
            if not cancel:
                raise


def check_sampling(sampling: Sampling) -> None:
    """Raises: UsageError for what the engine has no word for, where it would matter and is not the default."""
    if sampling.json_schema is not None:
        raise UsageError("LiteRT-LM is not given JSON schemas", "Export to GGUF for that: --to gguf-q4.")
    if sampling.top_logprobs:
        raise UsageError("LiteRT-LM does not tell probabilities", "Use --runtime litert.")
    for name, neutral in (("min_p", 0.0), ("repeat_penalty", 1.0)):
        value = getattr(sampling, name)
        greedy = sampling.temperature <= 0 and name == "min_p"
        if not greedy and value not in (neutral, getattr(_USUAL, name)):
            raise UsageError(f"LiteRT-LM has no {name.replace('_', '-')}", "Leave it out, or use --runtime litert.")


runtime = LitertLmRuntime()
