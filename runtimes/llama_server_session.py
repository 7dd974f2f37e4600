"""A session on a llama-server: its native routes, which take and give token ids (llama.cpp tools/server/README.md)."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from edgeft.chat import Cancel, ChatTemplate, Delta, FinishReason, Message, Sampling, TokenIds, Usage
from edgeft.errors import ModelError, UsageError
from edgeft.models.adapter_file import check_base
from edgeft.models.gguf_header import read_header
from edgeft.plugins import AdapterScale

from .openai_client import ChatClient
from .session_base import ClosingSession
from .text_stream import TextStream

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_PENALTY_WINDOW = 64


class Process(Protocol):
    """A server that can be started anew."""

    def restart(self, adapters: Sequence[AdapterScale]) -> ChatClient: ...

    def stop(self) -> None: ...


class LlamaServerSession(ClosingSession):
    """One model on one server; `process` when that server is ours."""

    def __init__(self, client: ChatClient, path: Path, process: Process | None = None, parallel: int = 1) -> None:
        """
        Args:
            parallel: answers at a time; a server that was running has as many slots as it has.
        """
        self._client: ChatClient | None = client
        self._process, self._path = process, path
        self._pieces: dict[int, str] = {}
        self._turn = 0
        self._fresh = True
        self._mixed = False
        """Whether slots may have been filled under other adapters."""
        props = client.get("/props")
        self._template = str(props.get("chat_template") or "")
        self._edges = (str(props.get("bos_token") or ""), str(props.get("eos_token") or ""))
        self.parallel = min(parallel, int(props.get("total_slots") or 1))
        self.context = int(props["default_generation_settings"]["n_ctx"])
        meta = client.get("/v1/models")["data"][0].get("meta") or {}
        self.vocabulary = int(meta.get("n_vocab") or 0)
        self._first: TokenIds = self._tokens("", special=False, add=True)

    def close(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None
            if self._process is not None:
                self._process.stop()

    def _alive(self) -> ChatClient:
        if self._client is None:
            raise ModelError(f"the session on {self._path} is closed")
        return self._client

    # --- Text ---------------------------------------------------------------

    def render(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None) -> TokenIds:
        self._alive()
        # Without one, a server falls back to a template of its own making.
        if not self._template or (self._process and not _has_template(self._path)):
            raise ModelError(
                f"{self._path} has no chat template, and edgeft does not guess one",
                "Export the model again from a base that has one, or use a plain-text prompt.",
            )
        text = ChatTemplate(self._template, *self._edges).render(messages, tools=tools)
        return self.tokenize(text, special=True, bos=True)

    def tokenize(self, text: str, *, special: bool = False, bos: bool = False) -> TokenIds:
        self._alive()
        tokens = self._tokens(text, special=special, add=False)
        # A template may already have written the token: two of them make a model worse.
        return self._first + tokens if bos and tokens[: len(self._first)] != self._first else tokens

    def _tokens(self, text: str, *, special: bool, add: bool) -> TokenIds:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UsageError(f"the text is not valid Unicode: {error.reason} at character {error.start}") from error
        body = {"content": text, "parse_special": special, "add_special": add}
        return [int(token) for token in self._alive().post("/tokenize", body)["tokens"]]

    def detokenize(self, tokens: Sequence[int]) -> str:
        self._alive()
        return self._text([token for token in tokens if not self._is_control(token)])

    def _text(self, tokens: Sequence[int]) -> str:
        return str(self._alive().post("/detokenize", {"tokens": list(tokens)})["content"])

    def _is_control(self, token: int) -> bool:
        """The server writes control tokens out; they are those that only the special reading gives back."""
        if token not in self._pieces:
            self._pieces[token] = self._text([token])
        text = self._pieces[token]
        if len(text) < 3 or "\N{REPLACEMENT CHARACTER}" in text:
            return False
        return self._tokens(text, special=True, add=False) == [token] != self._tokens(text, special=False, add=False)

    # --- Generation ---------------------------------------------------------

    def generate(self, prompt: TokenIds, sampling: Sampling, cancel: Cancel | None = None) -> Iterator[Delta]:
        client = self._alive()
        if not prompt:
            raise UsageError("the prompt is empty")
        if len(prompt) >= self.context:
            raise ModelError(
                f"the prompt has {len(prompt)} tokens; the context holds {self.context}",
                "Shorten the conversation, or load the model with a longer --context.",
            )
        self._turn += self.parallel == 1
        cancel = Cancel() if cancel is None else cancel
        yield from self._stream(client, prompt, sampling, cancel)

    def _stream(self, client: ChatClient, prompt: TokenIds, sampling: Sampling, cancel: Cancel) -> Iterator[Delta]:
        started = first = last = time.perf_counter()
        stream, turn, produced = TextStream(sampling.stop), self._turn, 0
        end: Mapping[str, Any] = {}
        body = {"prompt": prompt, **request_fields(sampling), "cache_prompt": not (self._fresh or self._mixed)}
        self._fresh = False
        events: Generator[Mapping[str, Any], None, None] | None = None
        try:
            # A thrown switch asks nothing of the server.
            events = None if cancel else client.stream("/completion", body, cancel)  # type: ignore[assignment]
            for event in events or ():
                end = event
                if event.get("tokens"):
                    last = time.perf_counter()
                    first = last if produced == 0 else first
                    produced += 1
                    yield _delta(stream, event, sampling.top_logprobs)
                    self._check_turn(turn)
                if stream.stopped or cancel:
                    break
        finally:
            if events is not None:
                events.close()
        reason: FinishReason = "stop"
        if not stream.stopped:
            reason = "cancel" if cancel else "length" if end.get("stop_type") == "limit" else "stop"
        whole = reason in ("stop", "length") and end.get("stop")
        usage = Usage(
            len(prompt),
            int((end.get("timings") or {}).get("cache_n", 0)),
            int(end["tokens_predicted"]) if whole and reason == "length" else produced,
            (first if produced else last) - started,
            max(last - first, 0.0),
            reason,
        )
        yield Delta(stream.flush(), usage=usage)

    def _check_turn(self, turn: int) -> None:
        self._alive()
        if turn != self._turn:
            raise UsageError("this answer ended when the session was used for something else")

    def score(self, tokens: TokenIds, start: int = 0) -> NDArray[np.float32]:
        self._alive()
        raise UsageError("llama-server does not score text", "Use --runtime xllamacpp.")

    # --- Adapters -----------------------------------------------------------

    def set_adapters(self, adapters: Sequence[AdapterScale]) -> None:
        """A server of our own is started anew; one that was running can change the scales of what it was started with.

        Raises: ModelError.
        """
        client = self._alive()
        self._turn += 1
        self._fresh = True
        if self._process is not None:
            for adapter in adapters:
                check_base(adapter.path, self._path)
            if not adapters and not client.get("/lora-adapters"):
                return
            client.close()
            self._client = None
            self._client = self._process.restart(adapters)
            return
        loaded = {str(one["path"]): int(one["id"]) for one in client.get("/lora-adapters")}  # type: ignore[index]
        for adapter in adapters:
            if str(adapter.path) not in loaded:
                raise ModelError(
                    f"the server was not started with {adapter.path}", f"Start it with --lora {adapter.path}."
                )
        self._mixed = self.parallel > 1 and bool(loaded)
        scales = {str(adapter.path): adapter.scale for adapter in adapters}
        client.post("/lora-adapters", [{"id": at, "scale": scales.get(path, 0.0)} for path, at in loaded.items()])


def request_fields(sampling: Sampling) -> dict[str, Any]:
    """The sampling in llama-server's words, in the order of llama.cpp's own tools.

    Stop strings are found here: the server swallows what may begin one when the answer ends before it is whole.
    """
    fields: dict[str, Any] = {
        "stream": True,
        "return_tokens": True,
        "n_predict": sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "min_p": sampling.min_p,
        "repeat_penalty": sampling.repeat_penalty,
        "repeat_last_n": _PENALTY_WINDOW,
        "seed": sampling.seed & 0xFFFFFFFF,
        "samplers": ["penalties", "top_k", "top_p", "min_p", "temperature"],
    }
    if sampling.top_logprobs:
        fields["n_probs"] = sampling.top_logprobs
    if sampling.json_schema is not None:
        fields["json_schema"] = sampling.json_schema
    return fields


def _has_template(path: Path) -> bool:
    return bool(read_header(path).metadata.get("tokenizer.chat_template"))


def _delta(stream: TextStream, event: Mapping[str, Any], top: int) -> Delta:
    text, token = stream.push(str(event["content"]).encode()), int(event["tokens"][-1])
    told = (event.get("completion_probabilities") or [{}])[-1] if top else {}
    alternatives = tuple((int(one["id"]), float(one["logprob"])) for one in told.get("top_logprobs") or ())
    return Delta(text, token, float(told["logprob"]) if "logprob" in told else None, alternatives)
