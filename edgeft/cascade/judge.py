"""A model that grades answers which have no reference, or more than one right form; asked once for each answer."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from edgeft.cascade.cloud import Clouds, Unanswered, estimate_tokens
from edgeft.cascade.settings import Cloud, Settings
from edgeft.cascade.types import Record
from edgeft.chat import Cancel, Message, Sampling
from edgeft.data.example import Example
from edgeft.data.load import split_of
from edgeft.errors import DataError, Unreachable, UsageError
from edgeft.paths import parse_json

if TYPE_CHECKING:
    from edgeft.cascade.budget import Budget
    from edgeft.cascade.privacy import Guard

PASSES = 4
"""The lowest grade of a right answer, of 1 to 5."""
_TOKENS = 8
_GRADE = re.compile(r"(?<![\d.])[1-5](?![\d.]*\d)")
_ASK = """\
Grade the answer to the last message of this conversation.

Conversation:
{conversation}

Answer:
{answer}
{reference}
5: right and complete. 4: right, with small faults. 3: partly right. 2: mostly wrong. 1: wrong, empty or no answer.
The answer's length and style do not count. Reply with the number alone."""


class Grader:
    """The endpoint of `[judge]`, with the same retries, budget and replaced personal data as the others."""

    def __init__(self, settings: Settings, budget: Budget, guard: Guard) -> None:
        """Raises: UsageError when the settings name no judge."""
        if settings.judge is None:
            raise UsageError(f"{settings.path} names no judge", "Write a [judge] table with the keys of [[cloud]].")
        self._cloud: Cloud = settings.judge
        quiet = replace(settings.resilience, hedge_percentile=0.0)
        self._clouds = Clouds(replace(settings, cloud=(self._cloud,), resilience=quiet), budget, guard)

    def close(self) -> None:
        self._clouds.close()

    def key(self, prompt: Sequence[Message], answer: str, reference: str) -> str:
        """Of one grade: of who gives it, and of every word that is asked."""
        text = f"judge {self._cloud.name} {self._cloud.model} {_asked(prompt, answer, reference)}"
        return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()

    def most(self, prompt: Sequence[Message], reference: str, longest: int) -> float:
        """What a grade can cost, for an answer of up to so many tokens that is not known yet."""
        messages = [{"role": "user", "content": _asked(prompt, "", reference)}]
        return self._cloud.cost(estimate_tokens(messages) + longest, _TOKENS)

    def grade(self, prompt: Sequence[Message], answer: str, reference: str) -> tuple[int | None, float]:
        """A grade, None when the judge said something else; and its cost. Raises: Unreachable."""
        record = Record("", 0.0)
        messages = [{"role": "user", "content": _asked(prompt, answer, reference)}]
        try:
            said = "".join(
                text for _, text in self._clouds.ask(messages, Sampling(max_tokens=_TOKENS), Cancel(), record)
            )
        except Unanswered as failure:
            raise Unreachable(
                f"the judge did not answer ({failure.outcome})", "Try again: what was graded is kept."
            ) from failure
        found = _GRADE.search(said)
        return int(found.group()) if found else None, record.cost


def load_questions(file: Path, split: str) -> list[Example]:
    """Conversations of a JSONL file that may end with a user's turn; those get an empty answer: there is no reference.

    Args:
        split: train, valid or test, by the question's digest as in `edgeft.data.load.split_of`.

    Raises:
        DataError: a line is no conversation, or there is none for the split.
    """
    found = []
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {file}: {error}") from error
    for number, line in enumerate(lines, 1):
        if line.strip():
            found.append(_question(line, f"{file}:{number}"))
    chosen = [one for one in found if split_of(one) == split]
    if not chosen:
        raise DataError(f"{file} has no question for the {split} split", "A small file is split by content: add lines.")
    return chosen


def _question(line: str, where: str) -> Example:
    try:
        messages = parse_json(line)["messages"]
        turns = [{"role": str(turn["role"]), "content": str(turn["content"])} for turn in messages]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{where} is no conversation: {error}", 'Write {"messages": [{"role": "user", …}]}.') from error
    if turns and turns[-1]["role"] == "user":
        turns.append({"role": "assistant", "content": ""})
    if len(turns) < 2 or turns[-1]["role"] != "assistant":
        raise DataError(f"{where} asks nothing: it must end with a user's turn, or with an answer")
    return Example(tuple(turns))


def _asked(prompt: Sequence[Message], answer: str, reference: str) -> str:
    conversation = "\n".join(f"{message['role']}: {message.get('content') or ''}" for message in prompt)
    shown = f"\nA right answer, which may be worded otherwise:\n{reference}\n" if reference else ""
    return _ASK.format(conversation=conversation, answer=answer, reference=shown)
