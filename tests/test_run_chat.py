"""`edgeft run` and `edgeft chat` as a person and as a script meet them; on the scripted runtime and a tiny GGUF."""

import contextlib
import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_gguf import ANSWER, chain_of, write_random, write_scripted

from edgeft import plugins
from edgeft.artifact import Manifest, write_manifest
from edgeft.cli.main import main
from edgeft.errors import ExitCode, ModelError
from edgeft.history import History
from edgeft.paths import history_file
from edgeft.plugins import Support

SCRIPT = {"script": {"joke": ["first joke", "second joke"], "greet": "Hello there."}}
SLOW = {"default": "word " * 400, "delay_ms": 10}
"""Twenty seconds, if nobody stops it."""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("m.echo.json").write_text(json.dumps(SCRIPT))
    Path("slow.echo.json").write_text(json.dumps(SLOW))
    Path("long.echo.json").write_text(json.dumps({"prompt_delay_ms": 1000}))


@pytest.fixture
def feed(monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], None]:
    """What comes through the pipe on stdin."""
    return lambda data: monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))


@contextlib.contextmanager
def started(*arguments: str, **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """The command as its own process."""
    command = [sys.executable, "-m", "edgeft", *arguments]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    with subprocess.Popen(command, **pipes) as process:
        try:
            yield process
        finally:
            process.kill()


# --- run ----------------------------------------------------------------------


def test_an_answer_is_all_there_is_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "m.echo.json", "greet me"]) == ExitCode.OK
    assert capsys.readouterr() == ("Hello there.\n", "")


@pytest.mark.parametrize("arguments", [["-"], []], ids=["dash", "left out"])
def test_the_prompt_comes_through_a_pipe(
    arguments: list[str], feed: Callable[[bytes], None], capsys: pytest.CaptureFixture[str]
) -> None:
    feed("two lines\nnaïve\n".encode())
    assert main(["run", "m.echo.json", *arguments]) == ExitCode.OK
    assert capsys.readouterr().out == "two lines\nnaïve\n"


@pytest.mark.parametrize("data", [b"", b"\n", b"caf\xe9"])
def test_a_prompt_that_is_none_is_a_usage_error(
    data: bytes, feed: Callable[[bytes], None], capsys: pytest.CaptureFixture[str]
) -> None:
    feed(data)
    assert main(["run", "m.echo.json"]) == ExitCode.USAGE
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: the prompt")


def test_json_is_one_object_with_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "m.echo.json", "greet me", "--json"]) == ExitCode.OK
    result = json.loads(capsys.readouterr().out)
    assert (result["text"], result["runtime"], result["model"]) == ("Hello there.", "echo", "m.echo.json")
    assert result["usage"]["completion_tokens"] == len("Hello there.")
    assert result["usage"]["finish_reason"] == "stop"
    assert "logprobs" not in result


def test_log_probabilities_come_with_their_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "m.echo.json", "greet me", "--json", "--logprobs", "2"]) == ExitCode.OK
    first, *rest = json.loads(capsys.readouterr().out)["logprobs"]
    assert first["text"] == "H" and first["top"][0]["text"] == "H" and len(first["top"]) == 2
    assert len(rest) == len("ello there.")


def test_log_probabilities_need_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "m.echo.json", "hi", "--logprobs", "2"]) == ExitCode.USAGE
    assert "--json" in capsys.readouterr().err


def test_stop_strings(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "m.echo.json", "one two three", "--stop", " th", "--stop", "zzz"]) == ExitCode.OK
    assert capsys.readouterr().out == "one two\n"


