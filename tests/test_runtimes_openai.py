"""The `openai` runtime against real servers on loopback: what is sent, what comes back, and everything going wrong."""

from __future__ import annotations

import json
import logging
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from edgeft.runtimes.openai_client import KEY_VARIABLE
from scripted_server import Handler, serving

from edgeft import plugins
from edgeft.artifact import Artifact
from edgeft.chat import Cancel, Delta, Sampling, Usage
from edgeft.cli.main import main
from edgeft.errors import ConfigError, EdgeftError, ModelError, Unreachable, UsageError
from edgeft.plugins import LoadOptions, Session
from edgeft.sessions import open_session

ASK = [{"role": "user", "content": "hi"}]


def load(address: str, **options: Any) -> Session:
    return open_session(address, options=LoadOptions(**options)).session


def answer(session: Session, sampling: Sampling | None = None, **more: Any) -> tuple[str, list[Delta], Usage]:
    deltas = list(session.generate(session.render(ASK), sampling or Sampling(), **more))
    assert deltas[-1].usage is not None
    return "".join(delta.text for delta in deltas), deltas, deltas[-1].usage


def once(handle: Any, sampling: Sampling | None = None) -> tuple[str, list[Delta], Usage]:
    with serving(handle) as server, load(server.url) as session:
        return answer(session, sampling)


# --- What is sent -----------------------------------------------------------------------


def test_conversation_and_sampling_arrive_as_the_protocol_has_them() -> None:
    with serving(lambda to: to.say("ok")) as server, load(server.url + "#big-one") as session:
        answer(session, Sampling(max_tokens=7, temperature=0.5, top_p=0.9, seed=3, stop=("END", "")))
    (asked,) = server.asked
    expected = {
        "path": "/v1/chat/completions",
        "model": "big-one",
        "messages": ASK,
        "max_tokens": 7,
        "temperature": 0.5,
        "top_p": 0.9,
        "seed": 3,
        "stream": True,
        "stream_options": {"include_usage": True},
        "key": None,
    }
    assert asked == expected


def test_without_a_name_the_servers_first_model_is_asked_once() -> None:
    with serving(lambda to: to.say("ok")) as server, load(server.url) as session:
        answer(session), answer(session)
    assert [asked["path"] for asked in server.asked] == ["/v1/models"] + ["/v1/chat/completions"] * 2
    assert server.asked[1]["model"] == "only-one"


def test_schemas_and_tools_are_passed_on() -> None:
    schema, tool = {"type": "object"}, {"name": "light", "parameters": {}}
    with serving(lambda to: to.say("{}")) as server, load(server.url + "#m") as session:
        list(session.generate(session.render(ASK, [tool]), Sampling(json_schema=schema)))
    assert server.asked[0]["response_format"]["json_schema"]["schema"] == schema
    assert server.asked[0]["tools"] == [{"type": "function", "function": tool}]


@pytest.mark.parametrize("how", [{"repeat_penalty": 1.1}, {"temperature": 1.0, "top_k": 5}])
def test_what_the_protocol_has_no_word_for_is_refused(how: dict[str, Any]) -> None:
    with load("http://127.0.0.1:9/v1#m") as session, pytest.raises(UsageError, match="chat completions have no"):
        answer(session, Sampling(**how))


# --- What comes back --------------------------------------------------------------------


def test_the_answer_is_streamed_as_it_comes() -> None:
    text, deltas, usage = once(
        lambda to: to.say("Hé", "llo", " 😀", delay=0.05, prompt_tokens_details={"cached_tokens": 4})
    )
    assert text == "Héllo 😀"
    assert [delta.text for delta in deltas] == ["Hé", "llo", " 😀", ""]
    assert (usage.prompt_tokens, usage.reused_tokens, usage.completion_tokens) == (9, 4, 3)
    assert usage.finish_reason == "stop" and usage.decode_s > 0.08


def test_lines_may_arrive_in_any_pieces() -> None:
    def handle(to: Handler) -> None:
        to.begin()
        body = {"choices": [{"delta": {"content": "né😀"}}]}
        raw = f": comment\r\ndata:{json.dumps(body, ensure_ascii=False)}\r\n\r\ndata: [DONE]\n\n".encode()
        for at in range(len(raw)):
            to.raw(raw[at : at + 1])

    assert once(handle)[0] == "né😀"


