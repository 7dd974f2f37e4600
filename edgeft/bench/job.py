"""What one measuring process is asked to do, and what it says."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Job:
    """One model with one set of settings."""

    model: str
    runtime: str = "auto"
    context: int | None = None
    threads: int | None = None
    """Threads that decode; None: the runtime's choice."""
    threads_batch: int | None = None
    prompts: tuple[int, ...] = (16, 512)
    """Tokens of each prompt; 0: as many as the context holds besides the answer."""
    tokens: int = 64
    """Decoded after each prompt."""
    repeats: int = 3
    warm: bool = True
    """Begin with a short answer that is not counted."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Loaded:
    runtime: str
    seconds: float
    context: int
    base_bytes: int | None
    """Resident before anything was imported for the model."""
    own_bytes: int | None
    """Resident and not backed by a file, after loading."""


@dataclass(frozen=True)
class Answer:
    """One prompt and what came after it. Times in seconds."""

    asked: int
    """Which of `Job.prompts`, by its place."""
    prompt_tokens: int
    """Tokens that were computed."""
    ttft_s: float
    gaps: tuple[float, ...]
    """Between one token and the next."""
    prompt_joules: float | None = None
    decode_joules: float | None = None


@dataclass(frozen=True)
class Finished:
    peak_bytes: int | None
    no_energy: str | None
    """Why there are no joules."""


@dataclass(frozen=True)
class Failed:
    message: str
    hint: str | None
    code: int
    """An `ExitCode`."""


Event = Loaded | Answer | Finished | Failed
_KINDS: dict[str, type[Event]] = {kind.__name__: kind for kind in (Loaded, Answer, Finished, Failed)}


def to_json(event: Event) -> dict[str, Any]:
    return {"event": type(event).__name__, **asdict(event)}


def from_json(entry: dict[str, Any]) -> Event:
    kind = _KINDS[entry.pop("event")]
    if kind is Answer:
        entry["gaps"] = tuple(entry["gaps"])
    return kind(**entry)
