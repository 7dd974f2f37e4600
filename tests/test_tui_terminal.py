"""The screen in a real pseudo-terminal: cut connections, resizing, a full disk, a killed program."""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from edgeft import jobs
from edgeft.history import History
from edgeft.jobs.store import read_state
from edgeft.paths import history_file
from edgeft.tui.chat import TOO_LATE_S
from edgeft.tui.place import ChatPlace, last_chat
from tests.terminal import Terminal

EDGEFT = str(Path(sys.executable).with_name("edgeft"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "slow.echo.json").write_text(json.dumps({"default": "word " * 4000, "delay_ms": 5}))
    (tmp_path / "quick.echo.json").write_text(json.dumps({"default": "an answer"}))
    return tmp_path


def chat(folder: Path, model: str, **options: object) -> Terminal:
    return Terminal([EDGEFT, "chat", model, "--screen"], folder, **options)  # type: ignore[arg-type]


def last_answer() -> tuple[str, str]:
    """Text and state of the newest message in the history."""
    with History(history_file()) as history:
        number = history.latest()
        assert number is not None
        message = history.conversation(number).messages[-1]
    return message.content, message.state


def test_a_lost_terminal_loses_nothing_and_the_next_start_goes_on_there(folder: Path) -> None:
    with chat(folder, "slow.echo.json") as terminal:
        terminal.wait_for("context 0/")
        terminal.send("hello\r")
        terminal.wait_for("word word word")
        terminal.send("half a thought")
        terminal.wait_for("half a thought")
        drawn = terminal.drawn.count("word")
        terminal.hang_up()
        assert terminal.ends() == 129
    content, state = last_answer()
    assert state == "stopped"
    assert content.count("word") > 2
    assert drawn > 2
    place = last_chat()
    assert place is not None
    assert place.draft == "half a thought"
    assert place.conversation is not None
    with Terminal([EDGEFT, "tui"], folder) as terminal:
        terminal.wait_for("half a thought")
        terminal.wait_for("(stopped)")
        terminal.send("\x11")  # Ctrl+Q
        assert terminal.ends() == 0, terminal.drawn[-3000:]


def test_a_killed_screen_loses_no_more_than_half_a_second(folder: Path) -> None:
    with chat(folder, "slow.echo.json") as terminal:
        terminal.wait_for("context 0/")
        terminal.send("hello\r")
        terminal.wait_for("word word word")
        terminal.send("a draft")
        terminal.wait_for("a draft")
        terminal.wait_until(lambda: (last_chat() or ChatPlace("")).draft == "a draft", "the draft is kept", 10)
        terminal.wait_until(lambda: last_answer()[0].count("word") > 2, "the answer is kept while it grows", 30)
        kept = last_answer()[0]
        terminal.process.send_signal(signal.SIGKILL)
        assert terminal.ends() == -signal.SIGKILL
    assert last_answer()[0].startswith(kept)


def test_what_was_left_by_intention_does_not_come_back(folder: Path) -> None:
    with chat(folder, "quick.echo.json") as terminal:
        terminal.wait_for("context 0/")
        terminal.send("hello\r")
        terminal.wait_for("tokens/s")
        terminal.wait_until(lambda: last_chat() is not None, "the place is kept", 10)
        time.sleep(TOO_LATE_S + 0.5)
        terminal.send("\x1b")
        terminal.wait_until(lambda: last_chat() is None, "the place is left", 10)
        terminal.send("\x11")
        assert terminal.ends() == 0, terminal.drawn[-3000:]


def test_a_storm_of_sizes_while_an_answer_streams(folder: Path) -> None:
    numbers = random.Random(0)
    with chat(folder, "slow.echo.json") as terminal:
        terminal.wait_for("context 0/")
        terminal.send("hello\r")
        terminal.wait_for("word word word")
        for _ in range(150):
            terminal.window_changed(numbers.randint(1, 200), numbers.randint(1, 60))
            terminal.read(0.01)
        terminal.window_changed(80, 24)
        before = len(terminal.raw)
        terminal.send("still here")
        terminal.wait_until(lambda: b"here" in terminal.raw[before:], "keys are answered")
        terminal.wait_until(lambda: last_answer()[0].count("word") > 2, "the answer is kept while it grows", 30)
        terminal.send("\x11")
        assert terminal.ends() == 0, terminal.drawn[-3000:]


def test_a_full_disk_is_said_and_the_conversation_goes_on(folder: Path) -> None:
    with chat(folder, "quick.echo.json") as terminal:
        terminal.wait_for("context 0/")
        resource.prlimit(terminal.process.pid, resource.RLIMIT_FSIZE, (1024, 1024))  # no file grows from here on
        terminal.send("hello\r")
        terminal.wait_for("Nothing more is stored")
        terminal.wait_for("an answer")
        before = len(terminal.drawn)
        terminal.send("more\r")
        terminal.wait_until(lambda: "an answer" in terminal.drawn[before:], "a second answer")
        terminal.send("\x11")
        assert terminal.ends() == 0, terminal.drawn[-3000:]


def test_a_model_that_dies_in_an_answer_is_said_and_comes_back(folder: Path) -> None:
    with chat(folder, "slow.echo.json") as terminal:
        terminal.wait_for("context 0/")
        terminal.send("hello\r")
        terminal.wait_for("word word word")
        os.kill(model_of(terminal.process.pid), signal.SIGKILL)
        terminal.wait_for("process ended (signal 9)")
        content, state = last_answer()
        assert state == "stopped" and content.count("word") > 2
        before = len(terminal.drawn)
        terminal.send("again\r")
        terminal.wait_until(lambda: "word word" in terminal.drawn[before:], "a second answer")
        terminal.send("\x11")
        assert terminal.ends() == 0, terminal.drawn[-3000:]


def model_of(parent: int) -> int:
    """The process of the model, a child of the screen."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            if int(fields[1]) == parent and b"model_worker" in (folder / "cmdline").read_bytes():
                return int(folder.name)
    raise AssertionError("no model runs")


def test_a_history_that_is_damaged_meanwhile_is_said_and_all_is_stored_again(folder: Path) -> None:
    with chat(folder, "quick.echo.json") as terminal:
        terminal.wait_for("context 0/")
        terminal.send("hello\r")
        terminal.wait_for("tokens/s")
        for side in ("", "-wal", "-shm"):
            with open(f"{history_file()}{side}", "r+b") as file:
                file.write(b"no database " * 2000)
        terminal.send("more\r")
        terminal.wait_for("The history was damaged")
        terminal.wait_until(lambda: last_answer() == ("an answer", "done"), "it is stored anew", 30)
        terminal.send("\x11")
        assert terminal.ends() == 0, terminal.drawn[-3000:]
    with History(history_file()) as history:
        said = history.conversation(history.latest() or 0).messages
    assert [one.content for one in said] == ["hello", "an answer", "more", "an answer"]


def test_a_job_that_is_killed_is_told_on_its_screen(folder: Path) -> None:
    long = ("--max-tokens", "30000", "--context", "40000")
    job = jobs.start(("run", str(folder / "slow.echo.json"), "hello", *long))
    with Terminal([EDGEFT, "tui"], folder) as terminal:
        terminal.wait_for(job.id)
        terminal.send(f"/{job.id}\r")
        terminal.wait_for(f"edgeft jobs watch {job.id}")
        terminal.send("\r")
        terminal.wait_for("running, in")
        state = read_state(jobs.find_job(job.id))
        for name in ("supervisor", "command"):
            os.kill(state[name], signal.SIGKILL)
        terminal.wait_until(lambda: "failed" in terminal.drawn or "lost" in terminal.drawn, "how it ended")
        terminal.send("\x1b")
        terminal.send("\x11")
        assert terminal.ends() == 0, terminal.drawn[-3000:]


def test_a_message_that_is_longer_than_the_screen_can_be_read(folder: Path) -> None:
    name = "no-such-folder/" * 60 + "model.gguf"
    with chat(folder, name) as terminal:
        terminal.wait_for("not loaded")
        terminal.wait_for("model.gguf")
        terminal.send("still here")
        terminal.wait_for("still here")
        terminal.send("\x11")
        assert terminal.ends() == 0, terminal.drawn[-3000:]


@pytest.mark.skipif(shutil.which("tmux") is None, reason="tmux is not installed")
def test_copying_reaches_the_buffer_of_tmux(folder: Path) -> None:
    socket = f"edgeft-test-{os.getpid()}"

    def tmux(*arguments: str) -> str:
        return subprocess.run(["tmux", "-L", socket, *arguments], capture_output=True, text=True, check=False).stdout

    def wait_for(text: str, *arguments: str) -> None:
        end = time.monotonic() + 60
        while text not in tmux(*arguments):
            assert time.monotonic() < end, tmux("capture-pane", "-p")
            time.sleep(0.1)

    command = shlex.join([EDGEFT, "chat", "quick.echo.json", "--screen"])
    tmux("-f", "/dev/null", "new-session", "-d", "-x", "80", "-y", "24", "-c", str(folder), command)
    try:
        wait_for("context 0/", "capture-pane", "-p")
        tmux("send-keys", "hello", "Enter")
        wait_for("tokens/s", "capture-pane", "-p")
        tmux("send-keys", "F8")
        wait_for("an answer", "show-buffer")
    finally:
        tmux("kill-server")
