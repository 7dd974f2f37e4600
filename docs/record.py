"""Sessions for the README, recorded: `edgeft tui` in a real tmux, on a real model, as pictures that play.

    python docs/record.py [--model smollm2-135m] [--folder FOLDER] [--out docs/images]

Needs tmux. Keys are sent one after another; each step waits for what it is to show, never for a time, so a slow machine
records the same. What is on the pictures is what the program drew, with its figures on this machine.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from terminal_svg import Frame, svg

EDGEFT = str(Path(sys.executable).with_name("edgeft"))
WAIT_S = 600.0
SOCKET = f"edgeft-record-{os.getpid()}"


@dataclass(frozen=True)
class Step:
    """Keys, by tmux's names, or a text to type; what is shown when it is done; how long the picture stays."""

    keys: str | tuple[str, ...]
    until: str
    seconds: float = 2.0
    gone: str = ""
    """What is no longer shown when it is done."""
    follow: bool = False
    """Whether it is recorded on the way: an answer that streams."""


QUESTION = "Write a Python function that adds two numbers, and nothing else."


def narrow(model: str) -> list[Step]:
    """Home, a conversation, what can be done in it, what was said before."""
    return [
        Step((), f"edgeft chat {model}", 2.5),
        Step(("Enter",), "context 0/", 1.5),
        Step(QUESTION, "nothing else.", 1.5),
        Step(("Enter",), "first token", 4.0, follow=True),
        Step(("F4",), "This conversation", 3.0),
        Step(("Escape",), "first token", 0.5, gone="This conversation"),
        Step(("C-o",), "2 messages", 0.7),
        Step("adds", "«adds»", 2.5),
        Step(("Escape",), "first token", 0.5, gone="begun (UTC)"),
        Step(("C-t",), "system prompt", 2.5),
    ]


def wide(model: str) -> list[Step]:
    """What fits which device, a training with its plan, the actions of a model."""
    return [
        Step((), f"edgeft chat {model}", 2.0),
        Step(("a",), "Will it fit?", 2.5),
        Step("/fit", "devices fit", 0.7),
        Step(("Enter",), "devices fit", 0.3),
        Step(("Enter",), "rpi5-8g", 3.5),
        Step(("Escape",), f"edgeft chat {model}", 0.5, gone="rpi5-8g"),
        Step(("n",), "Begin", 2.0),
        Step(("Escape",), f"edgeft chat {model}", 0.5, gone="Begin"),
        Step(("C-p",), "Search", 0.7),
        Step("Train a", "edgeft train", 1.0),
        Step(("Enter",), "$ edgeft train", 0.7),
        Step(model, f"--model {model}", 0.7),
        Step(("Tab",), f"--model {model}", 0.1),
        Step("smart-home", "--data smart-home", 1.0),
        Step(("F5",), "examples", 4.0),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--folder", type=Path, help="where to start; by default an empty one")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "images")
    parser.add_argument("--only", choices=("80x24", "120x40"))
    options = parser.parse_args()
    sessions: dict[str, Callable[[str], list[Step]]] = {"80x24": narrow, "120x40": wide}
    with tempfile.TemporaryDirectory() as empty:
        for size, steps in sessions.items():
            if options.only in (None, size):
                columns, rows = map(int, size.split("x"))
                frames = record(steps(options.model), columns, rows, options.folder or Path(empty))
                file = options.out / f"tui-{size}.svg"
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(svg(frames, columns, rows, f"edgeft tui in a terminal of {size}"), encoding="utf-8")
                print(f"{file}: {len(frames)} frames, {file.stat().st_size / 1e3:.0f} kB")


def record(steps: Sequence[Step], columns: int, rows: int, folder: Path) -> list[Frame]:
    """Raises: SystemExit when a step does not show what it is to show."""
    frames: list[Frame] = []
    with tempfile.TemporaryDirectory() as home, _tmux(columns, rows, folder, Path(home)):
        for step in steps:
            _send(step.keys)
            for frame in _frames(step):
                if frames and frames[-1].lines == frame.lines:
                    frames[-1] = Frame(frame.lines, frames[-1].seconds + frame.seconds)
                else:
                    frames.append(frame)
    return frames


@contextmanager
def _tmux(columns: int, rows: int, folder: Path, home: Path) -> Iterator[None]:
    """The program in a tmux of its own, with a history of its own and the models that are here."""
    from edgeft.paths import models_dir

    (home / "models").symlink_to(models_dir())
    environment = {**os.environ, "EDGEFT_HOME": str(home), "COLORTERM": "truecolor", "TMUX": ""}
    begin = ["-f", "/dev/null", "new-session", "-d", "-x", str(columns), "-y", str(rows), "-c", str(folder)]
    command = [
        *begin,
        f"{EDGEFT} tui",
        ";",
        "set",
        "-g",
        "status",
        "off",
        ";",
        "set",
        "-g",
        "default-terminal",
        "tmux-256color",
    ]
    _run(*command, environment=environment)
    try:
        yield
    finally:
        _run("kill-server", environment=environment)


def _send(keys: str | tuple[str, ...]) -> None:
    if isinstance(keys, str):
        _run("send-keys", "-l", keys)
    elif keys:
        _run("send-keys", *keys)


def _frames(step: Step) -> Iterator[Frame]:
    end, last = time.monotonic() + WAIT_S, 0
    while True:
        time.sleep(0.25)
        lines = _shown()
        text = _run("capture-pane", "-p")
        done = step.until in text and not (step.gone and step.gone in text)
        if done and lines == _shown():
            yield Frame(lines, step.seconds)
            return
        # A slow machine writes for longer; the pictures are as many: one for every few words.
        words = len(text.split())
        if step.follow and words >= last + 12:
            last = words
            yield Frame(lines, 0.35)
        if time.monotonic() > end:
            sys.exit(f"not shown within {WAIT_S:.0f} s: {step.until!r}\n{text}")


def _shown() -> tuple[str, ...]:
    return tuple(_run("capture-pane", "-e", "-p").splitlines())


def _run(*arguments: str, environment: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        ["tmux", "-L", SOCKET, *arguments], env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout


if __name__ == "__main__":
    main()
