"""What every conversation on the screen needs: history, sampling, and an answer drawn and stored as it comes."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from edgeft import config
from edgeft.chat import Sampling, Usage
from edgeft.errors import EdgeftError
from edgeft.history import Conversation, History, open_or_begin_anew
from edgeft.paths import history_file
from edgeft.tui.model import Opened
from edgeft.tui.talk import Said

PAGE = 60
"""Messages that are drawn; older ones are in the history."""
FRAME_S = 0.04
"""Words that come sooner after the last ones are drawn with the next: drawing costs milliseconds, a token may not."""
SLOWER = 10_000
"""Characters of an answer that double that time: the whole conversation is laid out anew each time."""


async def write_answer(
    events: AsyncIterator[Mapping[str, Any]],
    said: Said,
    conversation: Conversation,
    keep: Callable[[Callable[[], object]], bool],
    tell: Callable[[str], None],
) -> Usage:
    """Draw and store an answer that was begun, while it comes; whatever happens, what came is kept.

    Args:
        events: of `ModelProcess.generate`.
        keep: does what it is given, which writes to the history.
        tell: shows how far the answer is.

    Raises:
        EdgeftError: the model failed.
    """
    text, drawn, usage = "", 0, None
    began = last = time.monotonic()
    try:
        async for event in events:
            if event["event"] == "text":
                text += event["text"]
                if (now := time.monotonic()) - last < FRAME_S * (1 + len(text) / SLOWER):
                    continue
                await said.grow(text[drawn:])
                drawn, last = len(text), now
                keep(partial(conversation.grow_answer, text))
                tell(f"{len(text)} characters, {now - began:.0f} s")
            else:
                usage = _usage(event["usage"])
    finally:
        keep(lambda: conversation.end_answer(text, usage))
        await said.grow(text[drawn:])
        await said.end(text, stopped=usage is None or usage.finish_reason == "cancel")
    assert usage is not None
    return usage


def figures(opened: Opened, usage: Usage | None, doing: str) -> list[str]:
    """For a line of status: the speed of the last answer, or what is being done, and how full the context is."""
    used = usage.prompt_tokens + usage.completion_tokens if usage else 0
    speed = [f"{usage.decode_tokens_per_s:.1f} tokens/s", f"first token {usage.ttft_s * 1000:.0f} ms"] if usage else []
    return [*([doing] if doing else speed), f"context {used}/{opened.context}"]


def sampling_of_config() -> Sampling:
    values = config.load()
    names = ("max-tokens", "temperature", "top-k", "top-p", "min-p", "repeat-penalty", "seed")
    return Sampling(**{name.replace("-", "_"): values[f"run.{name}"].value for name in names})


def load_options() -> tuple[str, dict[str, Any]]:
    """The runtime's name and how it is to load a model."""
    values = {name: value.value for name, value in config.load().items()}
    return values["run.runtime"], {"context": values["run.context"] or None, "threads": values["run.threads"] or None}


def open_history() -> tuple[History | None, tuple[str, str] | None]:
    """The history, and what is to be said of it: (title, text)."""
    try:
        history, aside = open_or_begin_anew(history_file())
    except EdgeftError as error:
        return None, ("Nothing will be stored", error.message)
    if aside is None:
        return history, None
    return history, ("The history was damaged; a new one is begun", f"the old file is {aside}")


def lasting(reference: str) -> str:
    """A reference that means the same from another folder."""
    path = Path(reference).expanduser()
    return str(path.absolute()) if path.exists() else reference


def _usage(value: dict[str, float]) -> Usage:
    """Back from `Usage.as_dict`."""
    tokens, speed = int(value["completion_tokens"]), value["decode_tokens_per_s"]
    return Usage(
        prompt_tokens=int(value["prompt_tokens"]),
        reused_tokens=int(value["reused_tokens"]),
        completion_tokens=tokens,
        ttft_s=value["ttft_ms"] / 1000,
        decode_s=(tokens - 1) / speed if speed else 0.0,
        finish_reason=value["finish_reason"],  # type: ignore[arg-type]
    )
