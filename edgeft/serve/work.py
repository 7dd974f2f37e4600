"""What the server asks of a model, and what comes back: plain data between the HTTP side and the model's process."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from edgeft.chat import Message, Sampling, Usage


class Failed(Exception):
    """A request that gets an error object instead of an answer.

    Args:
        status: the HTTP status.
        message: what happened and what to do.
        kind: OpenAI's `type`.
        code: OpenAI's `code`, for programs.
        param: the member of the request at fault.
        retry_after: seconds after which trying again can help.
    """

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.kind = status, message, kind
        self.code, self.param, self.retry_after = code, param, retry_after

    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        return {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}


@dataclass(frozen=True)
class Work:
    """One generation. Either `messages`, rendered by the model's own template, or a plain `prompt`."""

    sampling: Sampling
    messages: tuple[Message, ...] = ()
    prompt: str | None = None
    tools: tuple[Mapping[str, Any], ...] = ()
    adapter: str | None = None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Work:
        sampling = dict(value["sampling"])
        sampling["stop"] = tuple(sampling["stop"])
        return cls(
            Sampling(**sampling),
            tuple(value["messages"]),
            value["prompt"],
            tuple(value["tools"]),
            value["adapter"],
        )


@dataclass(frozen=True)
class TokenLogprob:
    """A token as text, with its natural-log probability and the most probable alternatives."""

    token: str
    logprob: float
    top: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Origin:
    """Who wrote what follows, of an answer that may have several authors. A cascade's last step sums up."""

    author: str
    reason: str = ""
    restart: bool = False
    """Whether the answer begins anew."""
    deferral: str | None = None
    """On the last step: why the cloud was asked, in a few words that repeat; None when it was not."""
    cost: float = 0.0
    confidence: float | None = None


@dataclass(frozen=True)
class Step:
    """One step of an answer; the last one carries `usage`."""

    text: str
    logprob: TokenLogprob | None = None
    usage: Usage | None = None
    origin: Origin | None = None


@dataclass(frozen=True)
class Loaded:
    """What a model's process says when it is ready."""

    path: str
    runtime: str
    reason: str
    context: int
    digest: str | None
    """SHA-256 of the artifact, from its manifest."""
    system: Mapping[str, str | None] = field(default_factory=dict)
    """Adapter name ("" for none) -> the system prompt of its training."""
    parallel: int = 1
    """Requests it takes at a time."""
    cache_bytes: int | None = None
    """Keys and values of all of them; None where the runtime does not say."""


class Job(Protocol):
    """One accepted request."""

    queued_s: float
    """Seconds spent waiting for the model."""

    @property
    def more(self) -> bool:
        """Whether the next step is there already."""

    def steps(self) -> AsyncIterator[Step]:
        """Raises: Failed."""

    def abort(self, failed: Failed) -> None:
        """Stop the computation; `steps` ends with `failed`. Does nothing when the answer is whole."""


class Answerer(Protocol):
    """What answers under a model's name: a model's process, or anything that sits before several."""

    def submit(self, client: str, work: Work) -> Job:
        """Raises: Failed with status 429 when too many are waiting, 503 when there is no model."""

    @property
    def ready(self) -> bool: ...

    @property
    def waiting(self) -> int: ...
