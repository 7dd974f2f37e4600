"""What every runtime promises, whoever wrote it: the built-in ones are held to it here, and so can others be."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from tiny_gguf import ANSWER, chain_of, write_random, write_scripted

from edgeft import plugins
from edgeft.artifact import Artifact
from edgeft.chat import Cancel, Delta, Sampling, Usage
from edgeft.errors import ModelError, UsageError
from edgeft.plugins import LoadOptions, Session

ASK = [{"role": "user", "content": "hi"}]
LONG = "the quick brown fox jumps over the lazy dog; " * 8

REQUIRED = os.environ.get("EDGEFT_TEST_REQUIRE", "").split(",")
"""Runtimes that must not be skipped. Read here: tests themselves see no EDGEFT_ variables."""

Open = Callable[..., Session]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By kind of runtime and what the model does."""
    folder = tmp_path_factory.mktemp("models")
    chat = folder / "chat.echo.json"
    chat.write_text(json.dumps({"default": ANSWER}))
    slow = folder / "slow.echo.json"
    slow.write_text(json.dumps({"default": "word " * 400, "delay_ms": 5, "prompt_delay_ms": 2}))
    plain = folder / "plain.echo.json"
    plain.write_text(json.dumps({"chat": False}))
    endless = {token: {token + 1: 9.0} for token in range(ord("a"), ord("z"))} | {
        ord("z"): {ord("a"): 9.0},
        ord("\n"): {ord("a"): 9.0},
    }
    return {
        "echo": chat,
        "echo slow": slow,
        "echo plain": plain,
        "llama": write_scripted(folder / "chat.gguf", chain_of(ANSWER)),
        "llama slow": write_scripted(folder / "endless.gguf", endless),
        "llama plain": write_scripted(folder / "plain.gguf", chain_of(ANSWER), template=None),
        "llama random": write_random(folder / "random.gguf"),
    }


@pytest.fixture(params=["xllamacpp", "llama-cpp-python", "echo"])
def open_model(request: pytest.FixtureRequest, files: dict[str, Path]) -> Iterator[Open]:
    """Opens one of the models on one of the runtimes; sessions are closed in the end."""
    opened: list[Session] = []

    def open_(kind: str = "", **options: int) -> Session:
        family = "echo" if request.param == "echo" else "llama"
        artifact = Artifact(files.get(f"{family} {kind}".strip(), files["echo"]))
        runtime = plugins.load("runtimes", request.param)
        support = runtime.supports(artifact)
        if not support.ok and support.install and request.param not in REQUIRED:
            pytest.skip(f"{support.reason}: {support.install}")
        assert support.ok, support.reason
        opened.append(runtime.load(artifact, LoadOptions(**{"threads": 1, "threads_batch": 1, **options})))
        return opened[-1]

    yield open_
    for session in opened:
        session.close()


def answer(session: Session, sampling: Sampling | None = None, text: str = "hi") -> tuple[str, list[Delta], Usage]:
    deltas = list(session.generate(session.render([{"role": "user", "content": text}]), sampling or Sampling()))
    assert deltas[-1].usage is not None
    return "".join(delta.text for delta in deltas), deltas, deltas[-1].usage


# --- Streaming -------------------------------------------------------------------------


def test_the_answer_is_streamed_token_by_token_and_ends_with_usage(open_model: Open) -> None:
    session = open_model()
    text, deltas, usage = answer(session)
    assert text == ANSWER
    assert [delta.usage is None for delta in deltas] == [True] * (len(deltas) - 1) + [False]
    assert usage.completion_tokens == sum(delta.token is not None for delta in deltas) == len(ANSWER.encode())
    assert usage.prompt_tokens == len(session.render(ASK))
    assert usage.finish_reason == "stop"
    assert 0 <= usage.ttft_s < 5 and usage.decode_s >= 0


def test_a_character_is_shown_when_it_is_whole(open_model: Open) -> None:
    _, deltas, _ = answer(open_model())
    assert [delta.text for delta in deltas if delta.text] == list(ANSWER)


def test_an_answer_cut_inside_a_character_shows_that_something_was_cut(open_model: Open) -> None:
    text, _, usage = answer(open_model(), Sampling(max_tokens=len("Hé".encode()) + 2))
    assert text == "Hé�"
    assert usage.finish_reason == "length"


@pytest.mark.parametrize("most", [1, 3])
def test_the_answer_is_at_most_max_tokens_long(open_model: Open, most: int) -> None:
    _, _, usage = answer(open_model("slow"), Sampling(max_tokens=most))
    assert (usage.completion_tokens, usage.finish_reason) == (most, "length")


def test_greedy_answers_do_not_depend_on_the_seed(open_model: Open) -> None:
    session = open_model("random")
    assert answer(session, Sampling(max_tokens=8, seed=1))[0] == answer(session, Sampling(max_tokens=8, seed=2))[0]


