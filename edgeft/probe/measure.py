"""The probe: synthetic models through the runtime that will run the real ones, and what follows from their times.

Numbers of a processor's data sheet, or of a copy in memory, say little about a kernel: which instructions a build of
llama.cpp uses, and whether it repacks weights, changes its speed several times over. So the kernels themselves are
timed, each with weights of its type, about as many bytes of them as a small model has.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from edgeft.bench.child import run
from edgeft.bench.job import Answer, Event, Finished, Job, Loaded
from edgeft.device import DeviceProfile
from edgeft.forecast.find import find_facts
from edgeft.probe.figures import TOKENS, Seen, Timing, profile
from edgeft.probe.machine import machine
from edgeft.probe.synthetic import Shape, narrow, sized, wide, write_model
from edgeft.progress import Progress

TYPES = ("Q4_0", "Q8_0", "F16", "Q4_K", "Q6_K", "Q5_0", "Q5_K", "Q4_1")
"""In order of importance: a slow machine does not get to the last ones."""
_SIZE = 80_000_000
"""Bytes of weights of each type: as a small model, and more than most last-level caches."""
_SHORT, _PROMPT, _REPEATS = 16, 128, 2
_SETTLE = 8
"""Tokens after a prompt that are not counted: threads that computed it are still in the way of those that decode."""
_PAST = 1536
"""So many tokens kept cost several times the noise, in a model of few layers too."""
_DEADLINE_S = 18.0
"""After so many seconds no further type is begun: the whole takes less than 30."""
_SETTLED = 0.03
"""More threads must be faster by this share: fewer leave more for others, and less to wait for."""


Start = Callable[[Job], Iterator[Event]]


class Bench:
    """Writes synthetic models into a folder and times them."""

    def __init__(self, folder: Path, runtime: str, start: Start = run) -> None:
        self.folder, self.runtime, self._start = folder, runtime, start

    def write(self, shape: Shape) -> Path:
        file = self.folder / f"{shape.type}-{shape.layers}-{shape.width}-{shape.vocabulary}.gguf"
        return file if file.exists() else write_model(file, shape)

    def time(self, shape: Shape, threads: int, prompts: tuple[int, ...] = (_PROMPT,)) -> Timing:
        """Raises: ModelError."""
        context = max(prompts) + 2 * TOKENS
        job = Job(str(self.write(shape)), self.runtime, context, threads, None, prompts, TOKENS, _REPEATS)
        return _timing(shape, list(self._start(job)))


def _timing(shape: Shape, events: Sequence[Event]) -> Timing:
    loaded = next(event for event in events if isinstance(event, Loaded))
    finished = next(event for event in events if isinstance(event, Finished))
    answers = [event for event in events if isinstance(event, Answer)]
    short, long = ([answer for answer in answers if answer.asked == at] for at in (0, answers[-1].asked))
    return Timing(
        shape=shape,
        runtime=loaded.runtime,
        begun=short[0].prompt_tokens,
        seconds=_token_seconds(short),
        past=long[0].prompt_tokens,
        past_seconds=_token_seconds(long),
        prompt_tps=max(answer.prompt_tokens / answer.ttft_s for answer in long),
        own_bytes=loaded.own_bytes,
        context=loaded.context,
        peak_bytes=finished.peak_bytes,
    )


def _token_seconds(answers: Sequence[Answer]) -> float:
    """The median token of the fastest answer: other programs make a machine slower, for a token or for a second."""
    return min(statistics.median(answer.gaps[_SETTLE:]) for answer in answers)


def probe(runtime: str, progress: Progress, start: Start = run) -> DeviceProfile:
    """Measure this machine; takes less than 30 s.

    Raises:
        MissingDependency: there is no such runtime.
        ModelError: it cannot run GGUF files.
        WriteError: no room for some 300 MB of temporary files.
    """
    began, found = time.monotonic(), machine()
    size = min(_SIZE, max(found.memory - found.in_use, 0) // 8)
    with tempfile.TemporaryDirectory(prefix="edgeft-probe-") as folder:
        bench = Bench(Path(folder), runtime, start)
        progress.start("Measuring", len(TYPES) + 1, "steps")
        sweep = _sweep(bench, sized(TYPES[0], size), found.cores)
        threads = _best_threads(sweep)
        progress.advance(1, "threads")
        small = bench.time(narrow(), threads, (_SHORT, _PAST))
        progress.advance(1, "small operations")
        timings: list[Timing] = []
        for type_ in TYPES:
            if not timings or time.monotonic() - began < _DEADLINE_S:
                timings.append(bench.time(sized(type_, size), threads))
            progress.advance(1, type_)
        small = _faster(small, bench.time(narrow(), threads, (_SHORT, _PAST)))
        broad = bench.time(wide(), threads, (_SHORT, _PAST)) if time.monotonic() - began < _DEADLINE_S else None
        seen = Seen(found, threads, sweep, small, timings, _storage(bench.write(sweep[threads].shape)), broad)
        measured = [small, *timings, *([broad] if broad else [])]
        facts = {each.shape: find_facts(str(bench.write(each.shape))) for each in measured}
    progress.finish()
    return profile(seen, facts)


def _sweep(bench: Bench, shape: Shape, cores: int) -> Mapping[int, Timing]:
    counts = sorted({1, *(2**power for power in range(1, 8) if 2**power < cores), cores})
    return {count: bench.time(shape, count, (_SHORT,)) for count in counts}


def _faster(one: Timing, other: Timing) -> Timing:
    """The two at once, each time as if nothing had been in the way: what hinders one run is gone in the other."""
    return replace(
        one,
        seconds=min(one.seconds, other.seconds),
        past_seconds=min(one.past_seconds, other.past_seconds),
        prompt_tps=max(one.prompt_tps, other.prompt_tps),
    )


def _best_threads(sweep: Mapping[int, Timing]) -> int:
    best = 1
    for count, timing in sweep.items():
        if timing.seconds < sweep[best].seconds * (1 - _SETTLED):
            best = count
    return best


def _storage(file: Path) -> float | None:
    """MB/s at which a file is read that is not in memory; None where the system cannot be told to forget it."""
    if not hasattr(os, "posix_fadvise"):
        return None
    with file.open("rb") as stream:
        os.fsync(stream.fileno())
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        started, size = time.perf_counter(), 0
        while block := stream.read(1 << 22):
            size += len(block)
    return size / 1e6 / (time.perf_counter() - started)
