"""The levers of a runtime: type of keys and values, prompt lookup, and what becomes of a chat that is too long."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from edgeft.runtimes.llama_api import Library
from edgeft.runtimes.llama_server import Child
from edgeft.runtimes.llama_session import LlamaSession
from edgeft.runtimes.prompt_lookup import LONGEST, ORDER, PromptLookup
from serving import serving
from tiny_gguf import VOCABULARY, _layers, write_gguf, write_random

from edgeft import plugins
from edgeft.artifact import Artifact
from edgeft.chat import Message, Sampling
from edgeft.cli.main import main
from edgeft.errors import ExitCode, UsageError
from edgeft.overflow import fit
from edgeft.plugins import LoadOptions
from edgeft.sessions import open_session

WIDTH = 384
"""Four heads of 96 values: three blocks of q8_0."""
CYCLE = "abcdefgh"
Load = Callable[..., Any]


@pytest.fixture(scope="module")
def circle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Says "abcdefgh" for ever, but every log-probability depends on all tokens before."""
    return write_circle(tmp_path_factory.mktemp("circle") / "circle.gguf")


def write_circle(path: Path) -> Path:
    layers = {name: (value - 0.05) * 0.1 for name, value in _layers(WIDTH, 64, seed=3).items()}
    norms = {name: np.ones(WIDTH, np.float32) for name in layers if "norm" in name}
    head = np.zeros((VOCABULARY, WIDTH), np.float32)
    for now, then in zip("\n" + CYCLE, CYCLE + "a", strict=True):
        head[ord(then), ord(now)] = 20 / WIDTH**0.5
    embeddings = 3 * np.eye(VOCABULARY, WIDTH, dtype=np.float32)
    return write_gguf(path, {**layers, **norms, "token_embd.weight": embeddings, "output.weight": head})


@pytest.fixture(params=["xllamacpp", "llama-cpp-python"])
def load(request: pytest.FixtureRequest) -> Load:
    runtime = plugins.load("runtimes", request.param)
    if not (ready := runtime.ready()).ok:
        pytest.skip(f"{ready.reason}: {ready.install}")

    def load_(model: Path, **options: Any) -> LlamaSession:
        chosen = {"context": 256, "threads": 1, "threads_batch": 1, **options}
        session = runtime.load(Artifact(model), LoadOptions(**chosen))
        assert isinstance(session, LlamaSession)
        return session

    return load_


