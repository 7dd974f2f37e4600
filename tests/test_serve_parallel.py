"""`edgeft serve --parallel`: answers beside each other, nobody's in another's, adapters right, turns kept."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_gguf
from serving import serving, text_of
from tiny_gguf import chain_of, write_adapter, write_random, write_scripted

from edgeft.chat import Cancel
from edgeft.serve.wardrobe import Wardrobe


def script(folder: Path, **values: Any) -> str:
    path = folder / "echo.echo.json"
    path.write_text(json.dumps(values))
    return str(path)


def wait_until(true: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_streams_run_beside_each_other_and_do_not_mix(tmp_path: Path) -> None:
    with serving(tmp_path, script(tmp_path, delay_ms=2), "--parallel", "4") as server:
        with server.stream("x" * 2000) as one, server.stream("y" * 2000) as two:
            next(one), next(two)  # the second has begun and the first has not ended
        texts = [f"stream {number} " * 20 for number in range(24)]
        with ThreadPoolExecutor(24) as pool:

            def ask(text: str) -> str:
                with server.stream(text) as events:
                    return text_of(events)

            assert list(pool.map(ask, texts)) == texts
        said = next(event for event in server.events() if event["event"] == "model")
        assert said["parallel"] == 4


def test_places_of_those_who_leave_are_given_to_others(tmp_path: Path) -> None:
    with serving(tmp_path, script(tmp_path, default="x" * 3000, delay_ms=20), "--parallel", "2") as server:
        for _ in range(3):
            with server.stream("a", max_tokens=3000) as one, server.stream("b", max_tokens=3000) as two:
                next(one), next(two)
        begun = time.monotonic()
        assert server.chat("again", max_tokens=1)[0] == 200
        assert time.monotonic() - begun < 10


def test_a_model_of_llama_cpp_answers_together_what_it_answers_alone(tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    model = write_random(tmp_path / "m.gguf")
    questions = [f"question {number} " * (1 + number % 4) for number in range(12)]
    answers: dict[str, list[str]] = {}
    for parallel in ("1", "4"):
        with (
            serving(tmp_path, str(model), "--parallel", parallel, "--context", "512") as server,
            ThreadPoolExecutor(12) as pool,
        ):

            def ask(text: str) -> str:
                with server.stream(text, "m", max_tokens=30) as events:
                    return text_of(events)

            answers[parallel] = list(pool.map(ask, questions))
    assert answers["1"] == answers["4"] and len(set(answers["1"])) > 6


def test_every_answer_is_written_under_the_adapter_it_asked_for(tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    model = write_scripted(tmp_path / "base.gguf", chain_of("a"))
    adapters: list[str] = []
    for letter in "bc":
        a, b = np.zeros((1, 288), np.float32), np.zeros((tiny_gguf.VOCABULARY, 1), np.float32)
        a[0, ord("\n")], b[ord(letter), 0] = 1, 20  # after the line break that ends the prompt
        file = write_adapter(tmp_path / f"{letter}.gguf", "output.weight", a, b, alpha=1)
        adapters += ["--adapter", f"{letter}={file}"]
    names = list(itertools.islice(itertools.cycle(["base", "base:b", "base", "base:c", "base:c"]), 60))
    with (
        serving(tmp_path, str(model), *adapters, "--max-tokens", "1", "--parallel", "4") as server,
        ThreadPoolExecutor(12) as pool,
    ):

        def ask(name: str) -> str:
            status, body, _ = server.chat("hi", name)
            assert status == 200, body
            return str(body["choices"][0]["message"]["content"])

        assert list(pool.map(ask, names)) == [{"base": "a"}.get(name, name[-1]) for name in names]


def test_a_runtime_without_slots_says_so(tmp_path: Path) -> None:
    address = "http://127.0.0.1:9/v1#m"
    with pytest.raises(RuntimeError, match="1 answers at a time, not 2"), serving(tmp_path, address, "--parallel", "2"):
        pass


# --- Whose turn it is ----------------------------------------------------------------------------


class Wearers:
    """Threads that ask for an adapter and hold it until they are told."""

    def __init__(self) -> None:
        self.changes: list[str | None] = []
        self.holding: list[tuple[str, str | None]] = []
        self.wardrobe = Wardrobe(self.changes.append)
        self._ends: dict[str, threading.Event] = {}
        self._threads: list[threading.Thread] = []

    def ask(self, who: str, name: str | None, cancel: Cancel | None = None) -> None:
        end = self._ends[who] = threading.Event()
        switch = Cancel() if cancel is None else cancel  # an unthrown switch is false

        def wear() -> None:
            with self.wardrobe.wearing(name, switch):
                self.holding.append((who, name))
                end.wait(20)
                self.holding.remove((who, name))

        self._threads.append(threading.Thread(target=wear))
        before = self.waiting
        self._threads[-1].start()
        wait_until(lambda: self.waiting > before or any(holder == who for holder, _ in self.holding))

    @property
    def waiting(self) -> int:
        return len(self.wardrobe._line)

    def end(self, who: str) -> None:
        self._ends[who].set()

    def join(self) -> None:
        for end in self._ends.values():
            end.set()
        for thread in self._threads:
            thread.join(20)


def test_adapters_change_when_nobody_writes_and_nobody_is_overtaken() -> None:
    wearers = Wearers()
    wearers.ask("one", None)
    wearers.ask("two", None)
    wearers.ask("three", "b")
    wearers.ask("four", None)  # could be answered now; then "three" might wait for ever
    assert sorted(wearers.holding) == [("one", None), ("two", None)] and wearers.waiting == 2
    wearers.end("one")
    wait_until(lambda: wearers.holding == [("two", None)])
    assert wearers.changes == []
    wearers.end("two")
    wait_until(lambda: wearers.holding == [("three", "b")])
    assert wearers.changes == ["b"]
    wearers.end("three")
    wait_until(lambda: wearers.holding == [("four", None)])
    assert wearers.changes == ["b", None]
    wearers.join()


def test_one_who_leaves_the_line_is_let_go_at_once_and_changes_nothing() -> None:
    wearers, cancel = Wearers(), Cancel()
    wearers.ask("one", None)
    wearers.ask("two", "b", cancel)
    wearers.ask("three", None)
    cancel.set()
    wait_until(lambda: len(wearers.holding) == 3)
    assert wearers.changes == []
    wearers.join()