def test_a_server_that_does_not_stream_is_understood() -> None:
    body = {"choices": [{"message": {"content": "all at once"}, "finish_reason": "length"}]}
    text, _, usage = once(lambda to: to.send_json(200, body))
    assert (text, usage.finish_reason) == ("all at once", "length")


def test_logprobs_are_per_token_and_bytes_count() -> None:
    def entry(raw: bytes, logprob: float) -> dict[str, Any]:
        return {"token": raw.decode("utf-8", "replace"), "bytes": list(raw), "logprob": logprob}

    tokens = [
        {**entry(part, -0.5), "top_logprobs": [entry(part, -0.5), entry(b"x", -1.5)]} for part in (b"\xc3", b"\xa9")
    ]

    def handle(to: Handler) -> None:
        to.begin()
        to.event({"choices": [{"delta": {"content": "é"}, "logprobs": {"content": tokens}}]})

    with serving(handle) as server, load(server.url + "#m") as session:
        text, deltas, _ = answer(session, Sampling(top_logprobs=2))
        assert text == "é" and [delta.text for delta in deltas] == ["", "é", ""]
        assert [delta.logprob for delta in deltas] == [-0.5, -0.5, None]
        assert [session.detokenize([token]) for token, _ in deltas[0].top_logprobs] == [
            "\N{REPLACEMENT CHARACTER}",
            "x",
        ]
    assert (server.asked[0]["logprobs"], server.asked[0]["top_logprobs"]) == (True, 2)


def test_tool_calls_become_text() -> None:
    def handle(to: Handler) -> None:
        to.begin()
        for part in ({"name": "light", "arguments": ""}, {"arguments": '{"on": '}, {"arguments": "true}"}):
            to.event({"choices": [{"delta": {"tool_calls": [{"index": 0, "function": part}]}}]})
        to.event({"choices": [{"delta": {}, "finish_reason": "tool_calls"}]})

    text = once(handle)[0]
    assert text.startswith("<tool_call>\n") and text.endswith("\n</tool_call>")
    assert json.loads(text[12:-13]) == {"name": "light", "arguments": {"on": True}}


def test_a_stop_string_is_never_shown_also_when_the_server_knows_none() -> None:
    text, _, usage = once(lambda to: to.say("one t", "wo three", "four"), Sampling(stop=("two",)))
    assert (text, usage.finish_reason) == ("one ", "stop")


# --- Cancelling -------------------------------------------------------------------------


@pytest.mark.parametrize("phase", ["before the first byte", "between tokens"])
def test_a_switch_ends_the_answer_at_once_and_the_server_is_told(phase: str) -> None:
    def handle(to: Handler) -> None:
        if phase == "before the first byte":
            time.sleep(0.4)
        to.say(*["word "] * 200, delay=0.01)

    with serving(handle) as server, load(server.url + "#m") as session:
        cancel = Cancel()
        threading.Timer(0.15, cancel.set).start()
        begun = time.perf_counter()
        _, deltas, usage = answer(session, cancel=cancel)
        assert time.perf_counter() - begun < 0.35
        assert usage.finish_reason == "cancel" and usage.completion_tokens == len(deltas) - 1
        assert server.left.wait(3)
        server.handle = lambda to: to.say("again")
        assert answer(session)[0] == "again"


def test_a_stream_that_is_left_closes_its_connection() -> None:
    with serving(lambda to: to.say(*["word "] * 500, delay=0.01)) as server, load(server.url + "#m") as session:
        stream = session.generate(session.render(ASK), Sampling())
        next(stream)
        stream.close()  # type: ignore[attr-defined]
        assert server.left.wait(3)


# --- What goes wrong --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "kind", "says"),
    [
        (401, ConfigError, "refuses the key"),
        (404, ModelError, "no such model"),
        (400, ModelError, "no such model"),
        (429, Unreachable, "cannot answer now"),
        (503, Unreachable, "cannot answer now"),
    ],
)
def test_a_status_becomes_its_error(status: int, kind: type[EdgeftError], says: str) -> None:
    with pytest.raises(kind, match=says) as raised:
        once(lambda to: to.send_json(status, {"error": {"message": "no such model"}}, Retry_After="7"))
    assert raised.value.hint is None or status in (401,) or "7 s" in raised.value.hint