def test_a_seed_fixes_a_sampled_answer(open_model: Open) -> None:
    hot = Sampling(max_tokens=12, temperature=2.0, top_k=0, top_p=1.0, min_p=0.0, seed=7)
    first = [delta.token for delta in answer(open_model("random"), hot)[1]]
    assert first == [delta.token for delta in answer(open_model("random"), hot)[1]]


@pytest.mark.parametrize(
    ("stop", "shown"),
    [(("!",), "Hé😀"), (("é😀",), "H"), (("😀?", "😀!"), "Hé"), (("Hé😀!!",), ANSWER), (("",), ANSWER)],
)
def test_a_stop_string_ends_the_answer_and_is_never_shown(open_model: Open, stop: tuple[str, ...], shown: str) -> None:
    text, deltas, usage = answer(open_model(), Sampling(stop=stop))
    assert text == shown
    assert not any(part in "".join(delta.text for delta in deltas) for part in stop if part)
    assert usage.finish_reason == "stop"


# --- Cancelling ------------------------------------------------------------------------


def test_a_thrown_switch_ends_an_answer_before_it_begins(open_model: Open) -> None:
    session, cancel = open_model(), Cancel()
    cancel.set()
    (last,) = session.generate(session.render(ASK), Sampling(), cancel)
    assert last.usage is not None and last.usage.finish_reason == "cancel" and last.usage.completion_tokens == 0
    assert answer(session)[0] == ANSWER


def test_cancelling_between_tokens_keeps_what_was_said(open_model: Open) -> None:
    session, cancel, said = open_model("slow"), Cancel(), []
    for delta in session.generate(session.render(ASK), Sampling(max_tokens=300), cancel):
        said.append(delta)
        if len(said) == 3:
            cancel.set()
    assert said[-1].usage is not None and said[-1].usage.finish_reason == "cancel"
    assert 3 <= said[-1].usage.completion_tokens <= 4
    again = list(session.generate(session.render(ASK), Sampling(max_tokens=3)))
    assert [delta.token for delta in again[:3]] == [delta.token for delta in said[:3]]


def test_another_thread_cancels_during_the_prompt(open_model: Open) -> None:
    session = open_model("slow", context=32768)
    prompt, cancel = session.tokenize("x" * 32000), Cancel()
    timer = threading.Timer(0.05, cancel.set)
    timer.start()
    (last,) = session.generate(prompt, Sampling(), cancel)
    timer.join()
    assert last.usage is not None
    assert (last.usage.finish_reason, last.usage.completion_tokens) == ("cancel", 0)
    assert answer(session, Sampling(max_tokens=2))[2].completion_tokens == 2


def test_a_reader_that_leaves_early_does_no_harm(open_model: Open) -> None:
    session = open_model()
    next(iter(session.generate(session.render(ASK), Sampling())))
    assert answer(session)[0] == ANSWER


# --- The prompt ------------------------------------------------------------------------


def test_the_next_turn_reads_only_what_is_new(open_model: Open) -> None:
    session = open_model()
    turn = [{"role": "user", "content": LONG}]
    first = list(session.generate(session.render(turn), Sampling()))[-1].usage
    turn += [{"role": "assistant", "content": ANSWER}, {"role": "user", "content": "and now?"}]
    second = list(session.generate(session.render(turn), Sampling()))[-1].usage
    assert first is not None and second is not None
    assert first.reused_tokens == 0
    # All of the first prompt, and all of the answer but its last token, which was never evaluated.
    assert second.reused_tokens >= first.prompt_tokens + first.completion_tokens - 1


def test_what_is_reused_does_not_change_the_answer(open_model: Open) -> None:
    session, fresh = open_model("random"), open_model("random")
    answer(session, Sampling(max_tokens=5), LONG + "first")
    reused = answer(session, Sampling(max_tokens=5), LONG + "second")
    assert reused[2].reused_tokens >= len(LONG)
    expected = answer(fresh, Sampling(max_tokens=5), LONG + "second")
    assert [delta.token for delta in reused[1]] == [delta.token for delta in expected[1]]


def test_the_same_prompt_again_is_evaluated_from_its_last_token(open_model: Open) -> None:
    session = open_model()
    answer(session)
    _, _, usage = answer(session)
    assert usage.reused_tokens == usage.prompt_tokens - 1


def test_a_prompt_that_does_not_fit_is_refused_with_both_numbers(open_model: Open) -> None:
    session = open_model(context=256)
    prompt = session.tokenize("x" * 300)
    with pytest.raises(ModelError, match=rf"{len(prompt)} tokens.*{session.context}"):
        list(session.generate(prompt, Sampling()))
    assert answer(session)[0] == ANSWER


def test_an_answer_ends_where_the_context_does(open_model: Open) -> None:
    session = open_model("slow", context=256)
    prompt = session.tokenize("x" * (session.context - 3) + "a")
    usage = list(session.generate(prompt, Sampling()))[-1].usage
    assert usage is not None and usage.finish_reason == "length"
    assert usage.completion_tokens == 3


def test_an_empty_prompt_is_refused(open_model: Open) -> None:
    with pytest.raises(UsageError, match="empty"):
        list(open_model().generate([], Sampling()))


