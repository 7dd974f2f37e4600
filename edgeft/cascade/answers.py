"""Both sides' answers to a labelled set, asked once and kept: what tuning and reports are made of."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeft.cascade.cloud import Unanswered, estimate_tokens
from edgeft.cascade.device import DeviceAnswer, question_of
from edgeft.cascade.engine import Cascade
from edgeft.cascade.features import Token, features
from edgeft.cascade.judge import PASSES, Grader
from edgeft.cascade.types import Record
from edgeft.chat import Cancel, Message, Sampling
from edgeft.data.example import Example
from edgeft.errors import CheckFailed, DataError, Unreachable, UsageError
from edgeft.paths import parse_json
from edgeft.progress import Progress

if TYPE_CHECKING:
    from edgeft.cascade.embedder import Vector

JUDGES = ("auto", "exact", "contains", "model")

_LONGEST_TOKENS = 2
"""Tokens of the judge's that one of an answer may be: tokenizers differ."""


@dataclass(frozen=True)
class Case:
    """One example, answered by both sides."""

    key: str
    features: dict[str, float]
    tokens: tuple[Token, ...]
    """Those that are judged."""
    local_right: bool
    cloud_right: bool
    cost: float
    """Of the cloud's answer."""
    vector: Vector | None = field(default=None, compare=False)
    """Of the prompt, made anew whenever answers are read: none is kept."""


