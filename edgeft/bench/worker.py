"""The measuring process: `python -m edgeft.bench.worker` reads a `Job` from stdin, writes events as JSON lines."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator

from edgeft.bench.energy import Meter
from edgeft.bench.job import Answer, Event, Failed, Finished, Job, Loaded, to_json
from edgeft.bench.process import peak_bytes, status_bytes
from edgeft.chat import Sampling, TokenIds, Usage
from edgeft.errors import EdgeftError, UsageError
from edgeft.plugins import LoadOptions, Session

FILLER = "The lamp in the hall is on, the door is shut and it rains a little. "
_ATTEMPTS = 16
"""Answers that are begun to get the tokens asked for, from a model that ends early."""


def measure(job: Job) -> Iterator[Event]:
    """Raises: EdgeftError."""
    base = status_bytes("VmRSS")
    started = time.perf_counter()
    from edgeft.sessions import open_session

    options = LoadOptions(context=job.context, threads=job.threads, threads_batch=job.threads_batch)
    opened = open_session(job.model, job.runtime, options)
    with opened.session as session:
        seconds = time.perf_counter() - started
        yield Loaded(opened.runtime, seconds, session.context, base, status_bytes("RssAnon"))
        meter = Meter()
        text = _filler(session)
        if job.warm:
            answer(session, text[:16], 4, meter, 0)
        for asked, size in enumerate(job.prompts):
            count = _prompt_tokens(size, job.tokens, session.context)
            for repeat in range(job.repeats):
                # Another first token than the last prompt's, so that nothing of it is taken from the cache.
                at = 1 + (asked * job.repeats + repeat) % 32
                yield answer(session, text[at : at + count], job.tokens, meter, asked)
        yield Finished(peak_bytes(), meter.why_not)


def _filler(session: Session) -> TokenIds:
    """Tokens of an endless text, more than the context holds."""
    once = session.tokenize(FILLER)
    return once * (session.context // len(once) + 2 + 64 // len(once))


def _prompt_tokens(size: int, tokens: int, context: int) -> int:
    room = context - tokens - 1
    if room < 1 or size > room:
        raise UsageError(
            f"a prompt of {size} tokens and {tokens} more do not fit a context of {context}",
            "Take a longer --ctx or fewer --tokens.",
        )
    return size or room


def answer(session: Session, prompt: TokenIds, tokens: int, meter: Meter, asked: int) -> Answer:
    """Prompt and answer; when the model ends it, another one is begun after what is there."""
    said, gaps = list(prompt), list[float]()
    cost: Usage | None = None
    energy: list[float | None] = [None, None]
    meter.joules()
    for _ in range(_ATTEMPTS):
        last = 0.0
        for delta in session.generate(list(said), Sampling(max_tokens=tokens - len(gaps) + 1)):
            now = time.perf_counter()
            if delta.token is not None:
                said.append(delta.token)
                if last:
                    gaps.append(now - last)
                elif energy[0] is None:
                    energy[0] = meter.joules()
                last = now
            cost = cost or delta.usage
        if len(gaps) >= tokens or len(said) + 2 >= session.context:
            break
        said.append(prompt[0])
    energy[1] = meter.joules()
    assert cost is not None
    return Answer(asked, cost.prompt_tokens - cost.reused_tokens, cost.ttft_s, tuple(gaps), *energy)


def serve(say: Callable[[Event], None], text: str) -> int:
    try:
        job = Job(**{**(entry := json.loads(text)), "prompts": tuple(entry["prompts"])})
        for event in measure(job):
            say(event)
    except EdgeftError as error:
        say(Failed(error.message, error.hint, int(error.exit_code)))
        return 1
    return 0


def main() -> int:
    # Libraries write to descriptor 1 as they like: it becomes stderr, and events keep the real one.
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(event: Event) -> None:
        print(json.dumps(to_json(event)), file=out, flush=True)

    return serve(say, sys.stdin.read())


if __name__ == "__main__":
    sys.exit(main())
