"""`openai`: any server that speaks OpenAI's chat completions: llama-server, Ollama, vLLM, a provider's cloud.

The model is a URL, `http://127.0.0.1:8080/v1#model`, or a file `*.endpoint.toml` (`openai_client.Endpoint`).
A server takes conversations and gives text: it shows no token ids. So a rendered prompt is the conversation itself,
its JSON as bytes behind one control token, and a token of the answer is a number for a piece of text.
"""

from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from edgeft.artifact import Artifact
from edgeft.chat import Cancel, Delta, FinishReason, Message, Sampling, TokenIds, Usage
from edgeft.errors import ModelError, UsageError
from edgeft.paths import parse_json
from edgeft.plugins import AdapterScale, LoadOptions, Session, Support

from .openai_client import SUFFIX, ChatClient, Endpoint, parse_endpoint, read_endpoint
from .session_base import ClosingSession
from .text_stream import TextStream

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

CHAT = 256
"""The control token before a conversation; 0 to 255 are bytes, what comes after are pieces of answers."""
_MOST_LOGPROBS = 20
"""What the protocol allows."""
_USUAL = Sampling()


@dataclass(frozen=True)
class OpenAiRuntime:
    name: str = "openai"
    lacks: Mapping[str, str] = field(
        default_factory=lambda: {
            "tokens": "an endpoint shows text, not token ids",
            "raw": "chat completions take conversations only",
            "scores": "an endpoint gives probabilities of its own answers only",
            "adapters": "an endpoint serves the weights it has",
            "memory": "the model is in another process",
        }
    )

    def supports(self, artifact: Artifact) -> Support:
        if not artifact.address and not artifact.path.name.endswith(SUFFIX):
            return Support(False, f"{artifact.path.name} is neither a URL nor an {SUFFIX} file")
        return self.ready()

    def ready(self) -> Support:
        if importlib.util.find_spec("httpx2") is None:
            return Support(False, "httpx2 is not installed", "pip install 'edgeft[cloud]'")
        return Support(True)

    def load(self, artifact: Artifact, options: LoadOptions) -> Session:
        """Opens no connection yet: a device that is offline may load what it will need later."""
        endpoint = parse_endpoint(artifact.address) if artifact.address else read_endpoint(artifact.path)
        return OpenAiSession(ChatClient(replace(endpoint, context=options.context or endpoint.context)))


