"""Two models side by side, driven by keys, on the scripted runtime."""

import asyncio
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner
from screens import keys
from test_cascade import closed_port, write_cascade
from textual.pilot import Pilot
from textual.widgets import Label, OptionList, Static

from edgeft.cli.main import cli
from edgeft.errors import UsageError
from edgeft.history import History
from edgeft.paths import history_file
from edgeft.tui.app import EdgeftApp
from edgeft.tui.chat import ChatScreen
from edgeft.tui.choose import Choose
from edgeft.tui.place import ChatPlace, last_chat
from edgeft.tui.side_by_side import Side, SideBySideScreen
from edgeft.tui.talk import Prompt, Said
from tests.test_tui import running, say, until


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one.echo.json").write_text(json.dumps({"default": "the first answer"}))
    (tmp_path / "two.echo.json").write_text(json.dumps({"default": "the second answer"}))
    (tmp_path / "slow.echo.json").write_text(json.dumps({"default": "word " * 400, "delay_ms": 20}))
    return tmp_path


async def opened(app: EdgeftApp, pilot: Pilot[None], first: str, second: str) -> SideBySideScreen:
    screen = SideBySideScreen(ChatPlace(first, against=second))
    app.push_screen(screen)
    await until(pilot, lambda: len(screen.query(Side)) == 2 and all(side.opened for side in screen.sides))
    return screen


def ended(screen: SideBySideScreen, messages: int) -> Callable[[], bool]:
    return lambda: (
        not screen.answering
        and all(
            len(side.conversation.messages) == messages and side.conversation.messages[-1].state != "writing"
            for side in screen.sides
        )
    )


def grown(side: Side) -> bool:
    return len(side.query(Said)) == 2 and len(side.query(Said).last().text) > 20


def status(side: Side) -> str:
    return str(side.query_one(".status", Static).render())


def stored(number: int) -> list[tuple[str, str, str]]:
    with History(history_file()) as history:
        return [(one.role, one.content, one.state) for one in history.conversation(number).messages]


@pytest.mark.parametrize(("columns", "beside"), [(80, False), (99, False), (100, True), (160, True)])
def test_both_answer_one_prompt_and_both_are_stored(folder: Path, columns: int, beside: bool) -> None:
    async def main() -> None:
        async with running((columns, 24)) as (app, pilot):
            screen = await opened(app, pilot, "one.echo.json", "two.echo.json")
            await say(pilot, "hello")
            await until(pilot, ended(screen, 2))
            first, second = screen.sides
            assert (first.region.y == second.region.y) == beside
            assert (first.region.x == second.region.x) != beside
            assert all("tokens/s" in status(side) and "context" in status(side) for side in screen.sides)
            assert all(said.region.height > 0 for side in screen.sides for said in side.query(Said).results(Said))

    asyncio.run(main())
    assert stored(1) == [("user", "hello", "done"), ("assistant", "the first answer", "done")]
    assert stored(2) == [("user", "hello", "done"), ("assistant", "the second answer", "done")]


def test_both_stream_at_once_and_esc_stops_both(folder: Path) -> None:
    async def main() -> None:
        async with running() as (app, pilot):
            screen = await opened(app, pilot, "slow.echo.json", "slow.echo.json")
            await say(pilot, "hello")
            await until(pilot, lambda: all(grown(side) for side in screen.sides))
            assert all(side.answering for side in screen.sides)
            await pilot.press("escape")
            await until(pilot, ended(screen, 2))
            assert app.screen is screen

    asyncio.run(main())
    for number in (1, 2):
        _, (_, text, state) = stored(number)
        assert state == "stopped"
        assert 20 < len(text) < 1900


@pytest.mark.parametrize(("key", "number"), [("f8", 1), ("f9", 2)])
def test_one_answer_is_kept_and_the_conversation_goes_on_with_it(folder: Path, key: str, number: int) -> None:
    async def main() -> None:
        async with running() as (app, pilot):
            screen = await opened(app, pilot, "one.echo.json", "two.echo.json")
            await say(pilot, "hello")
            await until(pilot, ended(screen, 2))
            kept, left = screen.sides[number - 1], screen.sides[2 - number]
            process, other = kept.process._process, left.process._process
            await pilot.press(*"more", key)
            await until(pilot, lambda: isinstance(app.screen, ChatScreen) and bool(app.screen.conversation.messages))
            chat = app.screen
            assert isinstance(chat, ChatScreen)
            assert chat._process._process is process  # the model is not loaded again
            assert other is not None
            await until(pilot, lambda: other.returncode is not None)
            assert chat.query_one(Prompt).text == "more"
            await pilot.press("enter")
            await until(pilot, lambda: len(chat.conversation.messages) == 4 and not chat.answering)

    asyncio.run(main())
    assert [len(stored(one)) for one in (number, 3 - number)] == [4, 2]


def test_a_model_that_dies_leaves_the_other_alone_and_comes_back(folder: Path) -> None:
    async def main() -> None:
        async with running() as (app, pilot):
            screen = await opened(app, pilot, "slow.echo.json", "slow.echo.json")
            first, second = screen.sides
            await say(pilot, "hello")
            await until(pilot, lambda: grown(first) and grown(second))
            assert first.process._process
            os.kill(first.process._process.pid, signal.SIGKILL)
            await until(pilot, lambda: not first.answering)
            assert second.answering
            assert "failed" in status(first)
            assert any("1: the model's process ended" in str(one.title) for one in app._notifications)
            await pilot.press("escape")
            await until(pilot, ended(screen, 2))
            await say(pilot, "again")
            await until(pilot, lambda: all(len(side.query(Said)) == 4 for side in screen.sides))
            await until(pilot, lambda: all(len(side.query(Said).last().text) > 20 for side in screen.sides))
            await pilot.press("escape")
            await until(pilot, ended(screen, 4))

    asyncio.run(main())
    assert all(len(stored(number)[1][1]) > 20 for number in (1, 2))
    assert [stored(1)[at][2] for at in (1, 3)] == ["stopped", "stopped"]


