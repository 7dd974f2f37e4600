"""Asking the endpoints, in order: retried where that helps, paid for, redacted, and left when nothing comes."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from edgeft.cascade.breaker import Breaker
from edgeft.cascade.budget import Budget, Reservation
from edgeft.cascade.hedge import Pace, Race
from edgeft.cascade.privacy import Guard, Redaction
from edgeft.cascade.settings import Cloud, ResilienceSettings, Settings
from edgeft.cascade.types import Attempt, Record
from edgeft.chat import Cancel, Message, Sampling
from edgeft.chat_completions import ChatClient, NotConnected, Refused, check_encrypted
from edgeft.errors import ConfigError, EdgeftError, ModelError, Unreachable

_BYTES_PER_TOKEN = 3
"""Fewer than tokenizers have on text (about 4): what is set aside from a budget is rather too much."""
_LONGEST_TOKEN = 64
"""Characters per token beyond which an answer is longer than was asked for."""
_REFUSED_KEY_S = 300.0


class Unanswered(Exception):
    """No endpoint gave an answer, or one broke off; `shown`: whether text of it was given on."""

    def __init__(self, outcome: str, detail: str = "", shown: bool = False) -> None:
        super().__init__(outcome)
        self.outcome, self.detail, self.shown = outcome, detail, shown


class _Failed(Unanswered):
    """One try; `wait_s`: seconds after which another can help, None: none can."""

    def __init__(self, outcome: str, detail: str, shown: bool, wait_s: float | None) -> None:
        super().__init__(outcome, detail, shown)
        self.wait_s = wait_s


@dataclass
class _Line:
    """One endpoint and what is known of it."""

    cloud: Cloud
    breaker: Breaker
    places: threading.BoundedSemaphore
    client: ChatClient | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)
    pace: Pace = field(default_factory=Pace)

    def connected(self) -> ChatClient:
        with self.lock:
            if self.client is None:
                self.client = ChatClient(self.cloud.endpoint())
            return self.client


class Clouds:
    """All endpoints of a cascade. Any thread."""

    def __init__(self, settings: Settings, budget: Budget, guard: Guard) -> None:
        self._resilience: ResilienceSettings = settings.resilience
        self._budget, self._guard = budget, guard
        for cloud in settings.cloud:
            check_encrypted(cloud.endpoint())
        self._lines = [
            _Line(cloud, Breaker(settings.resilience), threading.BoundedSemaphore(cloud.concurrency))
            for cloud in settings.cloud
        ]

    def close(self) -> None:
        for line in self._lines:
            if line.client is not None:
                line.client.close()

    def ask(
        self, messages: Sequence[Message], sampling: Sampling, cancel: Cancel, record: Record
    ) -> Iterator[tuple[str, str]]:
        """(endpoint, text) as it comes, with what was redacted put back; `record` gets attempts and costs.

        Raises:
            Unanswered: from every endpoint, or one after text was given on.
        """
        redaction = self._guard.redaction()
        sent = redaction.messages(messages)
        record.redacted = redaction.counts
        request = _Request(sent, redaction, sampling, cancel, record)
        if self._resilience.hedge_percentile and len(self._lines) > 1:
            yield from self._hedged(request)
            return
        last = Unanswered("no endpoint")
        for line in self._lines:
            try:
                yield from self._retried(line, request)
                return
            except Unanswered as failure:
                if failure.shown or cancel:
                    raise
                last = failure
        raise last

    def _hedged(self, request: _Request) -> Iterator[tuple[str, str]]:
        """As `ask`, with the next endpoint asked beside one that is slow to begin."""
        record, how = request.record, self._resilience
        own = {line.cloud.name: Record(record.id, record.at) for line in self._lines}
        starts = [
            lambda cancel, line=line: self._retried(
                line, replace(request, cancel=cancel, record=own[line.cloud.name], hedged=True)
            )
            for line in self._lines
        ]
        delay = self._lines[0].pace.unusual(how.hedge_percentile, how.hedge_s)
        author = ""
        pieces = Race(starts, delay, request.cancel).pieces()
        try:
            with contextlib.closing(_generator(pieces)):
                for author, text in pieces:
                    yield author, text
        finally:
            for name, part in own.items():
                _add(record, part, name == author)

    def _retried(self, line: _Line, request: _Request) -> Iterator[tuple[str, str]]:
        for number in range(line.cloud.retries + 1):
            try:
                yield from self._admitted(line, request)
                return
            except _Failed as failure:
                if failure.wait_s is None or failure.shown or number == line.cloud.retries:
                    raise
                # Full jitter: https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/
                wait = max(failure.wait_s, random.uniform(0, min(0.25 * 2**number, self._resilience.retry_wait_s)))
                if _left_waiting(request.cancel, wait):
                    raise

    def _admitted(self, line: _Line, request: _Request) -> Iterator[tuple[str, str]]:
        """One try, if circuit, places and budget let it. Raises: Unanswered."""
        name, record = line.cloud.name, request.record
        if why := line.breaker.admit():
            record.attempts.append(Attempt(name, why))
            raise Unanswered(why)
        if not line.places.acquire(timeout=self._resilience.queue_s):
            line.breaker.let_go()
            record.attempts.append(Attempt(name, "busy"))
            raise Unanswered("busy")
        try:
            yield from self._paid(line, request)
        finally:
            line.breaker.let_go()
            line.places.release()

    def _paid(self, line: _Line, request: _Request) -> Iterator[tuple[str, str]]:
        cloud, record = line.cloud, request.record
        prompt = estimate_tokens(request.sent)
        most = cloud.cost(prompt, request.sampling.max_tokens)
        held = request.spending.reserve(self._budget, most, prompt + request.sampling.max_tokens)
        if isinstance(held, str):
            record.attempts.append(Attempt(cloud.name, "budget", detail=held))
            raise Unanswered("budget", held)
        answer, outcome, detail, began = _Answer(), "left", "", time.monotonic()
        try:
            yield from self._tried(line, request, answer)
            outcome = "outrun" if request.hedged and request.cancel and not answer.shown else "answered"
        except _Failed as failure:
            outcome, detail = failure.outcome, failure.detail
            raise
        finally:
            sent, received = answer.tokens(prompt)
            money = cloud.cost(sent, received)
            request.spending.settle(self._budget, held, money, sent + received)
            record.cost += money
            record.cloud_tokens += sent + received
            record.attempts.append(Attempt(cloud.name, outcome, round(1000 * (time.monotonic() - began), 1), detail))
            if outcome == "answered":
                record.prompt_tokens, record.completion_tokens = sent, received

    def _tried(self, line: _Line, request: _Request, answer: _Answer) -> Iterator[tuple[str, str]]:
        restorer = request.redaction.restorer()
        try:
            client = line.connected()
            body = {"model": client.model(), "messages": request.sent, **request_fields(request.sampling, client)}
            request.record.left_device = True
            answer.sent = True
            with contextlib.closing(_generator(client.stream("/chat/completions", body, request.cancel))) as events:
                for event in events:
                    if text := restorer.push(answer.read(event)):
                        if not answer.shown:
                            line.pace.began(time.monotonic() - answer.began)
                        answer.shown = True
                        yield line.cloud.name, text
                    if len(answer.text) > _LONGEST_TOKEN * request.sampling.max_tokens:
                        answer.finish = "length"
                        break
            answer.check(bool(request.cancel))
        except EdgeftError as error:
            raise self._judge(line, error, answer) from None  # its text may repeat what was sent
        if answer.shown or not request.cancel:
            line.breaker.succeeded()
        else:
            line.pace.began(time.monotonic() - answer.began)
        if rest := restorer.flush():
            yield line.cloud.name, rest
        request.record.finish = "cancel" if request.cancel else "length" if answer.finish == "length" else "stop"

    def _judge(self, line: _Line, error: EdgeftError, answer: _Answer) -> _Failed:
        """What a failure means for the endpoint and for another try."""
        shown, breaker = answer.shown, line.breaker
        if isinstance(error, NotConnected):
            answer.sent = False
            breaker.offline()
            return _Failed("offline", "no connection", shown, None)
        if isinstance(error, Refused):
            answer.sent = False
            return self._refused(breaker, error, shown)
        if isinstance(error, ConfigError):
            answer.sent = False
            breaker.hold(_REFUSED_KEY_S, "key refused")
            return _Failed("key refused", "401 or 403", shown, None)
        breaker.failed()
        if isinstance(error, Unreachable):
            slow = "in time" in error.message
            return _Failed("timeout" if slow else "cut", "", shown, None if slow else 0.0)
        return _Failed("malformed", "", shown, 0.0 if isinstance(error, ModelError) else None)

    def _refused(self, breaker: Breaker, error: Refused, shown: bool) -> _Failed:
        wait = error.retry_after_s
        if wait is not None and wait > self._resilience.retry_wait_s:
            breaker.hold(min(wait, 3600.0), f"asked to wait ({error.status})")
            return _Failed(str(error.status), f"retry after {wait:g} s", shown, None)
        if error.status == 429:
            return _Failed("429", "", shown, wait or 0.0)
        breaker.failed()
        return _Failed(str(error.status), "", shown, wait or 0.0)


@dataclass(frozen=True)
class _Request:
    sent: list[dict[str, Any]]
    redaction: Redaction
    sampling: Sampling
    cancel: Cancel
    record: Record
    hedged: bool = False
    """Whether another endpoint may be asked the same meanwhile."""
    spending: _Spending = field(default_factory=lambda: _Spending())


class _Spending:
    """What one request has cost and has set aside, at all endpoints. Any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._money, self._tokens = 0.0, 0

    def reserve(self, budget: Budget, money: float, tokens: int) -> Reservation | str:
        with self._lock:
            held = budget.reserve(money, tokens, (self._money, self._tokens))
            if isinstance(held, Reservation):
                self._money, self._tokens = self._money + money, self._tokens + tokens
            return held

    def settle(self, budget: Budget, held: Reservation, money: float, tokens: int) -> None:
        with self._lock:
            budget.settle(held, money, tokens)
            self._money, self._tokens = self._money + money - held.money, self._tokens + tokens - held.tokens


