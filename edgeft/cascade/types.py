"""What a cascade gives back: pieces of an answer with their author, and one record of how it came about."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

LOCAL = "local"
"""The author of text that was made on the device; any other author is the name of an endpoint."""

Finish = Literal["stop", "length", "cancel", "broken", "refused"]
By = Literal["policy", "device", "cloud"]
"""Who is to answer: whom the policy chooses, or whom the user asks for. Privacy rules hold all the same."""


@dataclass(frozen=True)
class Attempt:
    """One request to an endpoint, or the reason why none was made."""

    endpoint: str
    outcome: str
    """"answered", or what stood in the way: "offline", "open circuit", "budget", "busy", "429", "cut", …"""
    ms: float = 0.0
    detail: str = ""
    """Redacted; never holds a key."""


@dataclass
class Record:
    """How one answer came about; what the audit log keeps. It has no text of the conversation."""

    id: str
    at: float
    """Unix time of the request, seconds."""
    author: str = LOCAL
    """Who wrote the last shown text."""
    authors: list[str] = field(default_factory=list)
    """Everyone who wrote shown text, in order."""
    reason: str = ""
    """Why that author."""
    finish: Finish = "stop"
    cost: float = 0.0
    """Money, in the currency of cascade.toml, of all attempts."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cloud_tokens: int = 0
    """Prompt and completion tokens of all attempts."""
    local_tokens: int = 0
    """Tokens decoded on the device, shown or not."""
    ttft_ms: float | None = None
    """From the request to the first shown text."""
    total_ms: float = 0.0
    risk: float | None = None
    """What the policy made of the local answer; deferred when above `threshold`."""
    threshold: float | None = None
    confidence: float | None = None
    """Mean natural-log probability of the judged tokens."""
    features: Mapping[str, float] = field(default_factory=dict)
    attempts: list[Attempt] = field(default_factory=list)
    left_device: bool = False
    """Whether anything of the conversation was sent."""
    redacted: Mapping[str, int] = field(default_factory=dict)
    """Kind of personal data -> how many different ones were replaced before sending."""
    cached: bool = False
    error: str = ""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class CascadeDelta:
    """One step of an answer. The last one has no text and carries `record`."""

    text: str
    author: str = LOCAL
    reason: str = ""
    """Said on an author's first delta."""
    restart: bool = False
    """True on the first delta of an answer that begins anew after a broken one; the reader has seen both."""
    record: Record | None = None
