"""Several answers at a time: as right as alone, apart from each other, computed together."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_gguf
from edgeft.runtimes.llama_slots import Rows
from tiny_gguf import chain_of, write_adapter, write_babbler, write_random, write_scripted

from edgeft import plugins
from edgeft.artifact import Artifact
from edgeft.chat import Cancel, Delta, Sampling
from edgeft.errors import EdgeftError, ModelError, UsageError
from edgeft.plugins import AdapterScale, LoadOptions, Session, streams

REQUIRED = os.environ.get("EDGEFT_TEST_REQUIRE", "").split(",")
QUESTIONS = [f"question {number} " * (1 + 7 * (number % 3)) for number in range(12)]

Load = Callable[..., Session]


def loading(name: str) -> Iterator[Load]:
    opened: list[Session] = []

    def load(path: Path, **options: Any) -> Session:
        runtime = plugins.load("runtimes", name)
        if not runtime.ready().ok and name not in REQUIRED:
            pytest.skip(f"{name} is not installed")
        how = LoadOptions(**{"context": 512, "threads": 1, "threads_batch": 1, "parallel": 4, **options})
        opened.append(runtime.load(Artifact(path), how))
        return opened[-1]

    yield load
    for session in opened:
        session.close()


@pytest.fixture(params=["xllamacpp", "llama-cpp-python"])
def load(request: pytest.FixtureRequest) -> Iterator[Load]:
    yield from loading(request.param)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random(tmp_path_factory.mktemp("random") / "random.gguf")


def ask(session: Session, text: str, cancel: Cancel | None = None, **sampling: Any) -> list[Delta]:
    how = Sampling(**{"max_tokens": 40, **sampling})
    return list(session.generate(session.render([{"role": "user", "content": text}]), how, cancel))


def text_of(deltas: Sequence[Delta]) -> str:
    return "".join(delta.text for delta in deltas)


def together(session: Session, questions: Sequence[str], **sampling: Any) -> list[str]:
    with ThreadPoolExecutor(len(questions)) as pool:
        return list(pool.map(lambda question: text_of(ask(session, question, **sampling)), questions))


def wait_until(true: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many answers had a part in each batch."""
    seen: list[int] = []
    fill = Rows.fill

    def counted(rows: Rows, parts: Any) -> Any:
        seen.append(len(parts))
        return fill(rows, parts)

    monkeypatch.setattr(Rows, "fill", counted)
    return seen


# --- As right as alone ----------------------------------------------------------------


@pytest.mark.parametrize("sampling", [{}, {"repeat_penalty": 1.3}])
def test_answers_made_together_are_those_made_alone(
    load: Load, model: Path, batches: list[int], sampling: dict[str, Any]
) -> None:
    alone = load(model, parallel=1)
    expected = [text_of(ask(alone, question, **sampling)) for question in QUESTIONS]
    assert len(set(expected)) > 8
    session = load(model)
    assert streams(session) == 4 and session.context == alone.context
    for _ in range(3):  # the second time, prompts are in the cache of one slot or another
        found = together(session, QUESTIONS, **sampling)
        # Sums are rounded in another order in another batch: once in some hundred answers two tokens are that near.
        assert sum(one != other for one, other in zip(found, expected, strict=True)) <= 1
    assert max(batches) == 4


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_log_probabilities_are_those_of_ones_own_text(load: Load, model: Path, temperature: float) -> None:
    """Exactly the same text cannot be asked of sampling: sums are rounded in another order in another batch."""
    session, alone = load(model), load(model, parallel=1)
    sampling = Sampling(max_tokens=40, temperature=temperature, top_logprobs=3)
    prompts = [session.render([{"role": "user", "content": question}]) for question in QUESTIONS]
    with ThreadPoolExecutor(len(prompts)) as pool:
        found = list(pool.map(lambda prompt: list(session.generate(prompt, sampling))[:-1], prompts))
    for prompt, deltas in zip(prompts, found, strict=True):
        tokens = [delta.token for delta in deltas if delta.token is not None]
        rows = alone.score([*prompt, *tokens[:-1]], len(prompt) - 1)
        expected = [float(row[token]) for row, token in zip(rows, tokens, strict=False)]
        assert [delta.logprob for delta in deltas] == pytest.approx(expected, abs=0.02)


