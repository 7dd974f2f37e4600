"""The promises of a runtime as a test suite; needs pytest. A runtime of your own is held to them like this:

    from edgeft.testing import RuntimeConformance, Subject

    class TestShout(RuntimeConformance):
        @pytest.fixture(scope="class")
        def subject(self, tmp_path_factory):
            ...
            return Subject("shout", Artifact(model))

What a runtime cannot do it declares in `lacks` (`edgeft.plugins.Capability` -> why). Nothing is skipped for that: what
is declared missing must be refused with an error that says so, and what is not declared missing must work.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from edgeft import plugins
from edgeft.artifact import Artifact, size_of
from edgeft.chat import Cancel, Delta, Message, Sampling, TokenIds, Usage
from edgeft.errors import EdgeftError, ModelError, UsageError
from edgeft.overflow import fit
from edgeft.plugins import AdapterScale, Capability, LoadOptions, Runtime, Session, capabilities

ASK: list[Message] = [{"role": "user", "content": "hi"}]
_SOME = Sampling(max_tokens=16)
_HOT = Sampling(max_tokens=16, temperature=2.0, top_k=0, top_p=1.0, min_p=0.0)


@dataclass(frozen=True)
class Subject:
    """A runtime and the models it is tried on. The model's answers must have 16 tokens at least."""

    runtime: str | Runtime
    """A registered name, or the runtime itself."""
    artifact: Artifact
    options: LoadOptions = field(default_factory=lambda: LoadOptions(context=1024, threads=1, threads_batch=1))
    prompt: TokenIds | None = None
    """What the model's own template and tokenizer make of ASK, by another implementation."""
    answer: str | None = None
    """The beginning of the greedy answer to ASK, by another implementation."""
    plain: Artifact | None = None
    """A model without a chat template. Needed unless the runtime lacks "raw"."""
    damaged: Artifact | None = None
    """A file that looks right and is not."""
    adapter: Path | None = None
    """Fits the model and changes its answers. Needed unless the runtime lacks "adapters"."""
    decided: bool = False
    """The model is so sure that no sampling that the runtime allows would change its mind."""
    tolerance: float = 0.02
    """How far log-probabilities (nats) of the same thing computed in batches of other sizes may lie apart."""

    @property
    def plugin(self) -> Runtime:
        found: Runtime = plugins.load("runtimes", self.runtime) if isinstance(self.runtime, str) else self.runtime
        return found

    def can(self, what: Capability) -> bool:
        return what in capabilities(self.plugin)

    def open(self, artifact: Artifact | None = None, **changes: Any) -> Session:
        return self.plugin.load(artifact or self.artifact, replace(self.options, **changes))


@dataclass(frozen=True)
class Answer:
    deltas: list[Delta]

    @property
    def text(self) -> str:
        return "".join(delta.text for delta in self.deltas)

    @property
    def tokens(self) -> list[int]:
        return [delta.token for delta in self.deltas if delta.token is not None]

    @property
    def usage(self) -> Usage:
        assert self.deltas[-1].usage is not None, "the last delta has no usage"
        return self.deltas[-1].usage


def ask(session: Session, sampling: Sampling = _SOME, *, text: str = "hi", cancel: Cancel | None = None) -> Answer:
    """The whole answer to one user message."""
    prompt = session.render([{"role": "user", "content": text}])
    return Answer(list(session.generate(prompt, sampling, cancel)))


