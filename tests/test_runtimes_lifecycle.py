"""Streams that are not read to the end, switches thrown at odd moments, scripts, and builds that would crash."""

import gc
import json
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from edgeft.runtimes.amx import crashes_on_amx
from edgeft.runtimes.echo import VOCABULARY
from tiny_gguf import write_random

from edgeft import plugins
from edgeft.artifact import Artifact
from edgeft.chat import Cancel, Delta, Sampling
from edgeft.errors import ModelError, UsageError
from edgeft.plugins import LoadOptions, Session

ASK = [{"role": "user", "content": "hi"}]
REQUIRED = os.environ.get("EDGEFT_TEST_REQUIRE", "").split(",")
"""Runtimes that must be there: their absence is a failure, not a skip."""

SOME = Sampling(max_tokens=12)

Open = Callable[[], Session]


@pytest.fixture(params=["xllamacpp", "llama-cpp-python", "echo"])
def open_model(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Open]:
    file = tmp_path / ("m.echo.json" if request.param == "echo" else "m.gguf")
    if request.param == "echo":
        file.write_text(json.dumps({"default": "a scripted answer, long enough to be cut"}))
    else:
        write_random(file)
    runtime = plugins.load("runtimes", request.param)
    support = runtime.supports(Artifact(file))
    if not support.ok:
        assert request.param not in REQUIRED, support.reason
        pytest.skip(f"{support.reason}: {support.install}")
    opened: list[Session] = []

    def open_() -> Session:
        opened.append(runtime.load(Artifact(file), LoadOptions(context=512, threads=1, threads_batch=1)))
        return opened[-1]

    yield open_
    for session in opened:
        session.close()


def answer(session: Session, cancel: Cancel | None = None) -> str:
    return "".join(delta.text for delta in session.generate(session.render(ASK), SOME, cancel))


# --- Streams ------------------------------------------------------------------


def test_a_stream_that_is_left_changes_nothing(open_model: Open) -> None:
    session = open_model()
    before = answer(session)
    left = session.generate(session.render(ASK), SOME)
    next(left)
    assert answer(session) == before
    del left
    gc.collect()
    assert answer(session) == before


@pytest.mark.parametrize("use", ["generate", "score", "set_adapters"])
def test_a_stream_cannot_go_on_after_the_session_did_something_else(open_model: Open, use: str) -> None:
    session = open_model()
    left = session.generate(session.render(ASK), SOME)
    next(left)
    if use == "generate":
        answer(session)
    elif use == "score":
        session.score(session.render(ASK))
    else:
        session.set_adapters([])
    with pytest.raises(UsageError, match="something else"):
        next(left)


def test_a_stream_ends_with_its_session(open_model: Open) -> None:
    session = open_model()
    left = session.generate(session.render(ASK), SOME)
    next(left)
    session.close()
    with pytest.raises(ModelError, match="closed"):
        next(left)


def test_a_closed_session_refuses_everything(open_model: Open) -> None:
    session = open_model()
    session.close()
    uses: list[Callable[[], object]] = [
        lambda: session.render(ASK),
        lambda: session.tokenize("a"),
        lambda: session.detokenize([65]),
        lambda: session.set_adapters([]),
    ]
    for use in uses:
        with pytest.raises(ModelError, match="closed"):
            use()


def test_two_sessions_do_not_touch_each_other(open_model: Open) -> None:
    one, other = open_model(), open_model()
    before = answer(one)
    list(other.generate(other.tokenize("something else"), SOME))
    assert answer(one) == before
    other.close()
    assert answer(one) == before


def test_going_back_and_forth_between_conversations_mixes_nothing(open_model: Open) -> None:
    session, fresh = open_model(), open_model()
    prompts = [session.tokenize("The same beginning, " + end) for end in ("and one end", "another end, longer", "")]
    for turn in (0, 1, 0, 2, 1, 1, 0):
        warm = list(session.generate(prompts[turn], SOME))
        fresh.set_adapters([])  # forgets everything
        cold = list(fresh.generate(prompts[turn], SOME))
        assert [delta.token for delta in warm] == [delta.token for delta in cold]


def test_other_seeds_give_other_answers(open_model: Open) -> None:
    session = open_model()
    if session.vocabulary == VOCABULARY:
        pytest.skip("a script has the variants that are written in it")
    hot = [Sampling(max_tokens=12, temperature=2.0, top_k=0, top_p=1.0, min_p=0.0, seed=seed) for seed in range(4)]
    answers = {"".join(delta.text for delta in session.generate(session.render(ASK), how)) for how in hot}
    assert len(answers) == 4


# --- Switches -----------------------------------------------------------------


def test_a_switch_thrown_too_late_does_not_stop_the_next_answer(open_model: Open) -> None:
    session, cancel = open_model(), Cancel()
    before = answer(session, cancel)
    cancel.set()
    assert answer(session) == before


def test_a_switch_that_is_still_on_its_way_does_not_stop_the_next_answer(open_model: Open) -> None:
    """`Cancel.set` of another thread may reach its listeners after the answer has ended."""
    session, cancel = open_model(), Cancel()
    before, late = answer(session), []
    for _ in session.generate(session.render(ASK), SOME, cancel):
        late = list(cancel._listeners)
    for listener in late:
        listener()
    assert answer(session) == before


