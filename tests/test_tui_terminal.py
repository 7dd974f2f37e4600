"""The screen in a real pseudo-terminal: cut connections, resizing, a full disk, a killed program."""

from __future__ import annotations

import json
import random
import resource
import signal
import sys
import time
from pathlib import Path

import pytest

from edgeft.history import History
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