def test_nobody_there_is_unreachable_and_named() -> None:
    with load("http://127.0.0.1:9/v1#m") as session, pytest.raises(Unreachable, match=r"127\.0\.0\.1:9"):
        answer(session)


def test_a_connection_that_breaks_is_unreachable_after_what_was_said() -> None:
    def handle(to: Handler) -> None:
        to.send_response(200)
        to.send_header("Content-Type", "text/event-stream")
        to.send_header("Content-Length", "10000")
        to.end_headers()
        to.event({"choices": [{"delta": {"content": "so far"}}]})
        to.close_connection = True

    with serving(handle) as server, load(server.url + "#m") as session:
        stream = session.generate(session.render(ASK), Sampling())
        assert next(stream).text == "so far"
        with pytest.raises(Unreachable, match="broke"):
            list(stream)


@pytest.mark.parametrize("raw", [b"data: {\n\n", b'data: {"choices": [7]}\n\n', b"data: 7\n\n", b"x" * 5_000_000])
def test_nonsense_is_a_model_error(raw: bytes) -> None:
    def handle(to: Handler) -> None:
        to.begin()
        to.raw(raw)

    with pytest.raises(ModelError, match=r"127\.0\.0\.1"):
        once(handle)


@pytest.mark.parametrize("phase", ["first_token_s", "idle_s"])
def test_a_silent_server_is_given_up_on(phase: str, tmp_path: Path) -> None:
    def handle(to: Handler) -> None:
        if phase == "idle_s":
            to.begin()
            to.event({"choices": [{"delta": {"content": "so far"}}]})
        time.sleep(0.6)

    with serving(handle) as server:
        file = tmp_path / "slow.endpoint.toml"
        file.write_text(f'url = "{server.url}"\nmodel = "m"\n{phase} = 0.1\n')
        with load(str(file)) as session, pytest.raises(Unreachable, match="in time"):
            answer(session)


# --- The key ----------------------------------------------------------------------------

SECRET = "sk-very-secret-0123456789"


def test_the_key_comes_from_the_environment_and_goes_nowhere_else(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(KEY_VARIABLE, SECRET)
    monkeypatch.setenv("OPENAI_API_KEY", "of-another-host")
    caplog.set_level(logging.DEBUG)
    with serving(lambda to: to.say("ok")) as server, load(server.url + "#m") as session:
        answer(session)
        assert server.asked[0]["key"] == f"Bearer {SECRET}"
        server.handle = lambda to: to.send_json(401, {"error": f"wrong key {SECRET}"})
        with pytest.raises(ConfigError) as raised:
            answer(session)
        code = main(["run", server.url + "#m", "hi"])
        told = "".join(capsys.readouterr()) + caplog.text + str(vars(session)) + repr(raised.value) + str(raised.value)
        assert code == 2 and "wrong key [key]" in told
        assert SECRET not in told and KEY_VARIABLE in told


def test_a_key_never_crosses_a_network_in_the_clear(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, SECRET)
    with pytest.raises(UsageError, match="not encrypted"):
        load("http://192.0.2.1/v1#m")


def test_a_key_in_the_url_is_refused() -> None:
    with pytest.raises(UsageError, match="credentials") as raised:
        load(f"https://me:{SECRET}@example.org/v1")
    assert SECRET not in str(raised.value)


# --- References -------------------------------------------------------------------------


@pytest.mark.parametrize("text", ['model = "m"', 'url = "ftp://x"', 'url = "http://x"\ntimeout = 3', "url = "])
def test_an_endpoint_file_that_says_nonsense_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.endpoint.toml").write_text(text)
    with pytest.raises(UsageError):
        plugins.load("runtimes", "openai").load(Artifact(tmp_path / "x.endpoint.toml"), LoadOptions())


def test_the_command_line_takes_a_url(capsys: pytest.CaptureFixture[str]) -> None:
    with serving(lambda to: to.say("from afar")) as server:
        assert main(["run", server.url + "#m", "hi", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["text"], result["runtime"]) == ("from afar", "openai")


def test_loading_needs_no_network() -> None:
    with load("http://127.0.0.1:9/v1") as session:
        assert session.detokenize(session.render(ASK)) == json.dumps({"messages": ASK})
