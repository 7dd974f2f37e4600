"""`edgeft serve` over a real socket: OpenAI's own client, errors, crashes, disconnects, queue, keys, shutdown."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import tiny_gguf
from serving import Serving, serving, text_of
from tiny_gguf import chain_of, write_adapter, write_scripted

from edgeft.request_log import RequestLog

CALL = '{"name": "light", "arguments": {"room": "hall"}}'
LIGHT = {
    "type": "function",
    "function": {
        "name": "light",
        "description": "Switch a light on.",
        "parameters": {
            "type": "object",
            "properties": {"room": {"type": "string", "maxLength": 12}},
            "required": ["room"],
            "additionalProperties": False,
        },
    },
}
SCRIPT = {
    "script": {"call": CALL, "tagged": f"I do.<tool_call>{CALL}</tool_call>", "brace": "{no call", "dice": ["1", "2"]}
}


def script(folder: Path, **values: Any) -> str:
    path = folder / "echo.echo.json"
    path.write_text(json.dumps(values))
    return str(path)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    folder = tmp_path_factory.mktemp("serve")
    with serving(folder, script(folder, **SCRIPT), "--max-tokens", "4000") as running:
        yield running


@pytest.fixture
def client(server: Serving) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none needed", max_retries=0) as made:
        yield made


def say(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


def wait_until(true: Any, seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


# --- OpenAI's client ----------------------------------------------------------


def test_a_conversation_is_answered(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="echo", messages=say("hello"))
    assert answer.choices[0].message.content == "hello"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage and answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.completion_tokens == 5


def test_a_stream_brings_the_same_text_and_then_the_usage(client: openai.OpenAI) -> None:
    with client.chat.completions.create(
        model="echo", messages=say("Grüße, 世界"), stream=True, stream_options={"include_usage": True}
    ) as stream:
        chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "Grüße, 世界"
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    assert chunks[-1].usage and chunks[-1].usage.completion_tokens == len("Grüße, 世界".encode())
    assert len({chunk.id for chunk in chunks}) == 1


def test_stop_and_length_and_seed(client: openai.OpenAI) -> None:
    create = client.chat.completions.create
    stopped = create(model="echo", messages=say("one two three"), stop=[" three"])
    assert (stopped.choices[0].message.content, stopped.choices[0].finish_reason) == ("one two", "stop")
    short = create(model="echo", messages=say("one two three"), max_completion_tokens=3)
    assert (short.choices[0].message.content, short.choices[0].finish_reason) == ("one", "length")
    rolled = [
        create(model="echo", messages=say("dice"), temperature=1, seed=seed).choices[0].message.content
        for seed in (0, 1, 0)
    ]
    assert rolled == ["1", "2", "1"]


def test_logprobs(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="echo", messages=say("ab"), logprobs=True, top_logprobs=2)
    logprobs = answer.choices[0].logprobs
    assert logprobs and logprobs.content
    assert [entry.token for entry in logprobs.content] == ["a", "b"]
    assert logprobs.content[0].bytes == [97] and logprobs.content[0].logprob < 0
    assert len(logprobs.content[0].top_logprobs) == 2
    plain = client.chat.completions.create(model="echo", messages=say("ab"), logprobs=True)
    assert plain.choices[0].logprobs and plain.choices[0].logprobs.content[0].top_logprobs == []  # type: ignore[index]


@pytest.mark.parametrize(("text", "content"), [("call", None), ("tagged", "I do.")])
def test_tools_are_called(client: openai.OpenAI, text: str, content: str | None) -> None:
    answer = client.chat.completions.create(model="echo", messages=say(text), tools=[LIGHT])  # type: ignore[list-item]
    message, reason = answer.choices[0].message, answer.choices[0].finish_reason
    assert reason == "tool_calls" and message.content == content and message.tool_calls
    call = message.tool_calls[0]
    assert call.type == "function" and call.function.name == "light"
    assert json.loads(call.function.arguments) == {"room": "hall"}


def test_tools_are_called_in_a_stream_and_what_is_no_call_is_text(client: openai.OpenAI) -> None:
    def chunks(text: str) -> list[Any]:
        tools: Any = [LIGHT]
        return list(client.chat.completions.create(model="echo", messages=say(text), tools=tools, stream=True))

    called = [chunk.choices[0].delta.tool_calls for chunk in chunks("call") if chunk.choices[0].delta.tool_calls]
    assert len(called) == 1 and called[0][0].index == 0 and called[0][0].function.name == "light"
    for text in ("brace", "plain"):
        said = chunks(text)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in said) == SCRIPT["script"].get(text, text)
        assert said[-1].choices[0].finish_reason == "stop"


def test_results_of_tools_can_be_told(client: openai.OpenAI) -> None:
    call: Any = {"id": "1", "type": "function", "function": {"name": "light", "arguments": '{"room": "hall"}'}}
    messages: Any = [
        *say("switch"),
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "done"},
    ]
    assert client.chat.completions.create(model="echo", messages=messages).choices[0].message.content == "switch"


def test_plain_text(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="echo", prompt="abc", echo=True, logprobs=1)
    assert answer.choices[0].text == "abcabc"
    assert answer.choices[0].logprobs and answer.choices[0].logprobs.text_offset == [3, 4, 5]
    stream = client.completions.create(model="echo", prompt="abc", stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == "abc"


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["echo"]
    assert client.models.retrieve("echo").id == "echo"
    with pytest.raises(openai.NotFoundError, match="there are: echo"):
        client.models.retrieve("gpt-4")
    with pytest.raises(openai.NotFoundError, match="there are: echo"):
        client.chat.completions.create(model="gpt-4", messages=say("hello"))


def test_no_runtime_makes_embeddings_and_that_is_said(client: openai.OpenAI) -> None:
    with pytest.raises(openai.APIStatusError, match="embeddings") as caught:
        client.embeddings.create(model="echo", input="hello")
    assert caught.value.status_code == 404


# --- Bad requests -------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"n": 2}, "n"),
        ({"temperature": 3}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"frequency_penalty": 1}, "frequency_penalty"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"stop": [""]}, "stop"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "wizard", "content": "hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content"),
        ({"tools": [{"type": "web"}]}, "tools[0]"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"stream": 1}, "stream"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(server: Serving, more: dict[str, Any], param: str) -> None:
    status, body, _ = server.chat("hi", **more)
    assert status == 400 and body["error"]["param"] == param and body["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("suffix", ["after", {}, [], 0, False])
def test_a_suffix_is_refused_whatever_it_is(server: Serving, suffix: Any) -> None:
    status, body, _ = server.ask("/v1/completions", {"model": "echo", "prompt": "a", "suffix": suffix})
    assert status == 400 and body["error"]["param"] == "suffix"


def test_a_prompt_that_is_too_long_is_refused_before_the_stream_begins(server: Serving) -> None:
    status, body, _ = server.chat("x" * 5000, stream=True)
    assert status == 400 and body["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    ("data", "headers", "status"),
    [
        (b"{", {}, 400),
        (b'"text"', {}, 400),
        (b'{"model": "\\ud800"}', {}, 400),
        (b"[" * 100_000, {}, 400),
        (b"{}", {"Content-Type": "text/plain"}, 415),
        (b" " * (5 << 20), {}, 413),
        (b"{}", {"Host": "evil.example"}, 403),
    ],
)
def test_bodies_that_are_no_requests(server: Serving, data: bytes, headers: dict[str, str], status: int) -> None:
    found, body, _ = server.ask("/v1/chat/completions", data, headers)
    assert found == status and body["error"]["message"]


def test_unknown_paths_and_methods_get_error_objects(server: Serving) -> None:
    status, body, _ = server.ask("/v1/nothing")
    assert status == 404 and body["error"]["code"] == "not_found"
    status, body, headers = server.ask("/v1/chat/completions")
    assert status == 405 and body["error"]["message"] and headers["allow"] == "POST"


# --- Many clients -------------------------------------------------------------


def test_streams_do_not_mix(server: Serving) -> None:
    texts = [f"stream {number} " * 20 for number in range(24)]
    answers: dict[int, str] = {}

    def ask(number: int) -> None:
        with server.stream(texts[number]) as events:
            answers[number] = text_of(events)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(texts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == dict(enumerate(texts))


def test_a_client_that_goes_away_ends_the_computation(tmp_path: Path) -> None:
    with serving(tmp_path, script(tmp_path, default="x" * 3000, delay_ms=20)) as server:
        with server.stream("go", max_tokens=3000) as events:
            next(events)
        begun = time.monotonic()
        assert server.chat("again", max_tokens=1)[0] == 200
        assert time.monotonic() - begun < 5
        wait_until(lambda: len([event for event in server.events() if event["event"] == "request"]) == 2)
        left = next(event for event in server.events() if event.get("status") == 499)
        assert left["error"] == "client_closed_request"


def test_a_queue_that_is_full_says_when_to_come_back(tmp_path: Path) -> None:
    with (
        serving(tmp_path, script(tmp_path, default="x" * 3000, delay_ms=20), "--queue", "1") as server,
        server.stream("first", max_tokens=3000) as first,
    ):
        next(first)
        waiting = threading.Thread(target=lambda: server.chat("second", max_tokens=1))
        waiting.start()
        wait_until(lambda: 'edgeft_queue_length{model="echo"} 1.0' in server.ask("/metrics")[1])
        status, body, headers = server.chat("third")
        assert status == 429 and body["error"]["code"] == "queue_full" and int(headers["retry-after"]) >= 1
        first.close()  # type: ignore[attr-defined]
    waiting.join()


def test_a_crash_of_the_model_is_an_error_and_not_the_end(tmp_path: Path) -> None:
    with serving(tmp_path, script(tmp_path, default="x" * 3000, delay_ms=20)) as server:
        with server.stream("go", max_tokens=3000) as events:
            next(events)
            os.kill(server.worker(), signal.SIGSEGV)
            last = list(events)[-1]
        assert last["error"]["code"] == "model_crashed" and "SIGSEGV" in last["error"]["message"]
        status, body, _ = server.chat("again", max_tokens=1)
        assert status == 200 and body["choices"][0]["message"]["content"] == "x"
        assert 'edgeft_model_crashes{model="echo"} 1.0' in server.ask("/metrics")[1]


def test_an_answer_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    with serving(tmp_path, script(tmp_path, default="x" * 3000, delay_ms=20), "--timeout", "4") as server:
        status, body, _ = server.chat("go", max_tokens=3000)
        assert status == 504 and body["error"]["code"] == "timeout"
        assert server.chat("go", max_tokens=1)[0] == 200


def test_sides_of_a_split_are_kept(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.echo.json").write_text(json.dumps({"default": name}))
    with serving(tmp_path, "a.echo.json", "b.echo.json", "--ab", "both=a,b") as server:
        answers = [
            server.chat("hi", "both", user=f"user {number % 20}")[1]["choices"][0]["message"]["content"]
            for number in range(60)
        ]
        assert answers[:20] == answers[20:40] == answers[40:]
        assert {"a", "b"} == set(answers)
        assert {model["id"] for model in server.ask("/v1/models")[1]["data"]} == {"a", "b", "both"}


# --- Keys, logs, the end ------------------------------------------------------


def test_keys_and_rates(tmp_path: Path) -> None:
    good = {"Authorization": "Bearer " + "k" * 20}
    with serving(tmp_path, script(tmp_path), "--rate", "2", EDGEFT_SERVE_KEYS="k" * 20 + "," + "l" * 20) as server:
        body = {"model": "echo", "messages": say("hi")}
        assert server.ask("/v1/chat/completions", body)[0] == 401
        assert server.ask("/v1/chat/completions", body, {"Authorization": "Bearer wrong"})[0] == 401
        assert server.ask("/metrics")[0] == server.ask("/v1/models")[0] == 401
        assert server.ask("/health")[0] == 200
        assert [server.ask("/v1/chat/completions", body, good)[0] for _ in range(3)] == [200, 200, 429]
        assert server.ask("/v1/chat/completions", body, {"Authorization": "Bearer " + "l" * 20})[0] == 200
        server.stop()
        assert "kkkk" not in server.errors.read_text()


def test_others_are_let_in_with_a_key_only(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="there is no key"), serving(tmp_path, "echo", "--host", "0.0.0.0"):
        pass
    with pytest.raises(RuntimeError, match="shorter"), serving(tmp_path, "echo", EDGEFT_SERVE_KEYS="short"):
        pass


@pytest.mark.parametrize("asked", [False, True])
def test_prompts_are_logged_only_when_asked_for(tmp_path: Path, asked: bool) -> None:
    with serving(tmp_path, script(tmp_path), *(["--log-prompts"] if asked else [])) as server:
        assert server.chat("a secret word")[0] == 200
        server.stop()
    line = next(event for event in server.events() if event["event"] == "request")
    assert line["model"] == "echo" and line["status"] == 200 and line["ttft_ms"] > 0 and line["completion_tokens"] == 13
    assert ("secret" in server.errors.read_text()) is asked
    with RequestLog(tmp_path / "log.sqlite") as log:
        assert (log.since(0)[0].request.answer == "a secret word") is asked
    assert any(b"secret" in file.read_bytes() for file in tmp_path.glob("log.sqlite*")) is asked


def test_feedback_is_stored_beside_the_request(server: Serving) -> None:
    identity = server.chat("good?")[1]["id"]
    assert server.ask("/v1/feedback", {"id": identity, "rating": "up", "comment": "yes"})[0] == 200
    assert server.ask("/v1/feedback", {"id": "nothing", "rating": "up"})[0] == 404
    assert server.ask("/v1/feedback", {"id": identity, "rating": "sideways"})[0] == 400
    with RequestLog(server.errors.parent / "log.sqlite") as log:
        assert [rated.rating for rated in log.since(0) if rated.request.id == identity] == [1]
    assert 'edgeft_feedback_total{model="echo",rating="up"} 1.0' in server.ask("/metrics")[1]


def test_metrics(server: Serving) -> None:
    server.chat("count me")
    page = server.ask("/metrics")[1]
    server.chat("count me", "nobody")
    assert 'edgeft_errors_total{code="model_not_found",model="unknown"}' in server.ask("/metrics")[1]
    for name in ("edgeft_requests_total", "edgeft_time_to_first_token_seconds_count", "edgeft_tokens_total"):
        assert f"{name}{{" in page


def test_streams_may_finish_when_the_server_is_told_to_stop(tmp_path: Path) -> None:
    with serving(tmp_path, script(tmp_path, default="x" * 50, delay_ms=20), "--grace", "20") as server:
        with server.stream("go") as events:
            next(events)
            server.process.send_signal(signal.SIGTERM)
            assert text_of(events) == "x" * 50
        assert server.process.wait(10) == 0


def test_streams_that_outlast_the_grace_time_end_with_an_error(tmp_path: Path) -> None:
    with serving(tmp_path, script(tmp_path, default="x" * 3000, delay_ms=20), "--grace", "0.5") as server:
        with server.stream("go", max_tokens=3000) as events:
            next(events)
            server.process.send_signal(signal.SIGTERM)
            assert list(events)[-1]["error"]["code"] == "shutting_down"
        assert server.process.wait(10) == 0


def test_a_model_that_cannot_be_loaded_is_said_at_once(tmp_path: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"GGUF nothing")
    with pytest.raises(RuntimeError, match=r"broken\.gguf"), serving(tmp_path, "broken.gguf"):
        pass


# --- A real model -------------------------------------------------------------


@pytest.fixture(scope="module")
def real(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    folder = tmp_path_factory.mktemp("real")
    with (
        serving(folder, f"smollm2={smollm2_gguf}") as running,
        openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as made,
    ):
        yield made


@pytest.mark.model
def test_a_real_model_streams_what_it_answers_whole(real: openai.OpenAI) -> None:
    asked: Any = {"model": "smollm2", "messages": say("Name a colour."), "max_tokens": 12, "temperature": 0}
    # Once before: with the prompt in the cache its last token is computed in a smaller batch, and rounded otherwise.
    real.chat.completions.create(**asked)
    whole = real.chat.completions.create(**asked).choices[0].message.content
    stream = real.chat.completions.create(**asked, stream=True)
    assert whole and "".join(chunk.choices[0].delta.content or "" for chunk in stream) == whole


@pytest.mark.model
def test_a_real_model_keeps_to_a_schema_and_calls_the_tool_it_must(real: openai.OpenAI) -> None:
    parameters = LIGHT["function"]["parameters"]  # type: ignore[index]
    shape: Any = {"type": "json_schema", "json_schema": {"name": "light", "schema": parameters}}
    answer = real.chat.completions.create(
        model="smollm2", messages=say("Light in the hall."), max_tokens=60, response_format=shape
    )
    assert set(json.loads(answer.choices[0].message.content or "")) == {"room"}
    tools: Any = [LIGHT]
    called = real.chat.completions.create(
        model="smollm2", messages=say("Light in the hall."), max_tokens=60, tools=tools, tool_choice="required"
    )
    assert called.choices[0].finish_reason == "tool_calls"
    function: Any = called.choices[0].message.tool_calls[0]  # type: ignore[index]
    assert function.function.name == "light" and set(json.loads(function.function.arguments)) == {"room"}


@pytest.mark.model
def test_a_schema_that_cannot_be_kept_is_refused(real: openai.OpenAI) -> None:
    shape: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "integer", "multipleOf": 3}}}
    with pytest.raises(openai.BadRequestError, match="multipleOf"):
        real.chat.completions.create(model="smollm2", messages=say("hi"), response_format=shape)


# --- Adapters and cascades ----------------------------------------------------


def test_an_adapter_answers_under_its_own_name(tmp_path: Path) -> None:
    """Of a model whose answers depend on its last token, an adapter on the head makes other answers."""
    model = write_scripted(tmp_path / "base.gguf", chain_of("aaaa"))
    a, b = np.zeros((1, 288), np.float32), np.zeros((tiny_gguf.VOCABULARY, 1), np.float32)
    a[0, ord("\n")], b[ord("b"), 0] = 1, 20  # after the line break that ends the prompt: "b", not "a"
    adapter = write_adapter(tmp_path / "b.gguf", "output.weight", a, b, alpha=1)
    with serving(tmp_path, str(model), "--adapter", f"other={adapter}", "--max-tokens", "1") as server:
        assert [one["id"] for one in server.ask("/v1/models")[1]["data"]] == ["base", "base:other"]
        said = {
            name: server.chat("hi", name)[1]["choices"][0]["message"]["content"]
            for name in ("base", "base:other", "base")
        }
        assert said == {"base": "a", "base:other": "b"}
    with (
        pytest.raises(RuntimeError, match=r"b\.gguf"),
        serving(tmp_path, "echo", "--runtime", "echo", "--adapter", f"x={adapter}"),
    ):
        pass


CASCADE = """
[local]
model = "small.echo.json"
runtime = "echo"
[[cloud]]
name = "cloud"
url = "{url}/v1"
model = "echo"
price-out = 1.0
[policy]
kind = "cloud-only"
[privacy]
redact = false
"""


def test_a_cascade_is_a_model_that_says_who_wrote_what(tmp_path: Path, server: Serving) -> None:
    pytest.importorskip("edgeft.cascade")
    (tmp_path / "small.echo.json").write_text('{"default": "from the device"}')
    (tmp_path / "hybrid.toml").write_text(CASCADE.format(url=server.url))
    with serving(tmp_path, "hybrid.toml", EDGEFT_CLOUD_KEY="k" * 20) as running:
        with running.stream("a question", "hybrid") as events:
            chunks = list(events)
        assert text_of(iter(chunks)) == "a question"
        assert next(chunk["edgeft"]["author"] for chunk in chunks if "edgeft" in chunk) == "cloud"
        whole = running.chat("a question", "hybrid")[1]
        assert whole["edgeft"]["author"] == "cloud"
        assert 'edgeft_deferrals_total{model="hybrid",reason="cloud only"} 2.0' in running.ask("/metrics")[1]
        server_log = [event for event in running.events() if event["event"] == "request"]
        assert all(event["cost"] > 0 and event["deferral"] == "cloud only" for event in server_log)