def batches(session: LlamaSession, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the batches that are evaluated from now on."""
    seen: list[int] = []
    decode = session._decode

    def counted(batch: Any, tokens: list[int]) -> bool:
        seen.append(len(tokens))
        return decode(batch, tokens)

    monkeypatch.setattr(session, "_decode", counted)
    return seen


# --- Prompt lookup ------------------------------------------------------------


def test_a_guess_is_what_followed_last_time() -> None:
    lookup = PromptLookup([1, 2, 3, 4, 5, 1, 2, 3, 9, 8, 1, 2, 3])
    assert lookup.guess(2) == [9, 8]
    assert lookup.guess(0) == [] == PromptLookup([1, 2, 3]).guess(5) == PromptLookup().guess(5)
    lookup.extend([4])
    assert lookup.guess(1) == [5]
    assert len(PromptLookup([*range(40), *range(ORDER)]).guess(99)) == LONGEST


@pytest.mark.parametrize("prompt", ["abcx abcx defx ab\n", "no repeats\n", "abcdefghabcd\nabcdefgh\n"])
def test_with_lookup_the_text_and_its_probabilities_are_the_same(load: Load, circle: Path, prompt: str) -> None:
    said = []
    for lookup in (False, True):
        with load(circle, lookup=lookup) as session:
            how = Sampling(max_tokens=60, top_logprobs=2)
            said.append(list(session.generate(session.tokenize(prompt), how)))
    plain, guessed = said
    assert "".join(delta.text for delta in guessed) == (CYCLE * 8)[:60] == "".join(delta.text for delta in plain)
    assert [delta.token for delta in guessed] == [delta.token for delta in plain]
    assert [one.logprob for one in guessed[:-1]] == pytest.approx([one.logprob for one in plain[:-1]], abs=0.01)
    assert guessed[-1].usage.completion_tokens == plain[-1].usage.completion_tokens == 60


def test_the_probabilities_tell_contexts_apart(load: Load, circle: Path) -> None:
    """What the test above rests on: a token too much or too little in the cache moves them by more than it allows."""
    with load(circle) as session:
        whole = session.tokenize("abcx abcx ab\n" + CYCLE)
        without = np.abs(session.score(whole)[-1] - session.score([*whole[:4], *whole[5:]])[-1]).max()
    assert without > 0.02


def test_right_guesses_save_batches_and_wrong_ones_are_taken_back(
    load: Load, circle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with load(circle, lookup=True) as session:
        right = batches(session, monkeypatch)
        list(session.generate(session.tokenize("\n"), Sampling(max_tokens=60)))
        assert max(right) == LONGEST + 1 and len(right) < 25
    with load(circle, lookup=True) as session:
        wrong = batches(session, monkeypatch)
        prompt = session.tokenize("abcxxxx\n")  # after "abc" it has seen "xxxx", and says "d"
        list(session.generate(prompt, Sampling(max_tokens=5)))
        assert max(wrong[1:]) > 1
        assert session._cached == [*prompt, *b"abcd"]


def test_an_answer_with_lookup_ends_where_it_ends_without(load: Load, circle: Path) -> None:
    ends = []
    for lookup in (False, True):
        with load(circle, lookup=lookup, context=64) as session:
            full = list(session.generate(session.tokenize("x\n"), Sampling(max_tokens=500)))
            stopped = list(session.generate(session.tokenize("y\n"), Sampling(max_tokens=60, stop=("habc",))))
            ends.append([(len(said), said[-1].usage.finish_reason, session.context) for said in (full, stopped)])
    assert ends[0] == ends[1]
    assert [reason for _, reason, _ in ends[0]] == ["length", "stop"]


def test_a_seed_draws_the_same_tokens_with_lookup(load: Load, circle: Path) -> None:
    how = Sampling(max_tokens=40, temperature=1.5, top_k=0, top_p=1.0, min_p=0.0, seed=4)
    said = []
    for lookup in (False, True):
        with load(circle, lookup=lookup) as session:
            prompt = session.tokenize("abcdefgh" * 4 + "\n")
            said.append([delta.token for delta in session.generate(prompt, how)])
    assert said[0] == said[1]


def test_the_next_turn_goes_on_after_a_lookup_that_was_left(load: Load, circle: Path) -> None:
    with load(circle, lookup=True) as session:
        stream = session.generate(session.tokenize("abcxabcx\n"), Sampling(max_tokens=40))
        for _ in range(12):
            next(stream)
        stream.close()
        again = [delta.token for delta in session.generate(session.tokenize("abcxabcx\n"), Sampling(max_tokens=9))]
    assert bytes(again[:-1]) == b"abcdefgha"


# --- Type of keys and values --------------------------------------------------


def test_q8_0_answers_and_takes_half_the_memory(load: Load, circle: Path) -> None:
    said, sizes = [], []
    for kind in ("f16", "q8_0"):
        with load(circle, kv_type=kind) as session:
            tokens = session.tokenize("abcx " * 30 + "\n")
            said.append("".join(delta.text for delta in session.generate(tokens, Sampling(max_tokens=20))))
            sizes.append(session._lib.llama_state_seq_get_size(session._ctx, 0))
    assert said == [(CYCLE * 3)[:20]] * 2
    assert sizes[1] / sizes[0] == pytest.approx(17 / 32, abs=0.05)


def test_a_state_in_one_type_is_not_read_into_another(load: Load, circle: Path, tmp_path: Path) -> None:
    messages: list[Message] = [{"role": "system", "content": "a" * 60}, {"role": "user", "content": "b"}]
    for kind in ("f16", "q8_0"):
        with load(circle, kv_type=kind, state=tmp_path) as session:
            usage = list(session.generate(session.render(messages), Sampling(max_tokens=2)))[-1].usage
            assert usage.reused_tokens == 0 and not session.notes
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    "option",
    [{"kv_type": "q8_0"}, {"lookup": True}, {"mmap": False}, {"repack": False}, {"flash_attention": True}],
    ids=str,
)
def test_a_runtime_without_a_lever_refuses_it(option: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "m.echo.json").write_text("{}")
    with pytest.raises(UsageError, match="echo"):
        open_session(str(tmp_path / "m.echo.json"), "echo", LoadOptions(**option))


# --- Overflow -----------------------------------------------------------------


def turns(count: int) -> list[Message]:
    messages: list[Message] = [{"role": "system", "content": "be brief"}]
    for turn in range(count):
        messages.append({"role": "user", "content": f"question {turn}"})
        messages.append({"role": "assistant", "content": f"answer {turn}"})
    return [*messages, {"role": "user", "content": "the last one"}]


def kept(session: Any, prompt: Sequence[int]) -> str:
    return str(session.detokenize(list(prompt)))


def test_the_oldest_turns_go_and_the_system_prompt_stays(load: Load, circle: Path) -> None:
    with load(circle) as session:
        found = fit(session, turns(20), "truncate-oldest", 16)
        text = kept(session, found.prompt)
        assert len(found.prompt) + 16 <= session.context
        assert found.dropped % 2 == 0 and 0 < found.dropped < 40
        assert "be brief" in text and text.rstrip().endswith("the last one\nassistant")
        assert "question 0" not in text and "question 19" in text
        assert len(fit(session, turns(20)).prompt) > session.context
        assert fit(session, turns(1), "truncate-oldest", 16).dropped == 0


def test_most_turns_of_a_full_chat_are_cut_where_the_last_one_was(load: Load, circle: Path) -> None:
    with load(circle) as session:
        found = [fit(session, turns(count), "truncate-oldest", 16).dropped for count in range(6, 40)]
    assert found == sorted(found) and found[-1] > 20
    moves = sum(one != other for one, other in pairwise(found))
    assert moves < len(found) / 2


def test_what_cannot_be_shortened_is_refused(load: Load, circle: Path) -> None:
    messages: list[Message] = [{"role": "system", "content": "s" * 300}, {"role": "user", "content": "hi"}]
    with load(circle) as session:
        assert len(fit(session, messages, "truncate-oldest", 16).prompt) > session.context


def test_calls_of_tools_go_with_their_results(load: Load, circle: Path) -> None:
    messages: list[Message] = []
    for turn in range(12):
        messages.append({"role": "user", "content": f"ask {turn}"})
        messages.append({"role": "assistant", "content": f"call {turn}"})
        messages.append({"role": "tool", "content": f"found {turn}"})
    messages.append({"role": "user", "content": "the last one"})
    with load(circle) as session:
        found = fit(session, messages, "truncate-oldest", 16)
    assert found.dropped > 0 and found.dropped % 3 == 0


def test_a_chat_goes_on_when_asked_to(
    circle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import io
    import sys

    monkeypatch.setenv("EDGEFT_HOME", str(tmp_path))
    lines = "".join(f"question number {turn}\n" for turn in range(14)).encode()
    command = ["chat", str(circle), "--context", "256", "--max-tokens", "8", "--no-history", "--system", "be brief"]
    for policy, code in ("refuse", ExitCode.FAILED), ("truncate-oldest", ExitCode.OK):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines)))
        assert main([*command, "--overflow", policy]) == code
        out, err = capsys.readouterr()
        assert (len(out.splitlines()) == 14) == (policy != "refuse")
        assert ("were left out" in err) == (policy != "refuse")


def test_a_server_leaves_out_turns_when_told_to(tmp_path: Path) -> None:
    (tmp_path / "echo.echo.json").write_text("{}")
    for policy, wanted in ("refuse", 400), ("truncate-oldest", 200):
        more = ("--context", "256", "--max-tokens", "8", "--overflow", policy)
        with serving(tmp_path, str(tmp_path / "echo.echo.json"), *more) as server:
            status, _, _ = server.ask("/v1/chat/completions", {"model": "echo", "messages": turns(20)})
            assert status == wanted
            assert server.chat("hi")[0] == 200


# --- Why ----------------------------------------------------------------------


def test_the_settings_are_printed_with_their_reasons(circle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["run", str(circle), "hi", "--max-tokens", "2", "--state", "off", "--explain", "--runtime", "xllamacpp"]
    assert main([*command, "--kv-type", "q8_0"]) == 0
    err = capsys.readouterr().err
    assert "kv-type: q8_0 (asked for)" in err and "flash attention: on (only it reads quantized values)" in err
    assert "lookup: off (" in err and "threads: " in err and "overflow: refuse (" in err


def passed(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What llama.cpp is told from now on, by the names of llama.h."""
    told: dict[str, Any] = {}

    def load_(library: Library, file: bytes, params: Any) -> Any:
        told.update(load_mode=params.load_mode, use_extra_bufts=params.use_extra_bufts)
        return library._dll.llama_model_load_from_file(file, params)

    def begin(library: Library, loaded: int, params: Any) -> Any:
        told.update(flash_attn_type=params.flash_attn_type)
        return library._dll.llama_init_from_model(loaded, params)

    monkeypatch.setattr(Library, "llama_model_load_from_file", load_, raising=False)
    monkeypatch.setattr(Library, "llama_init_from_model", begin, raising=False)
    return told


def test_every_way_to_load_gives_the_same_answer(load: Load, circle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ways: list[tuple[dict[str, Any], str, Any]] = [
        ({}, "load_mode", 1),
        ({"mmap": False}, "load_mode", 0),
        ({"repack": False}, "use_extra_bufts", False),
        ({"flash_attention": True}, "flash_attn_type", 1),
        ({"flash_attention": False}, "flash_attn_type", 0),
    ]
    said, llama = [], passed(monkeypatch)
    for way, field, value in ways:
        with load(circle, **way) as session:
            assert llama[field] == value
            said.append(
                "".join(delta.text for delta in session.generate(session.tokenize("\na"), Sampling(max_tokens=9)))
            )
            told = {choice.name.replace(" ", "_"): choice for choice in session.choices}
            for name, value in way.items():
                assert (told[name].value, told[name].reason) == ("on" if value else "off", "asked for")
    assert set(said) == {"bcdefghab"}


def test_a_server_is_told_how_to_load(circle: Path) -> None:
    options = LoadOptions(mmap=False, repack=False, flash_attention=True)
    words = Child(Path("llama-server"), circle, options)._arguments(())
    assert {"--no-mmap", "--no-repack"} <= set(words) and words[words.index("--flash-attn") + 1] == "on"
    assert not {"--no-mmap", "--no-repack", "--flash-attn"} & set(
        Child(Path("x"), circle, LoadOptions())._arguments(())
    )


@pytest.mark.parametrize("option", [{"mmap": True}, {"repack": False}, {"flash_attention": False}], ids=str)
def test_a_server_that_runs_has_loaded_its_model(option: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="already"):
        open_session("http://127.0.0.1:9", "llama-server", LoadOptions(**option))


def test_quantized_values_need_flash_attention(load: Load, circle: Path) -> None:
    with pytest.raises(UsageError, match="quantized"):
        load(circle, kv_type="q8_0", flash_attention=False)


def test_weights_stay_as_they_are_where_a_copy_has_no_room(
    load: Load, circle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room, llama = circle.stat().st_size - 1, passed(monkeypatch)
    monkeypatch.setattr("edgeft.runtimes.llama_load.available_bytes", lambda: room)
    with load(circle, context=32) as session:
        told = next(choice for choice in session.choices if choice.name == "repack")
    assert told.value == "off" and "do not fit" in told.reason and not llama["use_extra_bufts"]


def test_a_head_that_is_no_whole_block_is_an_error(load: Load, tmp_path: Path) -> None:
    from edgeft.errors import ModelError

    with pytest.raises(ModelError, match="q8_0"):
        load(write_random(tmp_path / "m.gguf"), kv_type="q8_0")
