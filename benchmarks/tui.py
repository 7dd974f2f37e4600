"""How long the screen takes: to its first paint, and from a key to the letter on it, in a real pseudo-terminal.

    python benchmarks/tui.py [--json] [--keys 60] [--starts 9]

A letter is typed into a conversation and taken back; the time is from writing the key to the terminal to reading the
letter that was drawn. The model is the scripted one (`echo`), which sends a character at a time: what is measured is
the screen, not a model, and 400 characters/s are what 100 tokens/s of a model are to it, in more pieces. Starts are
compared with an empty Textual application, the two alternating.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.terminal import Terminal

EDGEFT = str(Path(sys.executable).with_name("edgeft"))
EMPTY = """
from textual.app import App
from textual.widgets import Label
class Empty(App):
    def compose(self):
        yield Label("drawn")
Empty().run()
"""
LETTERS = "QXZ"
"""In no text that is drawn otherwise."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--keys", type=int, default=60)
    parser.add_argument("--starts", type=int, default=9)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {
            "EDGEFT_HOME": f"{folder}/home",
            "EDGEFT_RUN_MAX_TOKENS": "200000",
            "EDGEFT_RUN_CONTEXT": "300000",
        }
        figures = measure(Path(folder), options.keys, options.starts)
    print(json.dumps(figures) if options.json else json.dumps(figures, indent=1))


def measure(folder: Path, keys: int, starts: int) -> dict[str, Any]:
    words = "the model said this and more of it, line after line. " * 6 + "\n\n"
    write_script(folder / "idle.echo.json", "fine", 0)
    write_script(folder / "stream.echo.json", words * 600, 2.5)
    write_script(folder / "long.echo.json", words * 160, 0.4)
    figures: dict[str, Any] = {"start": first_paints(folder, starts)}
    with conversation(folder, "idle.echo.json") as terminal:
        figures["idle"] = latencies(terminal, keys)
    with conversation(folder, "stream.echo.json") as terminal:
        terminal.send("go\r")
        terminal.wait_for("said this")
        figures["400 characters/s"] = latencies(terminal, keys)
        with busy_cores():
            figures["400 characters/s, both cores busy"] = latencies(terminal, keys)
        with training(folder):
            figures["400 characters/s, a training runs on both cores"] = latencies(terminal, keys)
    with conversation(folder, "long.echo.json") as terminal:
        terminal.send("go\r")
        terminal.wait_until(lambda: shown_characters(terminal) > 40_000, "a long answer", 240)
        figures["after 40,000 characters (10,000 tokens of a model), 2,000 characters/s"] = latencies(
            terminal, keys // 2
        )
    return figures | many_messages(folder, keys)


def write_script(file: Path, answer: str, delay_ms: float) -> None:
    file.write_text(json.dumps({"default": answer, "delay_ms": delay_ms}))


def first_paints(folder: Path, rounds: int) -> dict[str, float]:
    """Seconds from starting the program to its first paint, and those of an empty application."""
    ours, empty = [], []
    for _ in range(rounds + 1):
        ours.append(seconds_to([EDGEFT, "tui"], "bundle", folder))
        empty.append(seconds_to([sys.executable, "-c", EMPTY], "drawn", folder))
    ours, empty = ours[1:], empty[1:]
    return {
        "median_s": round(statistics.median(ours), 3),
        "worst_s": round(max(ours), 3),
        "empty_textual_app_s": round(statistics.median(empty), 3),
        "ratio": round(statistics.median(a / b for a, b in zip(ours, empty, strict=True)), 2),
    }


def seconds_to(command: Sequence[str], text: str, folder: Path) -> float:
    started = time.perf_counter()
    with Terminal(command, folder) as terminal:
        terminal.wait_for(text)
        return time.perf_counter() - started


@contextmanager
def conversation(folder: Path, model: str, *more: str) -> Iterator[Terminal]:
    with Terminal([EDGEFT, "chat", model, "--screen", *more], folder) as terminal:
        terminal.wait_for("context 0/")
        yield terminal