def test_a_model_that_cannot_be_loaded_leaves_the_other_alone(folder: Path) -> None:
    async def main() -> None:
        async with running() as (app, pilot):
            screen = SideBySideScreen(ChatPlace("nothing.gguf", against="two.echo.json"))
            app.push_screen(screen)
            await until(pilot, lambda: len(screen.query(Side)) == 2 and screen.sides[1].opened is not None)
            await until(pilot, lambda: "not loaded" in status(screen.sides[0]))
            await say(pilot, "hello")
            await until(pilot, lambda: len(screen.sides[1].conversation.messages) == 2 and not screen.answering)

    asyncio.run(main())
    assert stored(1) == [("user", "hello", "done")]
    assert stored(2)[1] == ("assistant", "the second answer", "done")


def test_a_cut_connection_loses_neither_answer_nor_draft(folder: Path) -> None:
    async def main() -> None:
        async with running() as (app, pilot):
            screen = await opened(app, pilot, "slow.echo.json", "slow.echo.json")
            await say(pilot, "hello")
            await until(pilot, lambda: all(grown(side) for side in screen.sides))
            await pilot.press(*"draft")
            app._cut_off()
            await pilot.pause()

    asyncio.run(main())
    assert all(stored(number)[1][2] == "stopped" and len(stored(number)[1][1]) > 20 for number in (1, 2))
    place = last_chat()
    assert place is not None
    assert (place.draft, place.conversation, place.other) == ("draft", 1, 2)

    async def again() -> None:
        app = EdgeftApp(cli)
        async with app.run_test(size=(80, 24)) as pilot:
            await until(pilot, lambda: len(app.screen.query(Said)) == 4)
            assert isinstance(app.screen, SideBySideScreen)
            assert app.screen.query_one(Prompt).text == "draft"

    asyncio.run(again())


def test_two_models_are_chosen_from_what_is_there(folder: Path) -> None:
    (folder / "a.gguf").write_bytes(b"GGUF")
    (folder / "b.gguf").write_bytes(b"GGUF")

    async def main() -> None:
        async with running() as (app, pilot):
            (action,) = [one for one in app.get_system_commands(app.screen) if one.title == "Two models side by side"]
            action.callback()
            for title, name in (("The first model", "a.gguf"), ("Beside a.gguf", "b.gguf")):
                await until(pilot, lambda title=title: asked(app, title))
                names = [str(one.prompt).split("\n")[0] for one in app.screen.query_one(OptionList).options]
                await pilot.press(*["down"] * names.index(name), "enter")
            await until(pilot, lambda: isinstance(app.screen, SideBySideScreen) and len(app.screen.query(Side)) == 2)
            assert isinstance(app.screen, SideBySideScreen)
            assert [side.model for side in app.screen.sides] == ["a.gguf", "b.gguf"]

    asyncio.run(main())


def asked(app: EdgeftApp, title: str) -> bool:
    """Whether that question is on the screen and hears the keys."""
    there = isinstance(app.screen, Choose) and isinstance(app.focused, OptionList)
    return there and str(app.screen.query(Label).first().render()) == title


@pytest.mark.parametrize("more", [["--against", "n", "--resume", "1"], ["--against", "n", "--no-history"]])
def test_what_the_screen_cannot_do_is_refused_and_not_left_out(more: list[str]) -> None:
    assert isinstance(CliRunner().invoke(cli, ["chat", "m", *more]).exception, UsageError)


def test_a_key_says_who_of_a_cascade_answers_and_the_other_side_is_left_alone(folder: Path) -> None:
    async def main() -> None:
        async with running((120, 30)) as (app, pilot):
            screen = await opened(app, pilot, "cascade.toml", "two.echo.json")
            cascade, plain = screen.sides
            await pilot.press("f6")
            await until(pilot, lambda: "asks the device only" in status(cascade))
            assert "asks" not in status(plain)
            await say(pilot, "hello")
            await until(pilot, ended(screen, 2))
            made = cascade.conversation.messages[-1].made
            assert made and made["route"]["author"] == "local"
            assert plain.conversation.messages[-1].content == "the second answer"
            place = last_chat()
            assert place and place.by == "device"

    write_cascade(folder, closed_port())
    asyncio.run(main())


@pytest.mark.parametrize("by", ["policy", "device"])
def test_without_a_cascade_no_key_asks_who_answers(folder: Path, by: str) -> None:
    async def main() -> None:
        async with running((120, 30)) as (app, pilot):
            screen = SideBySideScreen(ChatPlace("one.echo.json", against="two.echo.json", by=by))
            app.push_screen(screen)
            await until(pilot, lambda: len(screen.query(Side)) == 2 and all(side.opened for side in screen.sides))
            await pilot.press("f6")
            assert "Who answers" not in keys(screen)
            assert not any("asks" in status(side) for side in screen.sides)

    asyncio.run(main())