def test_raw_leaves_the_template_out(capsys: pytest.CaptureFixture[str]) -> None:
    Path("plain.echo.json").write_text(json.dumps({"chat": False}))
    assert main(["run", "plain.echo.json", "hi"]) == ExitCode.FAILED
    assert "no chat template" in capsys.readouterr().err
    assert main(["run", "plain.echo.json", "hi", "--raw"]) == ExitCode.OK
    assert main(["run", "plain.echo.json", "hi", "--raw", "--system", "x"]) == ExitCode.USAGE


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-tokens", "0"], "max-tokens"),
        (["--temperature", "-1"], "temperature"),
        (["--adapter", "none.gguf"], "no adapter file none.gguf"),
        (["--adapter", "none.gguf=0.5"], "no adapter file none.gguf"),
        (["--json-schema", "none.json"], "none.json"),
        (["--json-schema", "m.txt"], "m.txt is not JSON"),
        (["--json-schema", "list.json"], "must be an object"),
        (["--json-schema", "m.echo.json"], "cannot follow a JSON schema"),
    ],
    ids=" ".join,
)
def test_flags_that_cannot_work(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("m.txt").write_text("{")
    Path("list.json").write_text("[]")
    assert main(["run", "m.echo.json", "hi", *arguments]) == ExitCode.USAGE
    captured = capsys.readouterr()
    assert message in captured.err and captured.out == ""


def test_a_runtime_nobody_has_lists_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "m.echo.json", "hi", "--runtime", "nope"]) == ExitCode.FAILED
    assert "xllamacpp" in capsys.readouterr().err


def test_a_name_that_is_no_file_echoes_when_asked_to(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "anything", "hi", "--runtime", "echo"]) == ExitCode.OK
    assert capsys.readouterr().out == "hi\n"


def test_flag_over_environment_over_project_over_user_over_default(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, user_folders: Path
) -> None:
    def length(*flags: str) -> int:
        assert main(["run", "m.echo.json", "x" * 600, *flags]) == ExitCode.OK
        return len(capsys.readouterr().out.strip())

    assert length() == 512
    (user_folders / "config.toml").write_text("[run]\nmax-tokens = 50\n")
    assert length() == 50
    Path("edgeft.toml").write_text("[run]\nmax-tokens = 40\n")
    assert length() == 40
    monkeypatch.setenv("EDGEFT_RUN_MAX_TOKENS", "30")
    assert length() == 30
    assert length("--max-tokens", "20") == 20


def test_a_script_that_is_not_there_is_no_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "typo.echo.json", "hi"]) == ExitCode.USAGE
    assert "no model 'typo.echo.json'" in capsys.readouterr().err


def test_a_file_no_runtime_reads_says_what_each_one_thinks(capsys: pytest.CaptureFixture[str]) -> None:
    Path("notes.txt").write_text("nothing")
    assert main(["run", "notes.txt", "hi"]) == ExitCode.FAILED
    errors = capsys.readouterr().err
    assert "no runtime can run" in errors and "notes.txt is not a GGUF file" in errors and "echo: " in errors


def test_a_run_must_be_exported_first(capsys: pytest.CaptureFixture[str]) -> None:
    Path("model").mkdir()
    Path("model/config.json").write_text("{}")
    assert main(["run", "model", "hi"]) == ExitCode.USAGE
    assert "edgeft export model --to gguf-q4" in capsys.readouterr().err


def test_every_run_setting_is_a_flag_of_both_commands(capsys: pytest.CaptureFixture[str]) -> None:
    from edgeft.config import SCHEMA

    for verb in ("run", "chat"):
        main([verb, "--help"])
        shown = capsys.readouterr().out
        assert all(f"--{key.name[4:]}" in shown for key in SCHEMA if key.name.startswith("run."))


def test_ctrl_c_keeps_the_partial_answer_and_exits_130() -> None:
    with started("run", "slow.echo.json", "hi") as process:
        assert process.stdout is not None
        process.stdout.read(10)
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=20)
    assert process.returncode == ExitCode.INTERRUPTED
    assert rest.endswith(b"\n") and len(rest) < 900 and errors == b""


def test_ctrl_c_with_json_still_gives_the_object() -> None:
    with started("run", "slow.echo.json", "hi", "--json") as process:
        time.sleep(1.5)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=20)
    assert process.returncode == ExitCode.INTERRUPTED
    result = json.loads(out)
    assert result["usage"]["finish_reason"] == "cancel"