def latencies(terminal: Terminal, keys: int) -> dict[str, float]:
    """Milliseconds from a key to its letter."""
    found = []
    for letter in itertools.islice(itertools.cycle(LETTERS), keys):
        drain(terminal, 0.08)
        before = len(terminal.raw)
        started = time.perf_counter()
        terminal.send(letter)
        wanted = letter.encode()
        while wanted not in terminal.raw[before:]:
            terminal.read(1)
            assert time.perf_counter() - started < 20, "the letter was not drawn"
        found.append(1000 * (time.perf_counter() - started))
        terminal.send("\x7f")
        drain(terminal, 0.08)
    return summary(found)


def summary(found: Sequence[float]) -> dict[str, float]:
    return {
        "p50_ms": round(statistics.median(found), 1),
        "p95_ms": round(statistics.quantiles(found, n=20)[-1], 1),
        "worst_ms": round(max(found), 1),
    }


def drain(terminal: Terminal, seconds: float) -> None:
    end = time.perf_counter() + seconds
    while (left := end - time.perf_counter()) > 0:
        terminal.read(left)


def shown_characters(terminal: Terminal) -> int:
    """What the line below the conversation says of the growing answer."""
    import re

    found = re.findall(r"(\d+) characters", terminal.drawn[-20_000:])
    return int(found[-1]) if found else 0


@contextmanager
def busy_cores() -> Iterator[None]:
    """As many programs that never wait as there are cores."""
    spin = "import itertools\nfor _ in itertools.count(): pass"
    programs = [subprocess.Popen([sys.executable, "-c", spin]) for _ in range(os.cpu_count() or 1)]
    try:
        yield
    finally:
        for program in programs:
            program.kill()
            program.wait()


@contextmanager
def training(folder: Path) -> Iterator[None]:
    """A real one, of SmolLM2, that has begun to take steps."""
    run = folder / "run"
    command = [EDGEFT, "train", "--model", "smollm2-135m", "--data", "smart-home", "--out", str(run)]
    # The models that are here, not those of the empty folder that the screen is measured in.
    environment = {name: value for name, value in os.environ.items() if name != "EDGEFT_HOME"}
    with (folder / "train.txt").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        while not (run / "metrics.jsonl").is_file():
            assert process.poll() is None, (folder / "train.txt").read_text()
            time.sleep(0.5)
        yield
        assert process.poll() is None, "the training ended before the keys did"
    finally:
        process.kill()
        process.wait()


def scrolling(terminal: Terminal, keys: int) -> dict[str, float]:
    """Milliseconds from Page Up to what it shows; every few of them draw older messages."""
    return summary([until_drawn(terminal, "\x1b[5~") for _ in range(keys)])


def until_drawn(terminal: Terminal, keys: str) -> float:
    drain(terminal, 0.15)
    before, started = len(terminal.raw), time.perf_counter()
    terminal.send(keys)
    while len(terminal.raw) == before:
        terminal.read(1)
        assert time.perf_counter() - started < 20, "nothing was drawn"
    return 1000 * (time.perf_counter() - started)


def many_messages(folder: Path, keys: int) -> dict[str, Any]:
    """A conversation of 5,000 messages: seconds until it is drawn, keys in it, scrolling, searching in all of it."""
    from edgeft.history import Conversation, History
    from edgeft.paths import history_file

    with History(history_file()) as history:
        told = Conversation(str(folder / "idle.echo.json"), "echo", None, history)
        for number in range(2500):
            told.say(f"question {number}")
            told.begin_answer()
            told.end_answer(f"answer {number} in **bold** and `code`", None)
        number_of = told.id
    started = time.perf_counter()
    command = [EDGEFT, "chat", "idle.echo.json", "--screen", "--resume", str(number_of)]
    with Terminal(command, folder) as terminal:
        terminal.wait_for("answer 2499")
        shown = time.perf_counter() - started
        figures: dict[str, Any] = {"5,000 messages": {"shown_s": round(shown, 3), **latencies(terminal, keys)}}
        figures["5,000 messages, Page Up"] = scrolling(terminal, keys)
        terminal.send("\x0f")  # Ctrl+O
        terminal.wait_for("words to look for")
        figures["5,000 messages, searching in them"] = latencies(terminal, keys)
        return figures


if __name__ == "__main__":
    main()
