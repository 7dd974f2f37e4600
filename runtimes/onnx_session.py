"""A session on an ONNX directory; what `onnxruntime-genai` and `onnxruntime` share."""

from __future__ import annotations

import importlib.util
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

from edgeft.artifact import Artifact
from edgeft.chat import Cancel, ChatTemplate, Delta, FinishReason, Message, Sampling, TokenIds, Usage
from edgeft.errors import ModelError, UsageError, require
from edgeft.paths import parse_json
from edgeft.plugins import AdapterScale, LoadOptions, Session, Support

from .hf_text import HfText
from .memory import available_bytes
from .sampler import Sampler, log_softmax, token_logprobs
from .session_base import ClosingSession, check_score
from .text_stream import TextStream

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

CONFIG = "genai_config.json"
GROWING = "growing-cache"
"""`model.type` of graphs that take keys and values and return them, longer, as new tensors: Optimum's."""
DEFAULT_CONTEXT = 4096
_LOGITS_BYTES = 32 << 20
"""The graphs compute logits of every token given; this bounds how many are given at once."""


@dataclass(frozen=True)
class Shape:
    """What a graph is, from genai_config.json."""

    file: str
    layers: int
    heads: int
    """Of keys and values."""
    head: int
    """Width of one."""
    vocabulary: int
    context: int
    """Tokens that will be held, at most as many as the model was trained for."""
    kind: str = ""
    """The graph's `model.type`."""

    @property
    def cache_bytes(self) -> int:
        """Keys and values of every layer, float32."""
        return 2 * 4 * self.layers * self.heads * self.head * self.context


class Engine(Protocol):
    """A graph with a cache of keys and values."""

    def evaluate(self, tokens: TokenIds, stopped: threading.Event) -> NDArray[np.float32] | None:
        """Add tokens to the cache; logits (tokens, vocabulary), or None and nothing added when it was stopped."""

    def rewind(self, length: int) -> None:
        """Forget all but the first `length` tokens."""

    def interrupt(self) -> None:
        """End a running `evaluate`, from another thread. May do nothing."""

    def close(self) -> None: ...


@dataclass(frozen=True)
class OnnxRuntime:
    name: str
    module: str
    engine: Callable[[Path, Shape, LoadOptions], Engine]
    growing: bool = False
    """Whether it also runs graphs that return their keys and values anew from every call."""
    lacks: Mapping[str, str] = field(
        default_factory=lambda: {
            "json": "onnxruntime has no grammars",
            "adapters": "an ONNX graph takes no adapters at run time",
        }
    )

    def supports(self, artifact: Artifact) -> Support:
        if not (artifact.path / CONFIG).is_file():
            return Support(False, f"{artifact.path.name} is not an ONNX folder with a {CONFIG}")
        if not self.growing and _kind(artifact.path) == GROWING:
            return Support(False, f"{artifact.path.name} is Optimum's kind of graph, which onnxruntime runs")
        return self.ready()

    def ready(self) -> Support:
        for module in (self.module, "tokenizers", "numpy"):
            if importlib.util.find_spec(module) is None:
                return Support(False, f"{module} is not installed", "pip install 'edgeft[onnx]'")
        return Support(True)

    def load(self, artifact: Artifact, options: LoadOptions) -> Session:
        shape = read_shape(artifact.path, options)
        text = HfText(artifact.path)
        _check_memory(shape, artifact.path, options)
        return OnnxSession(self.engine(artifact.path, shape, options), text, shape, artifact.path, options)


