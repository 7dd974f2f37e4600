"""What every conversation on the screen needs: history, sampling, and an answer drawn and stored as it comes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from edgeft import config
from edgeft.chat import Sampling, Usage
from edgeft.errors import EdgeftError
from edgeft.history import Conversation, History, open_or_begin_anew
from edgeft.paths import history_file
from edgeft.tui.conversation_view import ConversationView
from edgeft.tui.inputs import since_key
from edgeft.tui.model import Opened
from edgeft.tui.talk import Said

FRAME_S = 0.04
"""Words that come sooner after the last ones are drawn with the next: drawing costs milliseconds, a token may not."""
SHARE = 4
"""Drawing waits so many times as long as it took the last time: four fifths of the time belong to keys."""

TYPING_S = 0.3
"""So long after a key another one is expected."""
BETWEEN_S = (0.01, 0.04)
"""While one types, words are drawn so long after a key: it is on the screen then, and the next one is not there yet."""
LONGEST_S = 1.0
"""Then words are drawn all the same."""

Adapters = Sequence[tuple[str, float]]


def in_the_way(seconds: float) -> bool:
    """Whether drawing now could keep a key waiting, so many seconds after the last one."""
    return seconds < TYPING_S and not BETWEEN_S[0] <= seconds <= BETWEEN_S[1]


async def write_answer(
    events: AsyncIterator[Mapping[str, Any]],
    said: Said,
    conversation: Conversation,
    keep: Callable[[Callable[[], object]], None],
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
    text, drawn, usage, route = "", 0, None, None
    began = last = time.monotonic()
    pause = FRAME_S
    try:
        async for event in events:
            if event["event"] == "text":
                text += event["text"]
                now = time.monotonic()
                if now - last < pause or (now - last < LONGEST_S and in_the_way(since_key())):
                    continue
                await said.grow(text[drawn:])
                if isinstance(said.parent, ConversationView):
                    await said.parent.rest(said)
                keep(partial(conversation.grow_answer, text))
                tell(f"{len(text)} characters, {now - began:.0f} s")
                drawn, last = len(text), time.monotonic()
                pause = max(FRAME_S, SHARE * (last - now))
            elif event["event"] == "author":
                said.written_by({"author": event["author"], "reason": event["reason"]})
            elif event["event"] == "note":
                said.notify(event["text"], severity="warning", markup=False)
            else:
                usage, route = usage_of(event["usage"]), event["route"]
    finally:
        keep(lambda: conversation.end_answer(text, usage, route))
        await said.grow(text[drawn:])
        if route:
            said.written_by(route)
        await said.end(text, stopped=usage is None or usage.finish_reason == "cancel")
    assert usage is not None
    return usage


def figures(opened: Opened, usage: Usage | None, doing: str, *, plain: bool = False) -> list[str]:
    """For a line of status: the speed of the last answer, or what is being done, and how full the context is.

    Args:
        plain: in words and numbers only, for someone who listens to it.
    """
    used = usage.prompt_tokens + usage.completion_tokens if usage else 0
    speed = [f"{usage.decode_tokens_per_s:.1f} tokens/s", f"first token {usage.ttft_s * 1000:.0f} ms"] if usage else []
    return [*([doing] if doing else speed), f"context {used}/{opened.context}{_gauge(used, opened.context, plain)}"]


def _gauge(used: int, context: int, plain: bool) -> str:
    """Eighths of the context that are full, and the share in numbers."""
    if not used or not context:
        return ""
    share = min(1.0, used / context)
    bar = "" if plain else f" {'█' * round(8 * share):░<8}"
    return f"{bar} {share:.0%}" + (" nearly full" if share > 0.9 else "")


_BY = {"policy": "", "device": "asks the device only", "cloud": "asks the cloud"}
"""Who of a cascade is to answer, and what the line below says of it."""


def next_by(by: str) -> str:
    """Whom the key asks next: whom the policy chooses, the device, or the cloud. Privacy rules hold all the same."""
    names = list(_BY)
    return names[(names.index(by) + 1) % len(names)]


def route_state(by: str, offline: bool) -> list[str]:
    """What the line below says of a cascade."""
    return [*(["offline: the device answers"] if offline else []), *([_BY[by]] if _BY[by] else [])]


def is_offline(conversation: Conversation, *, before: bool) -> bool:
    """Offline is a state one sees, not a failure: the device answers. As before when the cloud was not asked."""
    route = (conversation.messages[-1].made or {}).get("route") or {}
    attempts = route.get("attempts")
    return attempts[-1] == "offline" if attempts else before


def last_usage(conversation: Conversation) -> Usage | None:
    """Of the last answer, as far as the history knows it."""
    found = [one.usage for one in conversation.messages if one.usage]
    return usage_of(found[-1]) if found else None


def run_settings() -> dict[str, Any]:
    """`run.*`, by their short names."""
    return {name[4:]: value.value for name, value in config.load().items() if name.startswith("run.")}


def sampling_of_config() -> Sampling:
    values = run_settings()
    names = ("max-tokens", "temperature", "top-k", "top-p", "min-p", "repeat-penalty", "seed")
    return Sampling(**{name.replace("-", "_"): values[name] for name in names})


def open_history() -> tuple[History | None, tuple[str, str] | None]:
    """The history, and what is to be said of it: (title, text)."""
    try:
        history, aside = open_or_begin_anew(history_file())
    except EdgeftError as error:
        return None, ("Nothing will be stored", error.message)
    if aside is None:
        return history, None
    return history, ("The history was damaged; a new one is begun", f"the old file is {aside}")


def store_again(conversation: Conversation) -> tuple[str, str] | None:
    """Store a conversation that could not be stored for a while, as a new one; what is to be said of it, if it was."""
    history, trouble = open_history()
    if history is None:
        return None
    try:
        conversation.store_anew(history)
    except EdgeftError:
        history.close()
        return None
    return trouble or ("Stored again", f"as conversation {conversation.id}, with all that was said")


def close_history(*histories: History | None) -> None:
    for history in histories:
        if history is not None:
            with contextlib.suppress(EdgeftError):
                history.close()


def lasting(reference: str) -> str:
    """A reference that means the same from another folder."""
    path = Path(reference).expanduser()
    return str(path.absolute()) if path.exists() else reference


def usage_of(value: Mapping[str, Any]) -> Usage:
    """Back from `Usage.as_dict`."""
    tokens, speed = int(value["completion_tokens"]), value["decode_tokens_per_s"]
    return Usage(
        prompt_tokens=int(value["prompt_tokens"]),
        reused_tokens=int(value["reused_tokens"]),
        completion_tokens=tokens,
        ttft_s=value["ttft_ms"] / 1000,
        decode_s=(tokens - 1) / speed if speed else 0.0,
        finish_reason=value["finish_reason"],
    )