class RuntimeConformance:
    """Subclass it and give it a `subject`."""

    @pytest.fixture(scope="class")
    def subject(self) -> Subject:
        raise NotImplementedError("a subclass says what is tested")

    @pytest.fixture
    def session(self, subject: Subject) -> Iterator[Session]:
        with subject.open() as session:
            yield session

    # --- The runtime ----------------------------------------------------------

    def test_it_says_yes_to_its_model_and_no_to_others_with_a_reason(self, subject: Subject, tmp_path: Path) -> None:
        assert subject.plugin.supports(subject.artifact).ok, subject.plugin.supports(subject.artifact).reason
        (tmp_path / "x.unknown").write_bytes(b"nothing that runs")
        support = subject.plugin.supports(Artifact(tmp_path / "x.unknown"))
        assert not support.ok and support.reason and support.install is None

    def test_what_it_lacks_has_a_name_and_a_reason(self, subject: Subject) -> None:
        lacks = getattr(subject.plugin, "lacks", {})
        assert set(lacks) <= plugins.CAPABILITIES and all(lacks.values())

    def test_a_damaged_model_is_an_error_that_names_it(self, subject: Subject) -> None:
        if subject.damaged is None:
            pytest.skip("the subject has no damaged model")
        with pytest.raises(EdgeftError) as raised, subject.open(subject.damaged) as session:
            ask(session)
        assert (subject.damaged.address or subject.damaged.path.name) in raised.value.message

    # --- Streaming --------------------------------------------------------------

    def test_the_answer_is_streamed_and_ends_with_usage(self, subject: Subject, session: Session) -> None:
        answer = ask(session)
        assert [delta.usage is None for delta in answer.deltas] == [True] * (len(answer.deltas) - 1) + [False]
        assert all(delta.token is not None for delta in answer.deltas[:-1]) and answer.deltas[-1].token is None
        assert (answer.usage.finish_reason, answer.usage.completion_tokens) == ("length", 16)
        assert answer.usage.ttft_s > 0 and answer.usage.decode_s > 0 and answer.usage.prompt_tokens > 0
        assert len(answer.text) > 0
        if subject.can("tokens"):
            assert len(answer.tokens) == 16
            assert answer.usage.prompt_tokens == len(session.render(ASK))

    def test_tokens_come_one_by_one_while_the_model_computes(self, session: Session) -> None:
        began, seen = time.perf_counter(), []
        for _ in session.generate(session.render(ASK), replace(_SOME, max_tokens=64)):
            seen.append(time.perf_counter() - began)
        assert seen[0] < 0.9 * seen[-1]

    @pytest.mark.parametrize("most", [1, 3])
    def test_the_answer_is_at_most_max_tokens_long(self, session: Session, most: int) -> None:
        usage = ask(session, Sampling(max_tokens=most)).usage
        assert (usage.completion_tokens, usage.finish_reason) == (most, "length")

    def test_a_stop_string_ends_the_answer_and_is_never_shown(self, session: Session) -> None:
        whole = ask(session).text
        middle = len(whole) // 2
        for stop in (whole[middle], whole[middle : middle + 3]):
            answer = ask(session, replace(_SOME, stop=("\0never\0", stop)))
            assert answer.text == whole[: whole.find(stop)]
            assert answer.usage.finish_reason == "stop"

    def test_a_stop_string_that_does_not_come_changes_nothing(self, session: Session) -> None:
        whole = ask(session).text
        assert ask(session, replace(_SOME, stop=(whole[-2:] + "\0", ""))).text == whole

    def test_greedy_answers_repeat_whatever_the_seed(self, session: Session) -> None:
        first = ask(session, replace(_SOME, seed=1))
        assert [ask(session, replace(_SOME, seed=seed)).text for seed in (1, 2)] == [first.text] * 2

    def test_a_seed_fixes_a_sampled_answer(self, subject: Subject, session: Session) -> None:
        if not subject.can("seeds"):
            refused(UsageError, lambda: ask(session, replace(_HOT, seed=7)))
            return
        first = ask(session, _sampled(subject, 7)).text
        with subject.open() as other:
            assert ask(other, _sampled(subject, 7)).text == first

    def test_other_seeds_give_other_answers(self, subject: Subject, session: Session) -> None:
        if subject.can("seeds") and not subject.decided:
            answers = {ask(session, _sampled(subject, seed)).text for seed in range(6)}
            assert len(answers) > 1

    # --- Cancelling ---------------------------------------------------------------

    def test_a_thrown_switch_ends_an_answer_before_it_begins(self, session: Session) -> None:
        before, cancel = ask(session), Cancel()
        cancel.set()
        answer = ask(session, cancel=cancel)
        assert (answer.usage.finish_reason, answer.usage.completion_tokens) == ("cancel", 0)
        assert ask(session).text == before.text

    def test_cancelling_between_tokens_keeps_what_was_said(self, session: Session) -> None:
        before, cancel, said = ask(session).text, Cancel(), []
        for delta in session.generate(session.render(ASK), replace(_SOME, max_tokens=500), cancel):
            said.append(delta)
            if len(said) == 3:
                cancel.set()
        answer = Answer(said)
        assert answer.usage.finish_reason == "cancel" and 3 <= answer.usage.completion_tokens <= 5
        assert before.startswith(answer.text.rstrip("\N{REPLACEMENT CHARACTER}"))
        assert ask(session).text == before

    def test_another_thread_cancels_during_the_prompt(self, subject: Subject) -> None:
        with subject.open() as session:
            text = long_text(subject, session)
            whole = ask(session, replace(_SOME, max_tokens=1), text=text).usage.ttft_s
        for share in (0.3, 0.15, 0.05):  # a busy machine may be faster the second time
            with subject.open() as session:
                cancel, began = Cancel(), time.perf_counter()
                timer = threading.Timer(whole * share, cancel.set)
                timer.start()
                usage = ask(session, text=text, cancel=cancel).usage
                took = time.perf_counter() - began
                timer.join()
                early = whole < 0.5 or took < 0.9 * whole  # what is short cannot be timed on a busy machine
                if early and (usage.finish_reason, usage.completion_tokens) == ("cancel", 0):
                    assert ask(session).usage.completion_tokens == 16
                    return
        pytest.fail(f"a prompt phase of {whole:.2f} s could not be cancelled")

    def test_a_stream_that_is_left_changes_nothing(self, session: Session) -> None:
        before = ask(session).text
        left = session.generate(session.render(ASK), _SOME)
        next(left)
        assert ask(session).text == before
        with pytest.raises(UsageError, match="something else"):
            next(left)
        del left
        gc.collect()
        assert ask(session).text == before

    # --- The prompt -----------------------------------------------------------------

    def test_the_models_own_template_makes_the_prompt(self, subject: Subject, session: Session) -> None:
        if subject.prompt is None:
            pytest.skip("the subject does not say what its template makes of ASK")
        if subject.can("tokens"):
            assert session.render(ASK) == subject.prompt
        assert ask(session).usage.prompt_tokens == len(subject.prompt)

    def test_the_answer_is_the_models(self, subject: Subject, session: Session) -> None:
        if subject.answer is None:
            pytest.skip("the subject does not say what its model answers")
        assert ask(session).text == subject.answer[: len(ask(session).text)] != ""

    def test_without_a_chat_template_nothing_is_guessed(self, subject: Subject, session: Session) -> None:
        if not subject.can("raw"):
            refused(UsageError, lambda: list(session.generate(session.tokenize("plain text"), _SOME)))
            return
        assert subject.plain is not None, "the subject needs a model without a chat template"
        with subject.open(subject.plain) as plain:
            with pytest.raises(ModelError, match="no chat template"):
                plain.render(ASK)
            assert list(plain.generate(plain.tokenize("plain text", bos=True), Sampling(max_tokens=1)))

    def test_text_survives_its_tokens(self, session: Session) -> None:
        for text in ("", "plain", "naïve 😀 日本語", "a\nb  c"):
            assert session.detokenize(session.tokenize(text)) == text

    def test_the_next_turn_reads_only_what_is_new(self, subject: Subject, session: Session) -> None:
        if not subject.can("reuse"):
            assert ask(session).usage.reused_tokens == ask(session).usage.reused_tokens == 0
            return
        turn: list[Message] = [{"role": "user", "content": "one beginning, which is long enough to count. " * 4}]
        first = Answer(list(session.generate(session.render(turn), _SOME)))
        turn += [{"role": "assistant", "content": first.text}, {"role": "user", "content": "and now?"}]
        second = Answer(list(session.generate(session.render(turn), _SOME)))
        if subject.can("memory"):  # a server may remember what others asked
            assert first.usage.reused_tokens == 0
        assert first.usage.prompt_tokens * 0.8 <= second.usage.reused_tokens < second.usage.prompt_tokens

    def test_what_is_reused_does_not_change_the_answer(self, subject: Subject, session: Session) -> None:
        begin = "the same beginning of both, " * 4
        how = replace(_SOME, top_logprobs=1 if subject.can("logprobs") else 0)
        ask(session, how, text=begin + "one end")
        warm = ask(session, how, text=begin + "another end")
        with subject.open() as fresh:
            cold = ask(fresh, how, text=begin + "another end")
        assert warm.text == cold.text
        assert _logprobs(warm) == pytest.approx(_logprobs(cold), abs=subject.tolerance)

    def test_a_prompt_that_does_not_fit_is_refused(self, subject: Subject, session: Session) -> None:
        with pytest.raises(ModelError) as raised:
            ask(session, text="x y " * 2 * session.context)
        if subject.can("tokens"):
            assert str(session.context) in raised.value.message
        assert ask(session).usage.completion_tokens == 16

    def test_an_answer_ends_with_the_context(self, subject: Subject, session: Session) -> None:
        if not subject.can("tokens"):
            return  # what ends it is a server's or an engine's own limit
        before = ask(session).text
        prompt = session.render([{"role": "user", "content": long_text(subject, session)}])
        answer = Answer(list(session.generate(prompt, replace(_SOME, max_tokens=2 * session.context))))
        used = answer.usage.prompt_tokens + answer.usage.completion_tokens
        assert answer.usage.finish_reason == "length" and session.context <= used <= session.context + 1
        assert ask(session).text == before

    def test_a_chat_that_outgrows_the_context_loses_its_oldest_turns_when_asked_to(
        self, subject: Subject, session: Session
    ) -> None:
        if not subject.can("raw"):
            refused(UsageError, lambda: plugins.check_levers(subject.plugin, LoadOptions(overflow="truncate-oldest")))
            return
        chat: list[Message] = [{"role": "system", "content": "keep this"}]
        while len(session.render(chat)) < 2 * session.context:
            number = len(chat) // 2
            chat += [{"role": "user", "content": f"<{number}> " + "some word " * 8}]
            chat += [{"role": "assistant", "content": "hm"}]
        chat += [{"role": "user", "content": "hi"}]
        with pytest.raises(ModelError):
            list(session.generate(fit(session, chat).prompt, _SOME))
        fitted = fit(session, chat, "truncate-oldest", 16)
        assert 0 < fitted.dropped < len(chat) - 2 and fitted.dropped % 2 == 0
        assert fitted.prompt == session.render([chat[0], *chat[1 + fitted.dropped :]])
        answer = Answer(list(session.generate(fitted.prompt, _SOME)))
        assert (answer.usage.finish_reason, answer.usage.completion_tokens) == ("length", 16)

    def test_levers_that_a_runtime_lacks_are_refused(self, subject: Subject) -> None:
        kinds, guesses = getattr(subject.plugin, "kv_types", ()), getattr(subject.plugin, "lookup", False)
        if "q8_0" not in kinds:
            refused(UsageError, lambda: plugins.check_levers(subject.plugin, LoadOptions(kv_type="q8_0")))
        if not guesses:
            refused(UsageError, lambda: plugins.check_levers(subject.plugin, LoadOptions(lookup=True)))
        ways = getattr(subject.plugin, "loading", ())
        for name in set(plugins.LOADING).difference(ways):
            asked: dict[str, Any] = {name: True}
            refused(UsageError, partial(plugins.check_levers, subject.plugin, LoadOptions(**asked)))
        levers: dict[str, Any] = {"kv_type": "q8_0" if "q8_0" in kinds else None, "lookup": True if guesses else None}
        levers |= dict.fromkeys({"mmap", "repack"}.intersection(ways), False)
        with subject.open(subject.artifact) as plain:
            before = ask(plain).text
        if all(value is None for value in levers.values()) or subject.artifact.address:
            return
        with subject.open(**levers) as other:
            assert ask(other).text == before

    def test_an_empty_prompt_is_refused(self, session: Session) -> None:
        with pytest.raises(UsageError, match="empty"):
            list(session.generate([], _SOME))

    # --- Log-probabilities -----------------------------------------------------------

    def test_alternatives_come_most_probable_first_and_only_when_asked_for(
        self, subject: Subject, session: Session
    ) -> None:
        assert all(delta.logprob is None and not delta.top_logprobs for delta in ask(session).deltas)
        if not subject.can("logprobs"):
            refused(UsageError, lambda: ask(session, replace(_SOME, top_logprobs=3)))
            return
        for delta in ask(session, replace(_SOME, top_logprobs=5)).deltas[:-1]:
            values = [value for _, value in delta.top_logprobs]
            assert len(values) == 5 and values == sorted(values, reverse=True)
            assert delta.logprob == pytest.approx(values[0], abs=1e-4) and values[0] < 0
            assert sum(map(math.exp, values)) <= 1.0001

    def test_scores_are_log_probabilities_and_agree_with_what_generating_reports(
        self, subject: Subject, session: Session
    ) -> None:
        prompt = session.render(ASK)
        if not subject.can("scores"):
            refused(UsageError, lambda: session.score(prompt))
            return
        scores = session.score(prompt, 1)
        assert scores.shape == (len(prompt) - 1, session.vocabulary) and str(scores.dtype) == "float32"
        assert [math.fsum(map(math.exp, row)) for row in scores.tolist()] == pytest.approx(
            [1.0] * len(scores), abs=1e-3
        )
        told = next(iter(session.generate(prompt, replace(_SOME, top_logprobs=1))))
        assert scores[-1][told.token] == pytest.approx(told.logprob, abs=subject.tolerance)

    # --- What else it can do, or says it cannot ------------------------------------------

    def test_a_schema_is_followed_or_refused(self, subject: Subject, session: Session) -> None:
        schema = {"type": "object", "properties": {"on": {"type": "boolean"}}, "required": ["on"]}
        how = replace(_SOME, max_tokens=100, json_schema={**schema, "additionalProperties": False})
        if not subject.can("json"):
            refused(UsageError, lambda: ask(session, how))
        elif (answer := ask(session, how)).usage.finish_reason == "stop":
            assert json.loads(answer.text) in ({"on": True}, {"on": False})
        else:
            assert answer.text.lstrip().startswith("{")

    def test_an_adapter_changes_the_answer_and_can_be_taken_off(self, subject: Subject, session: Session) -> None:
        how = replace(_SOME, top_logprobs=1 if subject.can("logprobs") else 0)
        before = ask(session, how)
        if not subject.can("adapters"):
            refused(ModelError, lambda: session.set_adapters([AdapterScale(Path("a.adapter"))]))
        else:
            assert subject.adapter is not None, "the subject needs an adapter"
            session.set_adapters([AdapterScale(subject.adapter)])
            changed = ask(session, how)
            assert changed.usage.reused_tokens == 0
            assert (changed.text, _logprobs(changed)) != (before.text, _logprobs(before))
        session.set_adapters([])
        after = ask(session, how)
        assert after.text == before.text
        assert _logprobs(after) == pytest.approx(_logprobs(before), abs=subject.tolerance)

    def test_a_missing_adapter_is_named(self, session: Session, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match="missing"):
            session.set_adapters([AdapterScale(tmp_path / "missing")])
        assert ask(session).usage.completion_tokens == 16

    # --- The end --------------------------------------------------------------------

    def test_a_closed_session_refuses_everything_and_can_be_closed_again(self, session: Session) -> None:
        prompt = session.render(ASK)
        left = session.generate(prompt, _SOME)
        next(left)
        session.close()
        session.close()
        uses: list[Callable[[], object]] = [
            lambda: next(left),
            lambda: list(session.generate(prompt, _SOME)),
            lambda: session.render(ASK),
            lambda: session.tokenize("a"),
            lambda: session.detokenize([65]),
            lambda: session.score(prompt),
            lambda: session.set_adapters([]),
        ]
        for use in uses:
            with pytest.raises(ModelError, match="closed"):
                use()

    def test_two_sessions_do_not_touch_each_other(self, subject: Subject, session: Session) -> None:
        before = ask(session).text
        with subject.open() as other:
            ask(other, text="something else")
            assert ask(session).text == before
        assert ask(session).text == before

    def test_unloading_frees_what_loading_took(self, subject: Subject) -> None:
        def cycle() -> None:
            with subject.open() as session:
                ask(session, replace(_SOME, max_tokens=2))

        for _ in range(3):
            cycle()
        before, files, threads = resident_bytes(), open_files(), threading.active_count()
        for _ in range(6):
            cycle()
        grown = resident_bytes() - before
        assert open_files() <= files and threading.active_count() <= threads
        if subject.can("memory"):
            # A session that stayed would keep its weights at least; allocators keep some crumbs.
            assert grown < 6 * max(0.5 * size_of(subject.artifact.path), 1 << 20), f"{grown / 1e6:.1f} MB stayed"


def refused(kind: type[EdgeftError], action: Callable[[], object]) -> None:
    """What is declared missing must be refused, in words."""
    with pytest.raises(kind) as raised:
        action()
    assert len(raised.value.message) > 15


def long_text(subject: Subject, session: Session) -> str:
    """A user message that takes up most of the context."""
    if not subject.can("tokens"):
        return "some word " * (session.context // 12)
    one, nine = (len(session.render([{"role": "user", "content": "some word " * many}])) for many in (1, 9))
    return "some word " * int((0.9 * session.context - one) * 8 / (nine - one))


def _sampled(subject: Subject, seed: int) -> Sampling:
    """Sampling as free as the runtime allows."""
    return replace(_HOT, seed=seed)


def _logprobs(answer: Answer) -> Sequence[float]:
    return [delta.logprob for delta in answer.deltas if delta.logprob is not None]


def resident_bytes() -> int:
    """Memory this process holds after giving back what it can; 0 where that cannot be measured."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    status = Path("/proc/self/statm")
    return int(status.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if status.is_file() else 0


def open_files() -> int:
    folder = Path("/proc/self/fd")
    return len(list(folder.iterdir())) if folder.is_dir() else 0