def _kind(folder: Path) -> str:
    try:
        return str(parse_json((folder / CONFIG).read_bytes())["model"]["type"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""  # loading will say what is wrong


def read_shape(folder: Path, options: LoadOptions) -> Shape:
    """Raises: ModelError when genai_config.json or the graph is missing or damaged."""
    file = folder / CONFIG
    try:
        model = parse_json(file.read_text(encoding="utf-8"))["model"]
        decoder = model["decoder"]
        longest = int(model["context_length"])
        shape = Shape(
            str(decoder["filename"]),
            int(decoder["num_hidden_layers"]),
            int(decoder["num_key_value_heads"]),
            int(decoder["head_size"]),
            int(model["vocab_size"]),
            min(options.context or DEFAULT_CONTEXT, longest),
            str(model.get("type", "")),
        )
    except FileNotFoundError:
        raise ModelError(f"{folder} has no {CONFIG}", "Export the model again.") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{file} cannot be read: {error}", "Export the model again.") from error
    if not (folder / shape.file).is_file():
        raise ModelError(f"{folder} has no {shape.file}", "Export the model again.")
    return shape


def _check_memory(shape: Shape, path: Path, options: LoadOptions) -> None:
    needed, available = shape.cache_bytes, available_bytes()
    if available is not None and needed > available:
        raise ModelError(
            f"a context of {options.context or shape.context} tokens for {path} takes {needed / 1e9:.1f} GB; "
            f"{available / 1e9:.1f} GB are free",
            "Try a shorter --context.",
        )


def without_telemetry(module: str) -> ModuleType:
    """Import one of onnxruntime's packages with its telemetry off before it can send anything."""
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    loaded = require(module, "onnx")
    disable: Any = getattr(loaded, "disable_telemetry_events", None)
    if disable is not None:
        disable()
    return loaded


def first_line(error: Exception) -> str:
    """onnxruntime's messages carry a stack trace behind the first line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class OnnxSession(ClosingSession):
    """One graph and one sequence whose keys and values are kept between calls."""

    engine_name = "onnxruntime"

    def __init__(self, engine: Engine, text: HfText, shape: Shape, path: Path, options: LoadOptions) -> None:
        self._engine: Engine | None = engine
        self._text, self._path = text, path
        self._cached: TokenIds = []
        self._turn = 0
        self.context, self.vocabulary = shape.context, shape.vocabulary
        self._batch = max(1, min(options.batch, _LOGITS_BYTES // (4 * shape.vocabulary)))

    def close(self) -> None:
        """Free the model. Calling it again does nothing."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None

    def _alive(self) -> Engine:
        if self._engine is None:
            raise ModelError(f"the session on {self._path} is closed")
        return self._engine

    # --- Text ---------------------------------------------------------------

    def render(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None) -> TokenIds:
        self._alive()
        # Training adds nothing to what the template writes.
        return self._text.tokenize(self._template().render(messages, tools=tools), special=True)

    def _template(self) -> ChatTemplate:
        return self._text.template()

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
        if sampling.json_schema is not None:
            raise UsageError(
                f"{self.engine_name} cannot follow a JSON schema",
                "Export to GGUF for that: edgeft export … --to gguf-q4.",
            )
        if len(prompt) >= self.context:
            raise ModelError(
                f"the prompt has {len(prompt)} tokens; the context holds {self.context}",
                "Shorten the conversation, or load the model with a longer --context.",
            )
        stopped = threading.Event()
        cancel = Cancel() if cancel is None else cancel  # an unthrown switch is false

        def stop() -> None:
            stopped.set()
            engine.interrupt()

        with cancel.calls(stop):
            if cancel:
                stopped.set()
            yield from self._stream(prompt, sampling, stopped)

    def _stream(self, prompt: TokenIds, sampling: Sampling, stopped: threading.Event) -> Iterator[Delta]:
        started = first = last = time.perf_counter()
        stream, sampler = TextStream(sampling.stop), Sampler(sampling, prompt)
        reused, turn = self._reuse(prompt, len(prompt) - 1), self._turn
        produced = 0
        reason: FinishReason = "cancel"
        logits = self._prefill(prompt, reused, stopped)
        while logits is not None and not stopped.is_set():
            token = sampler.choose(logits[-1])
            last = time.perf_counter()
            if token in self._text.ends:
                reason = "stop"
                break
            first = last if produced == 0 else first
            produced += 1
            text = stream.push(self._text.piece(token))
            yield Delta(text, token, *token_logprobs(logits[-1:], token, sampling.top_logprobs))
            self._check_turn(turn)
            if stream.stopped:
                reason = "stop"
                break
            if produced >= sampling.max_tokens or len(self._cached) >= self.context:
                reason = "length"
                break
            logits = self._evaluate([token], stopped)
        to_first = (first if produced else last) - started
        usage = Usage(len(prompt), reused, produced, to_first, max(last - first, 0.0), reason)
        yield Delta(stream.flush(), usage=usage)

    def _check_turn(self, turn: int) -> None:
        """A stream may be read on only while nothing else has used the session: they share one cache."""
        self._alive()
        if turn != self._turn:
            raise UsageError("this answer ended when the session was used for something else")

    def _reuse(self, tokens: TokenIds, most: int) -> int:
        """Keep the keys and values of the longest common prefix, at most `most` tokens; drop the rest."""
        self._turn += 1
        pairs = zip(self._cached, tokens[:most], strict=False)
        shared = next((at for at, (mine, theirs) in enumerate(pairs) if mine != theirs), min(len(self._cached), most))
        self._cached = self._cached[:shared]
        self._alive().rewind(shared)
        return shared

    def _prefill(self, tokens: TokenIds, start: int, stopped: threading.Event) -> NDArray[np.float32] | None:
        """Evaluate `tokens[start:]`; the last batch's logits, None when stopped."""
        logits = None
        for at in range(start, len(tokens), self._batch):
            logits = self._evaluate(tokens[at : at + self._batch], stopped)
            if logits is None:
                return None
        return logits

    def _evaluate(self, tokens: TokenIds, stopped: threading.Event) -> NDArray[np.float32] | None:
        if stopped.is_set():
            return None
        logits = self._alive().evaluate(tokens, stopped)
        if logits is not None:
            self._cached += tokens
        return logits

    # --- Scoring ------------------------------------------------------------

    def score(self, tokens: TokenIds, start: int = 0) -> NDArray[np.float32]:
        import numpy as np

        self._alive()
        check_score(len(tokens), start, self.context)
        never = threading.Event()
        result = np.empty((len(tokens) - start, self.vocabulary), np.float32)
        reused = self._reuse(tokens, start)
        self._prefill(tokens[:start], reused, never)
        for at in range(start, len(tokens), self._batch):
            part = tokens[at : at + self._batch]
            logits = self._evaluate(part, never)
            assert logits is not None
            result[at - start : at - start + len(part)] = log_softmax(logits)
        return result

    # --- Adapters -----------------------------------------------------------

    def set_adapters(self, adapters: Sequence[AdapterScale]) -> None:
        self._alive()
        if adapters:
            raise ModelError(
                f"{adapters[0].path} cannot be loaded: an ONNX model takes no adapters at run time",
                "Export base and adapter together: edgeft export RUN --to onnx-q4.",
            )
        self._reuse([], 0)
