"""Answers in OpenAI's form: whole, or as the chunks of a stream."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from edgeft.chat import Usage
from edgeft.serve.requests import Asked
from edgeft.serve.tools import CallReader
from edgeft.serve.work import Origin, Step, TokenLogprob

_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))
"""Made once: json.dumps makes one for every call."""


def encode(value: Any) -> bytes:
    """JSON in UTF-8. Half a surrogate pair, which JSON can carry and UTF-8 cannot, becomes a question mark."""
    return _ENCODER.encode(value).encode("utf-8", "replace")


class Reply(Protocol):
    """Turns the steps of one answer into its chunks, and remembers what the whole answer needs."""

    id: str
    text: str

    def opening(self) -> list[dict[str, Any]]:
        """Chunks that come before the first step."""

    def chunks(self, step: Step) -> list[dict[str, Any]]: ...

    def whole(self) -> dict[str, Any]:
        """The answer as one object, after the last step."""


class _Base:
    prefix = ""

    def __init__(self, asked: Asked, model: str) -> None:
        self.id = f"{self.prefix}-{uuid.uuid4().hex}"
        self.text = ""
        self._asked, self._model, self._created = asked, model, int(time.time())
        self._usage: Usage | None = None

    def _frame(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self._created, "model": self._model, "choices": choices}

    def _with_usage(self, chunk: dict[str, Any], usage: Usage | None) -> dict[str, Any]:
        """Every chunk has the member when a stream was asked to end with it: null until then."""
        return {**chunk, "usage": usage_object(usage) if usage else None} if self._asked.usage_in_stream else chunk


class ChatReply(_Base):
    prefix = "chatcmpl"

    def __init__(self, asked: Asked, model: str) -> None:
        super().__init__(asked, model)
        self._reader = CallReader([tool["function"]["name"] for tool in asked.work.tools])
        self._calls: list[dict[str, Any]] = []
        self._logprobs: list[dict[str, Any]] = []
        self._origin: Origin | None = None

    def opening(self) -> list[dict[str, Any]]:
        return [self._chunk({"role": "assistant", "content": ""})]

    def chunks(self, step: Step) -> list[dict[str, Any]]:
        text = self._reader.push(step.text)
        calls: list[dict[str, Any]] = []
        if step.usage:
            self._usage = step.usage
            rest, calls = self._reader.finish()
            text, self._calls = text + rest, calls
        self.text += text
        logprobs = self._logprob(step.logprob)
        chunks = []
        if text or logprobs:
            chunks.append({**self._chunk({"content": text}, logprobs), **_author(step.origin)})
        self._origin = step.origin or self._origin
        if calls:
            numbered = [{"index": index, **call} for index, call in enumerate(calls)]
            chunks.append(self._chunk({"tool_calls": numbered}))
        if step.usage:
            chunks.append(self._chunk({}, finish=self._finish()))
            if self._asked.usage_in_stream:
                chunks.append(self._with_usage(self._frame("chat.completion.chunk", []), step.usage))
        return chunks

    def _logprob(self, entry: TokenLogprob | None) -> dict[str, Any] | None:
        if self._asked.logprobs is None or entry is None:
            return None
        top = [_token(token, logprob) for token, logprob in entry.top[: self._asked.logprobs]]
        content = [{**_token(entry.token, entry.logprob), "top_logprobs": top}]
        self._logprobs += content
        return {"content": content, "refusal": None}

    def _finish(self) -> str:
        assert self._usage is not None
        return "tool_calls" if self._calls else self._usage.finish_reason

    def _chunk(
        self, delta: Mapping[str, Any], logprobs: Mapping[str, Any] | None = None, finish: str | None = None
    ) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return self._with_usage(self._frame("chat.completion.chunk", [choice]), None)

    def whole(self) -> dict[str, Any]:
        assert self._usage is not None
        message: dict[str, Any] = {"role": "assistant", "content": self.text or None if self._calls else self.text}
        message["refusal"] = None
        if self._calls:
            message["tool_calls"] = self._calls
        logprobs = {"content": self._logprobs, "refusal": None} if self._asked.logprobs is not None else None
        choice = {"index": 0, "message": message, "logprobs": logprobs, "finish_reason": self._finish()}
        usage = usage_object(self._usage)
        return {**self._frame("chat.completion", [choice]), "usage": usage, **_author(self._origin)}


class TextReply(_Base):
    prefix = "cmpl"

    def __init__(self, asked: Asked, model: str) -> None:
        super().__init__(asked, model)
        self._entries: list[tuple[int, TokenLogprob]] = []
        self._begin = len(asked.work.prompt or "") if asked.echo else 0

    def opening(self) -> list[dict[str, Any]]:
        return [self._chunk(self._asked.work.prompt or "")] if self._asked.echo else []

    def chunks(self, step: Step) -> list[dict[str, Any]]:
        entries = []
        if step.logprob is not None and self._asked.logprobs is not None:
            entries = [(self._begin + len(self.text), step.logprob)]
            self._entries += entries
        self.text += step.text
        chunks = [self._chunk(step.text, entries)] if step.text or entries else []
        if step.usage:
            self._usage = step.usage
            chunks.append(self._chunk("", finish=step.usage.finish_reason))
            if self._asked.usage_in_stream:
                chunks.append(self._with_usage(self._frame("text_completion", []), step.usage))
        return chunks

    def _chunk(
        self, text: str, entries: Sequence[tuple[int, TokenLogprob]] = (), finish: str | None = None
    ) -> dict[str, Any]:
        choice = {"text": text, "index": 0, "logprobs": self._logprobs(entries), "finish_reason": finish}
        return self._with_usage(self._frame("text_completion", [choice]), None)

    def _logprobs(self, entries: Sequence[tuple[int, TokenLogprob]]) -> dict[str, Any] | None:
        if self._asked.logprobs is None or not entries:
            return None
        return {
            "tokens": [entry.token for _, entry in entries],
            "token_logprobs": [entry.logprob for _, entry in entries],
            "top_logprobs": [dict(entry.top[: self._asked.logprobs]) for _, entry in entries],
            "text_offset": [offset for offset, _ in entries],
        }

    def whole(self) -> dict[str, Any]:
        assert self._usage is not None
        text = (self._asked.work.prompt or "") + self.text if self._asked.echo else self.text
        choice = {
            "text": text,
            "index": 0,
            "logprobs": self._logprobs(self._entries),
            "finish_reason": self._usage.finish_reason,
        }
        return {**self._frame("text_completion", [choice]), "usage": usage_object(self._usage)}


def usage_object(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.reused_tokens},
    }


def _author(origin: Origin | None) -> dict[str, Any]:
    """Not OpenAI's: who wrote what follows, where there can be several authors."""
    if origin is None:
        return {}
    return {"edgeft": {"author": origin.author, "reason": origin.reason, "restart": origin.restart}}


def _token(token: str, logprob: float) -> dict[str, Any]:
    """`bytes` is null for a token that is part of a character: its own bytes are lost in the text."""
    whole = None if "�" in token else list(token.encode("utf-8", "replace"))
    return {"token": token, "logprob": logprob, "bytes": whole}
