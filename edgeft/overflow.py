"""What becomes of a conversation that is longer than the context: refused, or its oldest turns are left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgeft.chat import Message, TokenIds
from edgeft.plugins import Choice, Overflow, Session

Tools = Sequence[Mapping[str, Any]] | None

KEPT = 0.5
"""Share of the room that is left filled when turns go. To leave out no more than needed would move the beginning of the
prompt at every turn, and nothing cached could be used again. Half is a choice, not a measurement."""
_RESERVE = 0.25
"""Of the context, at most, that is kept free for the answer."""


@dataclass(frozen=True)
class Fitted:
    prompt: TokenIds
    dropped: int = 0
    """Messages that are not in the prompt."""

    @property
    def note(self) -> str:
        return f"the context is full: the oldest {self.dropped} messages were left out" if self.dropped else ""


def fit(
    session: Session,
    messages: Sequence[Message],
    policy: Overflow = "refuse",
    answer: int = 0,
    tools: Tools = None,
) -> Fitted:
    """The prompt of a conversation, without its oldest turns where they do not fit.

    The system prompt and the last question stay whatever happens; when they alone are too long, `generate` refuses
    them as it refuses any prompt that does not fit. What is left out depends on the messages alone, so a server that
    keeps nothing of a client cuts the next turn at the same place.

    Args:
        answer: tokens to keep free, at most a quarter of the context.

    Raises: what `render` raises.
    """
    prompt = session.render(messages, tools)
    room = session.context - max(1, min(answer, int(_RESERVE * session.context)))
    if policy == "refuse" or len(prompt) <= room:
        return Fitted(prompt)
    head = 1 if messages and messages[0]["role"] == "system" else 0
    starts = [at for at, message in enumerate(messages) if at >= head and message["role"] == "user"]
    if not starts:
        return Fitted(prompt)
    first = _first_kept(session, messages, tools, starts, room)
    for at in [start for start in starts if start >= first]:  # sizes are estimates: the prompt itself decides
        prompt = session.render([*messages[:head], *messages[at:]], tools)
        if len(prompt) <= room:
            break
    return Fitted(prompt, at - head)


def overflow_choice(policy: Overflow) -> Choice:
    reasons: dict[Overflow, str] = {
        "refuse": "the default: an answer to half a conversation looks like one to all of it",
        "truncate-oldest": "asked for: the system prompt stays, the oldest turns go",
    }
    return Choice("overflow", policy, reasons[policy])


def _first_kept(session: Session, messages: Sequence[Message], tools: Tools, starts: Sequence[int], room: int) -> int:
    """Where the conversation would begin had it been cut turn by turn, each time down to `KEPT` of the room."""
    base, sizes = _sizes(session, messages, tools, starts[0])
    ends = [start + 1 for start in starts[:-1]] + [len(messages)]  # a prompt ends with its question
    first = 0
    for turn, end in enumerate(ends):
        if base + sum(sizes[starts[first] : end]) > room:
            while first < turn and base + sum(sizes[starts[first] : end]) > KEPT * room:
                first += 1
    return starts[first]


def _sizes(session: Session, messages: Sequence[Message], tools: Tools, head: int) -> tuple[int, list[float]]:
    """Tokens of what every prompt begins with, and about those of each message. They must not depend on how many there
    are: the cut would move with every turn."""
    one: Message = {"role": "user", "content": "a"}
    base = len(session.render([*messages[:head], one], tools))
    two = len(session.render([*messages[:head], one, {"role": "assistant", "content": "a"}, one], tools))
    framing = (two - base) / 2 - len(session.tokenize("a"))
    return base, [len(session.tokenize(str(message.get("content") or ""))) + framing for message in messages]