def test_without_a_chat_template_nothing_is_guessed(open_model: Open) -> None:
    session = open_model("plain")
    with pytest.raises(ModelError, match="no chat template"):
        session.render(ASK)
    assert list(session.generate(session.tokenize("plain text"), Sampling(max_tokens=1)))


@pytest.mark.parametrize("text", ["", "plain", "naïve 😀 日本語", "a\nb\t  c", "\x00\x7f"])
def test_text_survives_its_tokens(open_model: Open, text: str) -> None:
    session = open_model()
    assert session.detokenize(session.tokenize(text)) == text


def test_control_tokens_become_nothing(open_model: Open) -> None:
    session = open_model()
    assert session.detokenize(session.render(ASK)).count("hi") == 1
    assert "<|" not in session.detokenize(session.render(ASK))


# --- Log-probabilities -----------------------------------------------------------------


def test_alternatives_come_most_probable_first_and_only_when_asked_for(open_model: Open) -> None:
    session = open_model("random")
    assert all(delta.logprob is None and not delta.top_logprobs for delta in answer(session)[1])
    for delta in answer(session, Sampling(max_tokens=4, top_logprobs=5))[1][:-1]:
        values = [logprob for _, logprob in delta.top_logprobs]
        assert len(values) == 5 and values == sorted(values, reverse=True)
        assert delta.logprob == pytest.approx(values[0]) and values[0] < 0


def test_more_alternatives_than_tokens_are_all_tokens(open_model: Open) -> None:
    session = open_model("random")
    delta = answer(session, Sampling(max_tokens=1, top_logprobs=10_000))[1][0]
    assert len(delta.top_logprobs) == session.vocabulary
    assert sum(np.exp(logprob) for _, logprob in delta.top_logprobs) == pytest.approx(1, abs=1e-4)


def test_scores_are_log_probabilities(open_model: Open) -> None:
    session = open_model("random")
    tokens = session.tokenize(LONG)
    scores = session.score(tokens)
    assert scores.shape == (len(tokens), session.vocabulary) and scores.dtype == np.float32
    np.testing.assert_allclose(np.exp(scores).sum(axis=1), 1, atol=1e-4)


@pytest.mark.parametrize("start", [1, 5, 100, 200, 300])
def test_scores_from_a_start_are_the_end_of_all_scores(open_model: Open, start: int) -> None:
    session = open_model("random")
    tokens = session.tokenize(LONG)
    np.testing.assert_allclose(session.score(tokens, start), session.score(tokens)[start:], atol=0.02)


def test_scores_do_not_depend_on_what_was_generated_before(open_model: Open) -> None:
    session, fresh = open_model("random"), open_model("random")
    answer(session, Sampling(max_tokens=20), LONG)
    tokens = session.tokenize(LONG[:99])
    np.testing.assert_allclose(session.score(tokens), fresh.score(tokens), atol=0.02)


def test_scores_agree_with_what_generating_reports(open_model: Open) -> None:
    session = open_model("random")
    prompt = session.render(ASK)
    first = next(iter(session.generate(prompt, Sampling(top_logprobs=1))))
    assert session.score(prompt)[-1][first.token] == pytest.approx(first.logprob, abs=0.02)


@pytest.mark.parametrize("batch", [1, 16, 100])
def test_small_batches_score_alike(open_model: Open, batch: int) -> None:
    session, usual = open_model("random", batch=batch), open_model("random")
    tokens = session.tokenize(LONG)
    np.testing.assert_allclose(session.score(tokens), usual.score(tokens), atol=0.02)


@pytest.mark.parametrize(("length", "start"), [(0, 0), (3, 3), (3, -1)])
def test_there_must_be_something_to_score(open_model: Open, length: int, start: int) -> None:
    with pytest.raises(UsageError, match="nothing to score"):
        open_model().score([65] * length, start)


def test_more_tokens_than_the_context_cannot_be_scored(open_model: Open) -> None:
    session = open_model(context=256)
    with pytest.raises(ModelError, match=rf"{session.context + 1} tokens.*{session.context}"):
        session.score([65] * (session.context + 1))


# --- The session -----------------------------------------------------------------------


def test_a_closed_session_says_so_and_can_be_closed_again(open_model: Open) -> None:
    session = open_model()
    prompt = session.render(ASK)
    session.close()
    session.close()
    with pytest.raises(ModelError, match="closed"):
        list(session.generate(prompt, Sampling()))
    with pytest.raises(ModelError, match="closed"):
        session.score(prompt)


def test_leaving_the_context_closes(open_model: Open) -> None:
    with open_model() as session:
        pass
    with pytest.raises(ModelError, match="closed"):
        session.render(ASK)


def test_a_missing_adapter_is_named(open_model: Open, tmp_path: Path) -> None:
    session = open_model()
    with pytest.raises(ModelError, match=r"missing\.gguf"):
        session.set_adapters([plugins.AdapterScale(tmp_path / "missing.gguf")])
    session.set_adapters([])
    assert answer(session)[0] == ANSWER