def test_a_schema_binds_its_own_answer_only(load: Load, tmp_path: Path) -> None:
    session = load(write_babbler(tmp_path / "b.gguf", **{'"': 4.0}))
    schemas: list[dict[str, Any] | None] = [{"const": "one"}, None, {"const": "two"}, None]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda schema: text_of(ask(session, "x", json_schema=schema)), schemas))
    assert [json.loads(found[0]), json.loads(found[2])] == ["one", "two"]
    assert len(found[1]) == len(found[3]) == 40


def test_a_long_prompt_is_cut_into_batches_beside_those_who_write(load: Load, model: Path, batches: list[int]) -> None:
    long = "a long text " * 35
    alone = load(model, parallel=1, context=1024)
    expected = text_of(ask(alone, long))
    session = load(model, context=1024, batch=64)
    writing = session.generate(session.render([{"role": "user", "content": "hi"}]), Sampling(max_tokens=500))
    next(writing)
    batches.clear()
    assert text_of(ask(session, long)) == expected
    assert batches.count(2) > 40


# --- Slots ------------------------------------------------------------------------------


def test_what_a_slot_has_cached_is_not_computed_again(load: Load, model: Path) -> None:
    session = load(model)
    together(session, QUESTIONS[:4])
    last = ask(session, QUESTIONS[2])[-1].usage
    assert last and last.reused_tokens == last.prompt_tokens - 1
    other = ask(session, QUESTIONS[2] + "and more")[-1].usage
    assert other and 0 < other.reused_tokens < other.prompt_tokens - 1


def test_every_answer_has_a_context_of_its_own(load: Load, tmp_path: Path) -> None:
    session = load(write_babbler(tmp_path / "endless.gguf", a=20.0), context=256)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda question: ask(session, question, max_tokens=999), QUESTIONS[:4]))
    for usage in [deltas[-1].usage for deltas in found]:
        assert usage and usage.finish_reason == "length"
        assert usage.prompt_tokens + usage.completion_tokens == 257  # the last token is not evaluated
    with pytest.raises(ModelError, match="the context holds 256"):
        ask(session, "x" * 300)


def test_more_than_there_are_slots_wait_for_their_turn(load: Load, model: Path) -> None:
    session = load(model, parallel=2)
    alone = load(model, parallel=1)
    assert together(session, QUESTIONS) == [text_of(ask(alone, question)) for question in QUESTIONS]


# --- Leaving ----------------------------------------------------------------------------


def test_one_who_leaves_does_not_disturb_the_others(load: Load, model: Path) -> None:
    alone = load(model, parallel=1)
    expected = text_of(ask(alone, QUESTIONS[0], max_tokens=300))
    session = load(model)
    cancels = [Cancel() for _ in range(3)]
    with ThreadPoolExecutor(4) as pool:
        whole = pool.submit(ask, session, QUESTIONS[0], max_tokens=300)
        others = [
            pool.submit(ask, session, QUESTIONS[n + 1], cancel, max_tokens=450) for n, cancel in enumerate(cancels)
        ]
        for cancel in cancels:
            cancel.set()
        assert text_of(whole.result()) == expected
        for other in others:
            usage = other.result()[-1].usage
            assert usage and usage.finish_reason == "cancel"


def test_an_answer_left_half_read_gives_its_slot_back(load: Load, model: Path) -> None:
    session = load(model, parallel=2)
    for _ in range(6):
        for _ in session.generate(session.render([{"role": "user", "content": "hi"}]), Sampling(max_tokens=400)):
            break
    assert len(text_of(ask(session, "hi", max_tokens=5))) > 0
    wait_until(lambda: all(slot.free for slot in session._slots))  # type: ignore[attr-defined]