@pytest.mark.parametrize("kind", ["echo", "gguf"])
def test_ctrl_c_is_heard_during_the_prompt(kind: str, tmp_path: Path) -> None:
    model = "long.echo.json"
    if kind == "gguf":
        pytest.importorskip("xllamacpp")
        model = str(write_random(tmp_path / "random.gguf", context=65536))
    Path("prompt.txt").write_text("all work and no play " * 3000)
    arguments = ["run", model, "-", "--context", "65536", "--json", "--raw", "--threads", "1", "--threads-batch", "1"]
    with Path("prompt.txt").open() as prompt, started(*arguments, stdin=prompt) as process:
        time.sleep(3)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        sent = time.monotonic()
        out, _ = process.communicate(timeout=20)
    assert process.returncode == ExitCode.INTERRUPTED
    assert time.monotonic() - sent < 5
    assert json.loads(out)["usage"]["completion_tokens"] == 0


def test_a_reader_that_leaves_ends_the_answer() -> None:
    command = f"{sys.executable} -m edgeft run slow.echo.json hi --max-tokens 9999 | head -c 3"
    begun = time.monotonic()
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=30)
    assert (result.stdout, result.stderr) == ("wor", "")
    assert time.monotonic() - begun < 15


def test_the_runtime_of_the_guide_works_as_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from importlib.metadata import EntryPoint

    guide = (Path(__file__).parent.parent / "docs" / "adding-a-runtime.md").read_text()
    Path("edgeft_shout.py").write_text(guide.split("```python\n")[1].split("```")[0])
    monkeypatch.syspath_prepend(Path.cwd())
    point = EntryPoint("shout", "edgeft_shout:runtime", "edgeft.runtimes")
    monkeypatch.setattr(plugins, "_entry_points", lambda family: [point] if family == "runtimes" else [])
    Path("m.shout").write_text("hello there\n")
    assert main(["run", "m.shout", "hi"]) == ExitCode.OK
    assert main(["chat", "m.shout", "--list"]) == ExitCode.OK
    assert capsys.readouterr().out.startswith("HELLO THERE\n")


class Broken:
    """A stranger's runtime that fails where it is told to."""

    name = "broken"

    def __init__(self, *where: str) -> None:
        self.where = where

    def supports(self, artifact: object) -> Support:
        if "supports" in self.where:
            raise OSError("libbroken.so is gone")
        return Support(True)

    def load(self, artifact: object, options: object) -> None:
        raise ValueError("bad magic")


