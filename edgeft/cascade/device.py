"""The device's side of an answer: its text, its probabilities, and what else a policy may ask of it."""

from __future__ import annotations

import dataclasses
import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from edgeft.cascade.features import TOP, Token, features, token_of
from edgeft.chat import Cancel, Delta, Message, Sampling, Usage
from edgeft.plugins import Session

_ASK = (
    "Question:\n{question}\n\nProposed answer:\n{answer}\n\nIs the proposed answer correct? Reply with Yes or No only."
)


class DeviceAnswer:
    """One answer being made; holds the model until it is closed, or has ended."""

    def __init__(
        self,
        lock: threading.Lock,
        session: Session,
        messages: Sequence[Message],
        sampling: Sampling,
        cancel: Cancel,
        tools: Sequence[Mapping[str, Any]] | None = None,
        prefix: str = "",
    ) -> None:
        self._lock, self._session, self._sampling, self._cancel = lock, session, sampling, cancel
        self._messages, self._tools, self._prefix = messages, tools, prefix
        self._steps: Iterator[Delta] | None = None
        self._held = False
        self.tokens: list[Token] = []
        self.count = 0
        """Tokens decoded."""
        self.usage: Usage | None = None

    def _start(self) -> Iterator[Delta]:
        self._lock.acquire()
        self._held = True
        prompt = self._session.render(self._messages, self._tools)
        if self._prefix:
            prompt = [*prompt, *self._session.tokenize(self._prefix)]
        wanted = max(TOP, self._sampling.top_logprobs)
        return self._session.generate(prompt, dataclasses.replace(self._sampling, top_logprobs=wanted), self._cancel)

    def texts(self) -> Iterator[str]:
        """The text that is still to come."""
        if self._steps is None:
            self._steps = self._start()
        for delta in self._steps:
            self._note(delta)
            if delta.text:
                yield delta.text

    def read(self, limit: int) -> str:
        """Text of the first `limit` tokens; all of it for -1."""
        if self._steps is None:
            self._steps = self._start()
        text = ""
        for delta in self._steps:
            self._note(delta)
            text += delta.text
            if 0 < limit <= self.count:
                break
        return text

    def _note(self, delta: Delta) -> None:
        self.usage = delta.usage or self.usage
        if delta.token is not None:
            self.count += 1
        if (token := token_of(delta)) is not None:
            self.tokens.append(token)

    def close(self) -> None:
        if self._steps is not None and hasattr(self._steps, "close"):
            self._steps.close()
        if self._held:
            self._held = False
            self._lock.release()

    @property
    def confidence(self) -> float | None:
        return sum(token.logprob for token in self.tokens) / len(self.tokens) if self.tokens else None

    def features(self) -> dict[str, float]:
        ended = self.usage is not None
        cut = self.usage is not None and self.usage.finish_reason == "length"
        return features(self.tokens, question_of(self._messages), ended, cut)


def question_of(messages: Sequence[Message]) -> str:
    """Text of the last message; "" where there is none."""
    return str(messages[-1].get("content") or "") if messages else ""


def samples(session: Session, messages: Sequence[Message], sampling: Sampling, count: int, cancel: Cancel) -> list[str]:
    """So many more answers, sampled with temperature 0.7 at least; the model must be held by the caller."""
    found = []
    for number in range(count):
        how = dataclasses.replace(
            sampling, temperature=max(sampling.temperature, 0.7), seed=sampling.seed + number + 1, top_logprobs=0
        )
        prompt = session.render(messages)
        found.append("".join(delta.text for delta in session.generate(prompt, how, cancel)))
        if cancel:
            break
    return found


def p_true(session: Session, messages: Sequence[Message], answer: str, cancel: Cancel) -> float | None:
    """P(Yes) / (P(Yes) + P(No)) to the question whether an answer is right; None when neither is among the best."""
    asked = [{"role": "user", "content": _ASK.format(question=question_of(messages), answer=answer)}]
    how = Sampling(max_tokens=1, top_logprobs=20)
    yes = no = 0.0
    for delta in session.generate(session.render(asked), how, cancel):
        for token, logprob in delta.top_logprobs:
            word = session.detokenize([token]).strip().casefold()
            yes += math.exp(logprob) if word == "yes" else 0.0
            no += math.exp(logprob) if word == "no" else 0.0
    return yes / (yes + no) if yes + no > 0 else None