def test_a_switch_thrown_before_or_in_the_queue_ends_the_wait(load: Load, model: Path) -> None:
    session = load(model, parallel=2)
    thrown = Cancel()
    thrown.set()
    usage = ask(session, "hi", thrown)[-1].usage
    assert usage and (usage.finish_reason, usage.completion_tokens) == ("cancel", 0)
    writing = [session.generate(session.tokenize(text), Sampling(max_tokens=400)) for text in "ab"]
    for stream in writing:
        next(stream)
    waiting, cancel = [], Cancel()
    thread = threading.Thread(target=lambda: waiting.extend(ask(session, "third", cancel)))
    thread.start()
    wait_until(lambda: bool(session._waiting) or bool(waiting))  # type: ignore[attr-defined]
    cancel.set()
    thread.join(20)
    assert waiting and waiting[-1].usage and waiting[-1].usage.finish_reason in ("cancel", "length")


def test_a_session_that_is_closed_leaves_nobody_waiting(load: Load, model: Path) -> None:
    session = load(model, context=2048)
    ended: list[str] = []

    def read(text: str) -> None:
        try:
            ask(session, text, max_tokens=100_000)
        except EdgeftError as error:
            ended.append(error.message)

    threads = [threading.Thread(target=read, args=(text,)) for text in QUESTIONS[:6]]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(session._running) == 4)  # type: ignore[attr-defined]
    session.close()
    for thread in threads:
        thread.join(20)
    assert len(ended) == 6 and all("is closed" in message for message in ended)
    session.close()


def test_who_asks_while_a_session_closes_is_told_so(load: Load, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = load(model)
    monkeypatch.setattr(session, "_closing", True)  # close() has begun; its thread has not ended yet
    with pytest.raises(ModelError, match="is closed"):
        ask(session, "hi")
    monkeypatch.undo()
    assert ask(session, "hi", max_tokens=3)


# --- Adapters, and what cannot be ------------------------------------------------------------


def test_adapters_change_between_answers_and_never_during_one(load: Load, tmp_path: Path) -> None:
    model = write_scripted(tmp_path / "base.gguf", chain_of("a"))
    a, b = np.zeros((1, 288), np.float32), np.zeros((tiny_gguf.VOCABULARY, 1), np.float32)
    a[0, ord("\n")], b[ord("b"), 0] = 1, 20
    adapter = write_adapter(tmp_path / "b.gguf", "output.weight", a, b, alpha=1)
    session = load(model)
    assert together(session, ["x"] * 4, max_tokens=1) == ["a"] * 4
    session.set_adapters([AdapterScale(adapter)])
    assert together(session, ["x"] * 4, max_tokens=1) == ["b"] * 4  # nothing of the base is reused
    session.set_adapters([])
    assert together(session, ["x"] * 4, max_tokens=1) == ["a"] * 4


def test_adapters_wait_for_nobody_who_writes(load: Load, model: Path) -> None:
    session = load(model, context=2048)
    stream = session.generate(session.tokenize("a"), Sampling(max_tokens=2000))
    next(stream)
    with pytest.raises(UsageError, match="while answers are being written"):
        session.set_adapters([])
    stream.close()  # type: ignore[attr-defined]
    session.set_adapters([])


def test_what_takes_one_answer_at_a_time_is_refused(load: Load, model: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not score"):
        load(model).score([1, 2])
    with pytest.raises(UsageError, match="do not fit a batch"):
        load(model, batch=2)
    with pytest.raises(UsageError, match="one answer at a time"):
        load(model, state=tmp_path)


# --- Other runtimes ------------------------------------------------------------------------


def test_a_llama_server_of_our_own_has_as_many_slots(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("xllamacpp")
    program = tmp_path / "llama-server"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} {Path(__file__).parent / "llama_server_program.py"} "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("EDGEFT_LLAMA_SERVER", str(program))
    for one in loading("xllamacpp"):
        alone = one(model, parallel=1)
        expected = [text_of(ask(alone, question)) for question in QUESTIONS[:8]]
    for many in loading("llama-server"):
        session = many(model)
        assert streams(session) == 4 and session.context == 512
        assert together(session, QUESTIONS[:8]) == expected
