"""A bench: every runtime with every number of threads and every context, what is finished kept on the way."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from edgeft.bench.child import run
from edgeft.bench.job import Answer, Event, Finished, Job, Loaded
from edgeft.errors import EdgeftError, UsageError
from edgeft.paths import parse_json, write_json
from edgeft.progress import Progress

START = 16
"""Tokens of the prompt after which decoding "at the start" is measured."""
PROMPT = 512
SCHEMA = 1


@dataclass(frozen=True)
class Spread:
    """Median, least and most of repeats."""

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values), len(values))


@dataclass(frozen=True)
class Measured:
    """One setting. Speeds in tokens per second, times in seconds."""

    runtime: str
    threads: int | None
    context: int
    prompt_tokens: int
    load_s: float
    prefill_tps: Spread
    ttft_s: Spread
    decode_tps: Spread
    """After a prompt of `START` tokens."""
    decode_full_tps: Spread
    """After the prompt."""
    gap_p50_s: float
    gap_p99_s: float
    """Between one token and the next, after the prompt."""
    peak_bytes: int | None
    prompt_joules: float | None = None
    """Per token of the prompt."""
    decode_joules: float | None = None
    """Per decoded token."""
    no_energy: str | None = None


@dataclass(frozen=True)
class Refused:
    """A setting that could not be measured, and why."""

    runtime: str
    threads: int | None
    context: int | None
    reason: str


Result = Measured | Refused


@dataclass(frozen=True)
class Settings:
    model: str
    runtimes: Sequence[str] = ("auto",)
    threads: Sequence[int | None] = (None,)
    contexts: Sequence[int | None] = (None,)
    """With one that is given the prompt fills it."""
    prompt: int | None = None
    tokens: int = 64
    repeats: int = 3

    def jobs(self) -> list[Job]:
        cells = itertools.product(self.runtimes, self.contexts, self.threads)
        return [self._job(*cell) for cell in cells]

    def _job(self, runtime: str, context: int | None, threads: int | None) -> Job:
        prompt = self.prompt or (PROMPT if context is None else 0)
        return Job(self.model, runtime, context, threads, None, (START, prompt), self.tokens, self.repeats)


@dataclass
class Book:
    """What was measured, in a file that grows with every setting; a later run takes up what it finds there."""

    file: Path | None
    model: dict[str, Any]
    """What the results are of: another file under the same name begins anew."""
    results: dict[str, dict[str, Any]] = field(default_factory=dict)

    def open(self) -> None:
        """Raises: UsageError when the file is there and is none of ours."""
        if self.file is None or not self.file.is_file():
            return
        try:
            found = parse_json(self.file.read_text(encoding="utf-8"))
            if found["schema"] == SCHEMA and found["model"] == self.model:
                self.results = found["results"]
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{self.file} is no result of edgeft bench", "Choose another --out.") from error

    def find(self, job: Job) -> Measured | None:
        entry = self.results.get(_key(job))
        return _measured(entry) if entry else None

    def keep(self, job: Job, result: Measured) -> None:
        """Raises: WriteError."""
        self.results[_key(job)] = asdict(result)
        if self.file is not None:
            write_json(self.file, {"schema": SCHEMA, "model": self.model, "results": self.results})


def _key(job: Job) -> str:
    return " ".join(f"{name}={value}" for name, value in job.as_dict().items() if name != "model")


def _measured(entry: dict[str, Any]) -> Measured:
    values: dict[str, Any] = {
        key: Spread(**value) if isinstance(value, dict) else value for key, value in entry.items()
    }
    return Measured(**values)


def bench(
    settings: Settings, book: Book, progress: Progress, start: Callable[[Job], Iterator[Event]] = run
) -> Iterator[Result]:
    """Each setting as it is done. One that fails is a `Refused` unless it is the only one.

    Raises:
        EdgeftError: there is one setting only, and it fails.
    """
    jobs = settings.jobs()
    progress.start("Measuring", len(jobs), "settings")
    for job in jobs:
        result: Result | None = book.find(job)
        if result is None:
            try:
                result = summed(job, list(start(job)))
                book.keep(job, result)
            except EdgeftError as error:
                if len(jobs) == 1:
                    raise
                result = Refused(job.runtime, job.threads, job.context, error.message)
        progress.advance(1, job.runtime)
        yield result
    progress.finish()


def summed(job: Job, events: Sequence[Event]) -> Measured:
    loaded = next(event for event in events if isinstance(event, Loaded))
    finished = next(event for event in events if isinstance(event, Finished))
    start, full = ([event for event in events if isinstance(event, Answer) and event.asked == at] for at in (0, 1))
    gaps = sorted(gap for answer in full for gap in answer.gaps)
    return Measured(
        runtime=loaded.runtime,
        threads=job.threads,
        context=loaded.context,
        prompt_tokens=full[0].prompt_tokens,
        load_s=loaded.seconds,
        prefill_tps=Spread.of([answer.prompt_tokens / answer.ttft_s for answer in full]),
        ttft_s=Spread.of([answer.ttft_s for answer in full]),
        decode_tps=decoded(start),
        decode_full_tps=decoded(full),
        gap_p50_s=statistics.median(gaps),
        gap_p99_s=gaps[min(len(gaps) - 1, len(gaps) * 99 // 100)],
        peak_bytes=finished.peak_bytes,
        prompt_joules=_mean((answer.prompt_joules, answer.prompt_tokens) for answer in full),
        decode_joules=_mean((answer.decode_joules, len(answer.gaps)) for answer in full),
        no_energy=finished.no_energy,
    )


def decoded(answers: Sequence[Answer]) -> Spread:
    """Tokens per second of each answer."""
    return Spread.of([len(answer.gaps) / sum(answer.gaps) for answer in answers])


def _mean(pairs: Iterator[tuple[float | None, int]]) -> float | None:
    """Joules per token over all answers."""
    known = [(joules, tokens) for joules, tokens in pairs if joules is not None]
    return sum(joules for joules, _ in known) / sum(tokens for _, tokens in known) if known else None