def _add(record: Record, part: Record, winner: bool) -> None:
    """Put what one endpoint did and cost into the record of the whole request."""
    record.cost += part.cost
    record.cloud_tokens += part.cloud_tokens
    record.left_device |= part.left_device
    record.attempts += part.attempts
    if winner and part.attempts and part.attempts[-1].outcome == "answered":
        record.prompt_tokens, record.completion_tokens = part.prompt_tokens, part.completion_tokens
        record.finish = part.finish


class _Answer:
    """What the events of one try add up to."""

    def __init__(self) -> None:
        self.text = ""
        self.finish: str | None = None
        self.sent = False
        self.shown = False
        self.began = time.monotonic()
        self._pieces = 0
        self._usage: Mapping[str, Any] = {}

    def read(self, event: Mapping[str, Any]) -> str:
        """Text of one event. Raises: ModelError when it is not the protocol's."""
        try:
            usage = event.get("usage")
            self._usage = usage if isinstance(usage, dict) else self._usage
            pieces = []
            for choice in event.get("choices") or ():
                self.finish = choice.get("finish_reason") or self.finish
                content = (choice.get("delta") or choice.get("message") or {}).get("content") or ""
                if not isinstance(content, str):
                    raise TypeError("content is no text")
                pieces.append(content)
        except (AttributeError, TypeError) as error:
            raise ModelError(f"an event that is not the protocol's: {error}") from error
        text = "".join(pieces)
        self._pieces += bool(text)
        self.text += text
        return text

    def check(self, cancelled: bool) -> None:
        """Raises: Unreachable when the stream ended before the answer did; ModelError when there is none."""
        if cancelled:
            return
        if self.finish is None:
            raise Unreachable("the answer was cut off")
        if not self.text:
            raise ModelError("the answer is empty")

    def tokens(self, estimate: int) -> tuple[int, int]:
        """Prompt and completion tokens to pay for: what the endpoint says, else an estimate."""
        if not self.sent:
            return 0, 0
        return _count(self._usage, "prompt_tokens", estimate), _count(self._usage, "completion_tokens", self._pieces)