class AnswerFile:
    """JSON lines, one answer each, appended as they come: what was paid for is never asked again."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.found: dict[str, dict[str, Any]] = {}
        if path.is_file():
            for line in path.read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(ValueError, KeyError, TypeError):  # a line that a kill cut short
                    entry = parse_json(line)
                    self.found[entry["key"]] = entry

    def add(self, entry: dict[str, Any]) -> None:
        self.found[entry["key"]] = entry
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a+b") as stream:
            stream.seek(0, 2)
            if stream.tell() and _last_byte(stream) != b"\n":
                stream.write(b"\n")
            stream.write(json.dumps(entry, ensure_ascii=False).encode() + b"\n")


def _last_byte(stream: Any) -> bytes:
    stream.seek(-1, 2)
    last: bytes = stream.read(1)
    return last


@dataclass(frozen=True)
class Collector:
    """How a set is answered."""

    cascade: Cascade
    file: AnswerFile
    max_tokens: int
    judge: str = "auto"
    grader: Grader | None = None
    """Needed where `judge` is "model"."""

    def estimate(self, examples: Sequence[Example]) -> tuple[int, float]:
        """Requests that are still to be paid, grades among them, and what they cost at most."""
        cloud = self._cloud()
        missing = [one for one in examples if self._cloud_key(_prompt(one)) not in self.file.found]
        cost = sum(cloud.cost(estimate_tokens(_prompt(one)), self.max_tokens) for one in missing)
        grades, price = 0, 0.0
        if self.grader is not None:
            for one in examples:
                wanted = self._ungraded(one)
                grades += wanted
                price += wanted * self.grader.most(_prompt(one), _expected(one), _LONGEST_TOKENS * self.max_tokens)
        return len(missing) + grades, cost + price

    def _ungraded(self, example: Example) -> int:
        """Grades that may be needed: of both answers, where one is not known yet."""
        assert self.grader is not None
        prompt, found = _prompt(example), self.file.found
        keys = (self._local_key(prompt), self._cloud_key(prompt))
        texts = {found[key]["text"] if key in found else key for key in keys}
        known = {text for text in texts if self.grader.key(prompt, text, _expected(example)) in found}
        return len(texts - known)

    def collect(self, examples: Sequence[Example], max_cost: float | None, progress: Progress) -> list[Case]:
        """Answer what is not answered yet.

        Raises:
            UsageError: asking costs money and no limit was given.
            CheckFailed: it may cost more than the limit.
            Unreachable: the cloud did not answer; what was answered is kept.
            DataError: no example can be used.
        """
        usable = [one for one in examples if one.messages and not self.cascade.guard.pinned(_prompt(one))]
        if not usable:
            raise DataError("there is no conversation in the data that may leave the device")
        requests, cost = self.estimate(usable)
        if cost > 0 and max_cost is None:
            raise UsageError(f"{requests} requests cost up to {cost:.4f}", "Allow it: --max-cost AMOUNT.")
        if max_cost is not None and cost > max_cost:
            raise CheckFailed(f"{requests} requests cost up to {cost:.4f}, more than {max_cost:g}")
        progress.start("Answering on both sides", len(usable), "examples")
        try:
            cases = [self._case(one, progress) for one in usable]
        finally:
            progress.finish()
        return [case for case in cases if case is not None]

    def _case(self, example: Example, progress: Progress) -> Case | None:
        """None when the judge gave no grade."""
        local, cloud = self._local(_prompt(example)), self._remote(_prompt(example))
        right = [self._right(example, side["text"]) for side in (local, cloud)]
        progress.advance(1)
        if None in right:
            return None
        every = tuple(Token(entry[0], tuple(entry[1:])) for entry in local["tokens"])
        limit = self.cascade.settings.policy.judge_tokens
        judged = every[:limit] if limit > 0 else every
        ended = len(judged) == len(every)
        return Case(
            local["key"],
            features(judged, question_of(_prompt(example)), ended, ended and local["finish"] == "length"),
            judged,
            bool(right[0]),
            bool(right[1]),
            float(cloud["cost"]),
            self.cascade.vector(_prompt(example)),
        )

    def _right(self, example: Example, text: str) -> bool | None:
        expected = _expected(example)
        if self.grader is None:
            return is_right(expected, text, self.judge)
        if expected and is_right(expected, text, "auto"):
            return True  # nobody need be asked
        key = self.grader.key(_prompt(example), text, expected)
        if key not in self.file.found:
            grade, cost = self.grader.grade(_prompt(example), text, expected)
            self.file.add({"key": key, "grade": grade, "cost": cost})
        grade = self.file.found[key]["grade"]
        return None if grade is None else grade >= PASSES

    def _local_key(self, messages: Sequence[Message]) -> str:
        return _key("local", self.cascade.artifact_digest, self.max_tokens, messages)

    def _local(self, messages: Sequence[Message]) -> dict[str, Any]:
        key = self._local_key(messages)
        if key not in self.file.found:
            answer = DeviceAnswer(
                threading.Lock(), self.cascade.opened.session, messages, Sampling(max_tokens=self.max_tokens), Cancel()
            )
            began = time.monotonic()
            with contextlib.closing(answer):
                text = answer.read(-1)
            tokens = [[round(value, 4) for value in (token.logprob, *token.top)] for token in answer.tokens]
            finish = answer.usage.finish_reason if answer.usage else "stop"
            seconds = round(time.monotonic() - began, 3)
            self.file.add({"key": key, "text": text, "tokens": tokens, "finish": finish, "seconds": seconds})
        return self.file.found[key]

    def _remote(self, messages: Sequence[Message]) -> dict[str, Any]:
        key = self._cloud_key(messages)
        if key not in self.file.found:
            record = Record("", 0.0)
            how = Sampling(max_tokens=self.max_tokens)
            try:
                pieces = [text for _, text in self.cascade.clouds.ask(messages, how, Cancel(), record)]
            except Unanswered as failure:
                raise Unreachable(
                    f"the cloud did not answer ({failure.outcome})", "Try again: what was answered is kept."
                ) from failure
            self.file.add({"key": key, "text": "".join(pieces), "cost": record.cost, "tokens": record.cloud_tokens})
        return self.file.found[key]

    def _cloud(self) -> Any:
        if not self.cascade.settings.cloud:
            raise UsageError("the cascade has no endpoint")
        return self.cascade.settings.cloud[0]

    def _cloud_key(self, messages: Sequence[Message]) -> str:
        cloud = self._cloud()
        return _key("cloud", f"{cloud.name} {cloud.model}", self.max_tokens, messages)


def _expected(example: Example) -> str:
    """The reference; "" where there is none."""
    return str(example.messages[-1].get("content") or "")


def _prompt(example: Example) -> Sequence[Message]:
    return example.messages[:-1]


def _key(side: str, who: str, tokens: int, messages: Sequence[Message]) -> str:
    text = json.dumps([side, who, tokens, [dict(message) for message in messages]], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def is_right(expected: str, answer: str, judge: str) -> bool:
    """Whether an answer is the reference: the same text, the same JSON value, or one that has it in it."""
    wanted, given = " ".join(expected.split()), " ".join(answer.split())
    if judge == "contains":
        return wanted.casefold() in given.casefold()
    return wanted == given or (judge == "auto" and _same_json(wanted, given))


def _same_json(one: str, other: str) -> bool:
    try:
        return json.dumps(parse_json(one), sort_keys=True) == json.dumps(parse_json(other), sort_keys=True)
    except ValueError:
        return False
