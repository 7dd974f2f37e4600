"""The nouns of a conversation: messages, sampling, what a runtime streams back, and chat templates."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from edgeft.errors import ModelError, UsageError, require

Message = Mapping[str, Any]
"""One chat message: `role` ("system", "user", "assistant", "tool"), `content`, optionally `tool_calls`."""

TokenIds = list[int]

FinishReason = Literal["stop", "length", "cancel"]


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. `temperature` 0 is greedy and ignores the other choices.

    `json_schema` constrains the whole answer; `top_logprobs` asks for that many alternatives per token.
    """

    max_tokens: int = 512
    temperature: float = 0.0
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    json_schema: Mapping[str, Any] | None = None
    top_logprobs: int = 0


SAMPLING = ("temperature", "top-k", "top-p", "min-p", "repeat-penalty", "seed", "max-tokens")
"""What a user sets of it, by the names of the settings."""


def changed_sampling(sampling: Sampling, name: str, value: str) -> Sampling:
    """With one value more, as a user types it. Raises: UsageError for an unknown name or what is no number."""
    field = name.replace("-", "_")
    if name.replace("_", "-") not in SAMPLING:
        raise UsageError(f"no sampling parameter {name!r}", f"There are: {', '.join(SAMPLING)}.")
    try:
        return replace(sampling, **{field: type(getattr(sampling, field))(value)})
    except ValueError as error:
        raise UsageError(f"{name} cannot be {value!r}") from error


@dataclass(frozen=True)
class Usage:
    """What one generation cost. Times in seconds, measured with a monotonic clock."""

    prompt_tokens: int
    reused_tokens: int
    """Prompt tokens whose keys and values were still in the cache."""
    completion_tokens: int
    ttft_s: float
    """From the call to the first token."""
    decode_s: float
    """From the first token to the last."""
    finish_reason: FinishReason

    @property
    def decode_tokens_per_s(self) -> float:
        """Decode speed; the first token belongs to the prefill and is not counted."""
        return (self.completion_tokens - 1) / self.decode_s if self.decode_s > 0 else 0.0

    def as_dict(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "reused_tokens": self.reused_tokens,
            "completion_tokens": self.completion_tokens,
            "ttft_ms": round(self.ttft_s * 1000, 1),
            "decode_tokens_per_s": round(self.decode_tokens_per_s, 2),
            "finish_reason": self.finish_reason,
        }


@dataclass(frozen=True)
class Delta:
    """One step of a stream. `text` may be empty while a character or a stop string is still incomplete."""

    text: str
    token: int | None = None
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    """(token id, natural-log probability), most probable first."""
    usage: Usage | None = None
    """Set on the last delta only."""


class Cancel:
    """A switch any thread can throw; a runtime looks at it between tokens and inside the prompt phase."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._listeners: list[Callable[[], None]] = []

    def set(self) -> None:
        self._event.set()
        for listener in list(self._listeners):
            listener()

    def __bool__(self) -> bool:
        return self._event.is_set()

    @contextlib.contextmanager
    def calls(self, listener: Callable[[], None]) -> Iterator[None]:
        """Call `listener` when the switch is thrown, from whichever thread throws it."""
        self._listeners.append(listener)
        try:
            yield
        finally:
            self._listeners.remove(listener)


@dataclass(frozen=True)
class ChatTemplate:
    """A model's own Jinja template. Rendering runs in a sandbox: templates come from strangers."""

    source: str
    bos_token: str = ""
    eos_token: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """Text of the conversation as the model expects it.

        Raises:
            ModelError: when the template refuses the messages, cannot be parsed, reaches for what is none of its
                business, or computes far more than the conversation needs.
        """
        jinja2 = require("jinja2", "device")
        from edgeft.template_budget import TooCostly
        from edgeft.template_sandbox import render

        values = {
            "messages": list(messages),
            "tools": list(tools) if tools else None,
            "add_generation_prompt": add_generation_prompt,
            "bos_token": self.bos_token,
            "eos_token": self.eos_token,
            **self.extra,
        }
        try:
            return render(self.source, values)
        except Exception as error:  # a template is a stranger's program: it may raise anything
            expected = isinstance(error, (jinja2.TemplateError, TooCostly, TypeError))
            said = str(error)[:500] if expected else f"{type(error).__name__}: {str(error)[:500]}"
            raise ModelError(f"the chat template cannot render this conversation: {said}") from error