def _count(usage: Mapping[str, Any], name: str, otherwise: int) -> int:
    value = usage.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 10**9 else otherwise


def request_fields(sampling: Sampling, client: ChatClient) -> dict[str, Any]:
    """The sampling as chat completions have it; what they have no word for is left out."""
    fields: dict[str, Any] = {
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": sampling.temperature,
        "seed": sampling.seed,
        client.endpoint.max_tokens_field: sampling.max_tokens,
    }
    if sampling.temperature > 0:
        fields["top_p"] = sampling.top_p
    if sampling.stop:
        fields["stop"] = list(sampling.stop[:4])
    if sampling.json_schema is not None:
        schema = {"name": "answer", "strict": True, "schema": sampling.json_schema}
        fields["response_format"] = {"type": "json_schema", "json_schema": schema}
    return fields


def estimate_tokens(messages: Sequence[Mapping[str, Any]]) -> int:
    """An upper guess at the prompt's tokens."""
    return sum(8 + len(str(message.get("content") or "").encode()) // _BYTES_PER_TOKEN for message in messages)


def _left_waiting(cancel: Cancel, seconds: float) -> bool:
    """Wait; True when the reader left meanwhile."""
    gone = threading.Event()
    with cancel.calls(gone.set):
        return bool(cancel) or gone.wait(seconds)


def _generator(events: Iterator[Any]) -> Any:
    """An iterator that can be closed, which ends the request."""
    return events if hasattr(events, "close") else (event for event in events)