@pytest.mark.parametrize(
    ("where", "flags", "message"),
    [
        (["supports"], [], "broken: the runtime 'broken' failed: OSError: libbroken.so is gone"),
        (["supports"], ["--runtime", "broken"], "the runtime 'broken' failed: OSError: libbroken.so is gone"),
        (["load"], [], "the runtime 'broken' failed: ValueError: bad magic"),
    ],
)
def test_a_strangers_runtime_that_breaks_is_one_message(
    where: list[str],
    flags: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from types import SimpleNamespace

    point = SimpleNamespace(name="broken", value="broken:runtime", load=lambda: Broken(*where))
    monkeypatch.setattr(plugins, "_entry_points", lambda family: [point] if family == "runtimes" else [])
    Path("m.bin").write_text("")
    assert main(["run", "m.bin", "hi", *flags]) == ExitCode.FAILED
    assert message in capsys.readouterr().err


# --- A GGUF -------------------------------------------------------------------


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    """A model that says ANSWER to everything, made for conversations with a system prompt."""
    pytest.importorskip("xllamacpp")
    path = write_scripted(tmp_path / "said.gguf", chain_of(ANSWER))
    write_manifest(path, Manifest("gguf", "gguf-f32", {"F32": 1}, 1, 32.0, 4, "0", system="Be a house."))
    return path


def test_running_a_gguf_imports_neither_torch_nor_transformers(gguf: Path) -> None:
    code = (
        f"from edgeft.cli.main import main; code = main(['run', {str(gguf)!r}, 'hi'])\n"
        "import sys; print(code, *sorted(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    answer, modules = result.stdout.splitlines()[0], result.stdout.splitlines()[-1].split()
    assert answer == ANSWER and modules[0] == "0"
    assert not set(modules) & {"torch", "transformers", "peft", "numpy", "gguf", "datasets"}


def prompt_tokens(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    assert main(["run", *arguments, "--json", "--threads", "1", "--threads-batch", "1"]) == ExitCode.OK
    captured = capsys.readouterr()
    return json.loads(captured.out)["usage"]["prompt_tokens"], captured.err


def test_the_system_prompt_of_the_training_is_used_and_said(gguf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained, note = prompt_tokens(capsys, str(gguf), "hi")
    assert "Be a house." in note
    given, silent = prompt_tokens(capsys, str(gguf), "hi", "--system", "Be a house.")
    assert (given, silent) == (trained, "")
    without, _ = prompt_tokens(capsys, str(gguf), "hi", "--system", "")
    assert without < trained


def test_json_that_validates_comes_out(gguf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    schema = {"type": "object", "properties": {"on": {"type": "boolean"}}, "required": ["on"]}
    Path("call.json").write_text(json.dumps(schema))
    assert main(["run", str(gguf), "hi", "--json-schema", "call.json", "--system", ""]) == ExitCode.OK
    assert set(json.loads(capsys.readouterr().out)) == {"on"}


# --- chat, piped --------------------------------------------------------------


def conversation(number: int) -> list[tuple[str, str, str]]:
    with History(history_file()) as history:
        return [(one.role, one.content, one.state) for one in history.conversation(number).messages]


Chat = Callable[..., tuple[str, str]]


@pytest.fixture
def chat(feed: Callable[[bytes], None], capsys: pytest.CaptureFixture[str]) -> Chat:
    """Chat through pipes; what stood on stdout and stderr."""

    def talk(text: str, *arguments: str, code: int = ExitCode.OK) -> tuple[str, str]:
        feed(text.encode())
        assert main(["chat", *arguments]) == code
        captured = capsys.readouterr()
        return captured.out, captured.err

    return talk


def test_answers_stand_on_stdout_and_speed_on_stderr(chat: Chat) -> None:
    out, err = chat("greet me\n\ntell a joke\n", "m.echo.json")
    assert out == "Hello there.\nfirst joke\n"
    assert err.count("tokens/s") == 2 and "first token" in err and "/4096" in err


def test_the_conversation_is_stored_and_resumed(chat: Chat) -> None:
    chat("greet me", "m.echo.json")
    _, err = chat("and again", "--resume")
    assert "2 messages so far" in err
    assert [role for role, *_ in conversation(1)] == ["user", "assistant"] * 2
    chat("third", "m.echo.json", "--resume", "1")
    assert len(conversation(1)) == 6


def test_a_conversation_is_resumed_from_another_folder(
    chat: Chat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat("greet me", "m.echo.json")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert chat("greet me", "--resume")[0] == "Hello there.\n"


def test_retry_takes_the_next_seed_and_withdraws_the_old_answer(chat: Chat) -> None:
    out, _ = chat("tell a joke\n/retry\n/retry\n", "m.echo.json", "--temperature", "1")
    assert out == "first joke\nsecond joke\nfirst joke\n"
    assert conversation(1) == [("user", "tell a joke", "done"), ("assistant", "first joke", "done")]


def test_reset_begins_a_new_conversation(chat: Chat) -> None:
    chat("one\n/reset\ntwo\n", "m.echo.json")
    assert [conversation(1)[0][1], conversation(2)[0][1]] == ["one", "two"]


def test_messages_of_many_lines(chat: Chat) -> None:
    assert chat('one \\\ntwo\n"""\nthree\n\nfour\n"""\n', "m.echo.json")[0] == "one \ntwo\nthree\n\nfour\n"


def test_a_block_that_is_never_closed_is_still_a_message(chat: Chat) -> None:
    assert chat('"""\nlast words', "m.echo.json")[0] == "last words\n"


def test_two_slashes_are_one_in_a_message(chat: Chat) -> None:
    assert chat("//etc/hosts\n", "m.echo.json")[0] == "/etc/hosts\n"


def test_save_as_training_data_and_as_text(chat: Chat) -> None:
    chat("greet me\n/system Be brief.\n/save talk.jsonl\n/save 'my talk.md'\n", "m.echo.json")
    saved = json.loads(Path("talk.jsonl").read_text())
    assert [message["role"] for message in saved["messages"]] == ["system", "user", "assistant"]
    text = Path("my talk.md").read_text()
    assert "* system: Be brief." in text and "temperature 0," in text and "Hello there.\n" in text
    chat("greet me\n/set temperature 0.5\n/retry\n/save all.json\n", "m.echo.json")
    (whole,) = json.loads(Path("all.json").read_text())
    assert whole["edgeft"]["messages"][-1]["sampling"]["temperature"] == 0.5
    assert whole["edgeft"]["messages"][-1]["sampling"]["seed"] == 1
    assert [message["role"] for message in whole["messages"]] == ["user", "assistant"]


def test_save_overwrites_nothing(chat: Chat) -> None:
    _, err = chat("greet me\n/save m.echo.json\n", "m.echo.json", code=ExitCode.USAGE)
    assert "m.echo.json exists" in err and json.loads(Path("m.echo.json").read_text()) == SCRIPT


def test_exit_leaves_at_once(chat: Chat) -> None:
    assert chat("/exit\ngreet me\n", "m.echo.json")[0] == ""


@pytest.mark.parametrize("line", ["/nope", "/retry", "/save"])
def test_a_command_that_cannot_work_says_so(chat: Chat, line: str) -> None:
    _, err = chat(f"{line}\n", "m.echo.json", code=ExitCode.USAGE)
    assert err.startswith("error: ")


def test_help_lists_every_command(chat: Chat) -> None:
    from edgeft.cli.chat import COMMANDS

    _, err = chat("/help\n", "m.echo.json")
    assert COMMANDS in err and all(f"/{name}" in err for name in ("reset", "system", "retry", "save", "list", "exit"))


def test_a_message_that_does_not_fit_is_not_left_in_the_way(chat: Chat) -> None:
    _, err = chat("x" * 500, "m.echo.json", "--context", "256", code=ExitCode.FAILED)
    assert "the context holds 256" in err
    assert chat("greet me", "--resume", "1")[0] == "Hello there.\n"


def test_an_answer_that_fails_half_way_is_kept(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgeft.runtimes.echo import EchoSession

    def breaks(self: EchoSession, turn: int) -> None:
        if len(self._cached) > 20:
            raise ModelError("the model has gone")

    monkeypatch.setattr(EchoSession, "_check_turn", breaks)
    _, err = chat("greet me", "m.echo.json", code=ExitCode.FAILED)
    assert "the model has gone" in err
    (_, (_, text, state)) = conversation(1)
    assert state == "stopped" and text and "Hello there.".startswith(text)


def test_answers_as_json_lines(chat: Chat) -> None:
    lines = [json.loads(line) for line in chat("greet me\ntell a joke\n", "m.echo.json", "--json")[0].splitlines()]
    assert [line["text"] for line in lines] == ["Hello there.", "first joke"]
    assert lines[1]["conversation"] == 1 and lines[1]["usage"]["reused_tokens"] > 0


def test_the_list_of_conversations(chat: Chat) -> None:
    assert json.loads(chat("", "--list", "--json")[0]) == []
    chat("greet me", "m.echo.json")
    (entry,) = json.loads(chat("", "--list", "--json")[0])
    assert (entry["id"], entry["title"], entry["messages"]) == (1, "greet me", 2)
    assert "greet me" in chat("", "--list")[0]


def test_no_history_leaves_no_file(chat: Chat) -> None:
    chat("greet me", "m.echo.json", "--no-history")
    assert not history_file().exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "which model?"),
        (["--resume"], "no conversation to resume"),
        (["--resume", "7"], "no conversation 7"),
        (["--resume", "m.echo.json"], "m.echo.json --resume"),
        (["m.echo.json", "--resume", "--no-history"], "--no-history"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_chats_that_cannot_begin(chat: Chat, arguments: list[str], message: str) -> None:
    out, err = chat("hi", *arguments, code=ExitCode.USAGE)
    assert message in err and out == ""


def test_a_process_that_dies_leaves_the_partial_answer() -> None:
    with started("chat", "slow.echo.json", stdin=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(b"hi\n")
        process.stdin.flush()
        process.stdout.read(200)
        process.kill()
    user, answer = conversation(1)
    assert user == ("user", "hi", "done")
    assert answer[2] == "writing" and "word ".startswith(answer[1][:5]) and len(answer[1]) > 50


def test_ctrl_c_in_a_pipe_keeps_the_partial_answer_and_exits_130() -> None:
    with started("chat", "slow.echo.json", stdin=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(b"hi\nthere\n")
        process.stdin.flush()
        process.stdout.read(20)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=20)
    assert process.returncode == ExitCode.INTERRUPTED
    (_, (_, text, state)) = conversation(1)
    assert state == "stopped" and text.startswith("word word")


# --- chat on a terminal -------------------------------------------------------


class Terminal:
    """A chat on a pseudo-terminal: type, and wait for what is shown."""

    def __init__(self, *arguments: str) -> None:
        self.shown = ""
        self._main, side = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "edgeft", *arguments], stdin=side, stdout=side, stderr=side, start_new_session=True,
            preexec_fn=_take_terminal, env={**os.environ, "TERM": "dumb"},
        )  # fmt: skip
        os.close(side)

    def type(self, text: str) -> None:
        os.write(self._main, text.encode())

    def wait_for(self, text: str, seconds: float = 20) -> str:
        """What was shown up to and with `text`; it is not looked at again."""
        end = time.monotonic() + seconds
        while text not in self.shown:
            ready, _, _ = select.select([self._main], [], [], max(0, end - time.monotonic()))
            assert ready, f"{text!r} never came: {self.shown!r}"
            self.shown += os.read(self._main, 4096).decode()
        before, _, self.shown = self.shown.partition(text)
        return before + text

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._main)


def _take_terminal() -> None:
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@pytest.fixture
def terminal() -> Iterator[Callable[..., Terminal]]:
    opened: list[Terminal] = []

    def open_(*arguments: str) -> Terminal:
        opened.append(Terminal(*arguments))
        return opened[-1]

    yield open_
    for one in opened:
        one.close()


def test_a_session_on_a_terminal(terminal: Callable[..., Terminal]) -> None:
    screen = terminal("chat", "slow.echo.json")
    screen.wait_for("Ctrl-D leaves")
    screen.wait_for("> ")
    screen.type("hi\n")
    screen.wait_for("word word word")
    screen.type("\x03")
    screen.wait_for("stopped")
    screen.wait_for("> ")
    screen.type("/nope\n")
    screen.wait_for("error: no command /nope")
    screen.wait_for("> ")
    screen.type("half a li\x03")
    screen.wait_for("Ctrl-D leaves")
    screen.wait_for("> ")
    screen.type("\x04")
    assert screen.process.wait(timeout=20) == ExitCode.OK
    (user, (_, text, state)) = conversation(1)
    assert user == ("user", "hi", "done")
    assert state == "stopped" and text.startswith("word word word")


def test_run_without_a_prompt_on_a_terminal_does_not_wait(terminal: Callable[..., Terminal]) -> None:
    screen = terminal("run", "m.echo.json")
    screen.wait_for("error: there is no prompt")
    assert screen.process.wait(timeout=20) == ExitCode.USAGE


# --- The real model -----------------------------------------------------------


@pytest.mark.model
def test_a_second_turn_on_the_real_model_reads_only_what_is_new(smollm2_gguf: Path, chat: Chat) -> None:
    arguments = [str(smollm2_gguf), "--json", "--max-tokens", "8", "--threads", "1", "--threads-batch", "1"]
    first, second = chat("What is the capital of France?\nAnd of Italy?\n", *arguments)[0].splitlines()
    before, after = json.loads(first), json.loads(second)
    assert before["text"] and after["text"]
    usage = before["usage"]
    assert after["usage"]["reused_tokens"] >= usage["prompt_tokens"] + usage["completion_tokens"] - 1