class OpenAiSession(ClosingSession):
    """Conversations with one endpoint."""

    def __init__(self, client: ChatClient) -> None:
        self._client: ChatClient | None = client
        self._endpoint: Endpoint = client.endpoint
        self._pieces: dict[bytes, int] = {}
        self._texts: list[bytes] = []
        self._turn = 0
        self.context = client.endpoint.context
        self.vocabulary = CHAT + 1
        """Tokens known so far: it grows with the answers."""

    def close(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None

    def _alive(self) -> ChatClient:
        if self._client is None:
            raise ModelError(f"the session on {self._endpoint.url} is closed")
        return self._client

    # --- Text ---------------------------------------------------------------

    def render(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None) -> TokenIds:
        """The conversation itself: the server applies the model's template."""
        self._alive()
        content: dict[str, Any] = {"messages": list(messages)}
        if tools:
            content["tools"] = [
                {"type": "function", "function": tool} if "type" not in tool else tool for tool in tools
            ]
        return [CHAT, *json.dumps(content, ensure_ascii=False).encode("utf-8", "surrogatepass")]

    def tokenize(self, text: str, *, special: bool = False, bos: bool = False) -> TokenIds:
        self._alive()
        try:
            return list(text.encode())
        except UnicodeEncodeError as error:
            raise UsageError(f"the text is not valid Unicode: {error.reason} at character {error.start}") from error

    def detokenize(self, tokens: Sequence[int]) -> str:
        self._alive()
        return b"".join(self._bytes(token) for token in tokens).decode("utf-8", "replace")

    def _bytes(self, token: int) -> bytes:
        if token < CHAT:
            return bytes([token])
        return b"" if token == CHAT else self._texts[token - CHAT - 1]

    def _token(self, piece: bytes) -> int:
        """The number of a piece of text."""
        if piece not in self._pieces:
            self._pieces[piece] = self.vocabulary
            self._texts.append(piece)
            self.vocabulary += 1
        return self._pieces[piece]

    # --- Generation ---------------------------------------------------------

    def generate(self, prompt: TokenIds, sampling: Sampling, cancel: Cancel | None = None) -> Iterator[Delta]:
        """Raises: Unreachable besides; a broken stream gives no usage, and what it said may be cut."""
        client = self._alive()
        if not prompt:
            raise UsageError("the prompt is empty")
        if prompt[0] != CHAT:
            raise UsageError("an endpoint takes conversations, not plain text", "Leave out --raw.")
        content = parse_json(bytes(prompt[1:]).decode("utf-8", "surrogatepass"))
        self._turn += 1
        cancel = Cancel() if cancel is None else cancel
        body = {**content, **request_fields(sampling, self._endpoint)}
        yield from self._stream(client, body, sampling, cancel)

    def _stream(self, client: ChatClient, body: dict[str, Any], sampling: Sampling, cancel: Cancel) -> Iterator[Delta]:
        started = first = last = time.perf_counter()
        produced = 0
        stream, turn, answer = TextStream(sampling.stop), self._turn, Answer()
        events = self._events(client, body, cancel)
        try:
            for event in events:
                for piece in self._read(answer, event):
                    last = time.perf_counter()
                    first = last if produced == 0 else first
                    produced += 1
                    yield self._delta(stream, piece, sampling.top_logprobs)
                    self._check_turn(turn)
                    if stream.stopped:
                        break
                if stream.stopped or cancel:
                    break
        finally:
            if isinstance(events, Generator):
                events.close()
        reason: FinishReason = "stop" if stream.stopped else "cancel" if cancel else answer.reason
        times = (first if produced else last) - started, max(last - first, 0.0)
        yield Delta(stream.flush(), usage=answer.usage(times, reason))

    def _events(self, client: ChatClient, body: dict[str, Any], cancel: Cancel) -> Iterator[Mapping[str, Any]]:
        if cancel:
            return iter(())
        return client.stream("/chat/completions", {"model": client.model(), **body}, cancel)

    def _read(self, answer: Answer, event: Mapping[str, Any]) -> list[Piece]:
        try:
            return list(answer.read(event))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ModelError(f"{self._endpoint.url} sent an event that is not the protocol's: {error}") from error

    def _delta(self, stream: TextStream, piece: Piece, top: int) -> Delta:
        alternatives = tuple((self._token(text), logprob) for text, logprob in piece.alternatives[:top])
        return Delta(stream.push(piece.text), self._token(piece.text), piece.logprob if top else None, alternatives)

    def _check_turn(self, turn: int) -> None:
        self._alive()
        if turn != self._turn:
            raise UsageError("this answer ended when the session was used for something else")

    # --- What an endpoint does not do ------------------------------------------

    def score(self, tokens: TokenIds, start: int = 0) -> NDArray[np.float32]:
        self._alive()
        raise UsageError(
            "an endpoint does not score text: it gives probabilities of its own answers only", "Use a local model."
        )

    def set_adapters(self, adapters: Sequence[AdapterScale]) -> None:
        self._alive()
        self._turn += 1
        if adapters:
            raise ModelError(
                f"{adapters[0].path} cannot be loaded: an endpoint serves the weights it has",
                "Load the adapter where the server runs.",
            )


def request_fields(sampling: Sampling, endpoint: Endpoint) -> dict[str, Any]:
    """The sampling as the protocol has it.

    Stop strings are found here: llama-server swallows what may begin one when the answer ends before it is whole.

    Raises: UsageError for what it has no word for.
    """
    for name in ("top_k", "min_p", "repeat_penalty"):
        if getattr(sampling, name) != getattr(_USUAL, name) and not _neutral(sampling, name):
            raise UsageError(f"chat completions have no {name.replace('_', '-')}", "Leave it at its default.")
    fields: dict[str, Any] = {
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": sampling.temperature,
        "top_p": sampling.top_p if sampling.temperature > 0 else 1.0,
        "seed": sampling.seed,
        endpoint.max_tokens_field: sampling.max_tokens,
    }
    if sampling.top_logprobs:
        fields |= {"logprobs": True, "top_logprobs": min(sampling.top_logprobs, _MOST_LOGPROBS)}
    if sampling.json_schema is not None:
        schema = {"name": "answer", "strict": True, "schema": sampling.json_schema}
        fields["response_format"] = {"type": "json_schema", "json_schema": schema}
    return fields


def _neutral(sampling: Sampling, name: str) -> bool:
    """Whether a value means that nothing is done, which is what an endpoint does."""
    greedy = sampling.temperature <= 0 and name != "repeat_penalty"
    return greedy or getattr(sampling, name) == {"top_k": 0, "min_p": 0.0, "repeat_penalty": 1.0}[name]


@dataclass(frozen=True)
class Piece:
    text: bytes
    logprob: float | None = None
    alternatives: tuple[tuple[bytes, float], ...] = ()


class Answer:
    """What the events of one answer add up to."""

    def __init__(self) -> None:
        self.produced = 0
        self.reason: FinishReason = "stop"
        self._usage: Mapping[str, Any] = {}
        self._in_call = False

    def read(self, event: Mapping[str, Any]) -> Iterator[Piece]:
        """Pieces of text in one event; tool calls become the text that models write for them."""
        self._usage = event.get("usage") or self._usage
        for choice in event.get("choices") or ():
            if choice.get("finish_reason") == "length":
                self.reason = "length"
            delta = choice.get("delta") or choice.get("message") or {}
            tokens = (choice.get("logprobs") or {}).get("content") or ()
            pieces = [_piece(token) for token in tokens] if tokens else [Piece((delta.get("content") or "").encode())]
            for piece in [*pieces, *self._calls(delta, bool(choice.get("finish_reason")))]:
                if piece.text:
                    self.produced += 1
                    yield piece

    def _calls(self, delta: Mapping[str, Any], ended: bool) -> Iterator[Piece]:
        """Tool calls, which come in parts, as the text in which Hermes and Qwen models write them."""
        for call in delta.get("tool_calls") or ():
            function = call.get("function") or {}
            if function.get("name"):
                before = "}\n</tool_call>\n" if self._in_call else ""
                self._in_call = True
                yield Piece(f'{before}<tool_call>\n{{"name": {json.dumps(function["name"])}, "arguments": '.encode())
            yield Piece((function.get("arguments") or "").encode())
        if ended and self._in_call:
            self._in_call = False
            yield Piece(b"}\n</tool_call>")

    def usage(self, times: tuple[float, float], reason: FinishReason) -> Usage:
        details = self._usage.get("prompt_tokens_details") or {}
        completed = self._usage.get("completion_tokens", self.produced) if reason != "cancel" else self.produced
        prompt, reused = int(self._usage.get("prompt_tokens", 0)), int(details.get("cached_tokens") or 0)
        return Usage(prompt, reused, int(completed), *times, reason)


def _piece(token: Mapping[str, Any]) -> Piece:
    alternatives = tuple((_text(other), float(other["logprob"])) for other in token.get("top_logprobs") or ())
    return Piece(_text(token), float(token["logprob"]), alternatives)


def _text(token: Mapping[str, Any]) -> bytes:
    """Tokens may end inside a character: the bytes are right where the text is not."""
    raw = token.get("bytes")
    return bytes(raw) if raw is not None else str(token["token"]).encode()


runtime = OpenAiRuntime()