def test_a_left_stream_that_is_collected_late_does_not_disarm_the_next_ones_switch(open_model: Open) -> None:
    session, cancel = open_model(), Cancel()
    left = session.generate(session.render(ASK), SOME)
    next(left)
    deltas: list[Delta] = []
    for delta in session.generate(session.render(ASK), SOME, cancel):
        deltas.append(delta)
        if len(deltas) == 2:
            left.close()
            cancel.set()
    assert deltas[-1].usage is not None and deltas[-1].usage.finish_reason == "cancel"


def test_switches_thrown_at_any_moment_leave_the_session_right(open_model: Open) -> None:
    session = open_model()
    before = answer(session)
    for step in range(30):
        cancel = Cancel()
        timer = threading.Timer(step * 0.0005, cancel.set)
        timer.start()
        said = answer(session, cancel).rstrip("\N{REPLACEMENT CHARACTER}")
        assert before.startswith(said)
        timer.join()
    assert answer(session) == before


# --- Scripts ------------------------------------------------------------------


def script(folder: Path, content: str) -> Session:
    (folder / "s.echo.json").write_text(content)
    session: Session = plugins.load("runtimes", "echo").load(Artifact(folder / "s.echo.json"), LoadOptions())
    return session


def said(session: Session, *contents: str, **sampling: float) -> str:
    prompt = session.render([{"role": role, "content": text} for role, text in zip(ROLES, contents, strict=False)])
    return "".join(delta.text for delta in session.generate(prompt, Sampling(**sampling)))  # type: ignore[arg-type]


ROLES = ("user", "assistant") * 3


def test_a_script_answers_the_last_user_message(tmp_path: Path) -> None:
    session = script(tmp_path, '{"script": {"red": "stop", "green": ["go", "run"]}, "default": "wait"}')
    assert said(session, "is it red?") == "stop"
    assert said(session, "is it red?", "stop", "and green?") == "go"
    assert said(session, "yellow") == "wait"
    assert said(session, "green", temperature=1.0, seed=1) == "run"
    assert said(session, "green", temperature=0.0, seed=1) == "go"


def test_without_a_default_the_prompt_is_echoed(tmp_path: Path) -> None:
    assert said(script(tmp_path, "{}"), "née 😀") == "née 😀"


@pytest.mark.parametrize("content", ["{", "[]", '{"scirpt": {}}', "\xff"])
def test_a_script_that_cannot_be_read_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "s.echo.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ModelError, match=r"s\.echo\.json is not a script"):
        plugins.load("runtimes", "echo").load(Artifact(tmp_path / "s.echo.json"), LoadOptions())


def test_echo_never_answers_for_a_real_model(tmp_path: Path) -> None:
    write_random(tmp_path / "m.gguf")
    support = plugins.load("runtimes", "echo").supports(Artifact(tmp_path / "m.gguf"))
    assert not support.ok and "m.gguf" in support.reason


def test_echo_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    session = script(tmp_path, "{}")
    with pytest.raises(UsageError, match="JSON schema"):
        list(session.generate(session.render(ASK), Sampling(json_schema={"type": "object"})))
    with pytest.raises(ModelError, match="adapter"):
        session.set_adapters([plugins.AdapterScale(tmp_path / "a.gguf")])
    with pytest.raises(ModelError, match="no role 'robot'"):
        session.render([{"role": "robot", "content": "beep"}])


# --- Builds -------------------------------------------------------------------

AMX = "processor\t: 0\nflags\t\t: fpu avx512f amx_bf16 amx_tile\n"
NO_AMX = "processor\t: 0\nflags\t\t: fpu avx2\n"


@pytest.mark.parametrize(
    ("signature", "processor", "crashes"),
    [
        ("GCC: (Debian 12.2.0-14+deb12u1) 12.2.0", AMX, True),
        ("GCC: (Ubuntu 11.4.0-1ubuntu1~22.04) 11.4.0", AMX, True),
        ("GCC: (GNU) 13.2.1 20240206 (Red Hat 13.2.1-7)", AMX, True),
        ("GCC: (Ubuntu 13.3.0-6ubuntu2~24.04) 13.3.0", AMX, False),
        ("GCC: (Debian 12.4.0-1) 12.4.0", AMX, False),
        ("GCC: (GNU) 14.2.1 20250110 (Red Hat 14.2.1-7)", AMX, False),
        ("clang version 18.1.3", AMX, False),
        ("GCC: (Debian 12.2.0-14+deb12u1) 12.2.0", NO_AMX, False),
    ],
)
def test_amx_kernels_are_avoided_where_their_compiler_broke_them(
    tmp_path: Path, signature: str, processor: str, crashes: bool
) -> None:
    (tmp_path / "cpuinfo").write_text(processor)
    (tmp_path / "libllama.so").write_bytes(b"\x7fELF")
    (tmp_path / "libggml-cpu.so").write_bytes(b"\x7fELF _Z24ggml_backend_amx_mul_mat \0" + signature.encode() + b"\0")
    assert crashes_on_amx(tmp_path / "libllama.so", tmp_path / "cpuinfo") is crashes


def test_a_build_without_amx_kernels_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text(AMX)
    (tmp_path / "x.so").write_bytes(b"\x7fELF GCC: (Debian 12.2.0-14) 12.2.0\0")
    assert not crashes_on_amx(tmp_path / "x.so", tmp_path / "cpuinfo")
    assert not crashes_on_amx(tmp_path / "x.so", tmp_path / "no such file")
