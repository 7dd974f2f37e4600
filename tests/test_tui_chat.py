"""A conversation on the screen: cascades, long histories, a history that fails, files, commands."""

import asyncio
import json
import sqlite3
from pathlib import Path

import pytest
from faulty_cloud import KEY, faulty_cloud
from test_cascade import LOCAL_ANSWER, closed_port, write_cascade
from textual.pilot import Pilot
from textual.widgets import Input, Label, OptionList, Static

from edgeft.cli.chat import COMMANDS
from edgeft.cli.main import cli, main
from edgeft.history import Conversation, History
from edgeft.paths import history_file
from edgeft.tui.app import EdgeftApp
from edgeft.tui.chat import ChatScreen
from edgeft.tui.chat_actions import Here, chat_actions
from edgeft.tui.choose import Choose
from edgeft.tui.conversation_view import MOST, PAGE, ConversationView
from edgeft.tui.forms import find_command, values_of
from edgeft.tui.talk import Prompt, Said
from tests.test_tui import drive, finished, say, talk, until

CODE = "One:\n\n```python\nprint(1)\n```\n\nTwo:\n\n~~~sh\nls\n~~~\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CASCADE_TEST_KEY", KEY)
    (tmp_path / "quick.echo.json").write_text(json.dumps({"default": CODE}))
    return tmp_path


def status(screen: ChatScreen) -> str:
    return str(screen.query_one("#status", Static).render())


def titles(screen: ChatScreen) -> list[str]:
    return [str(said.query_one(Label).render()) for said in screen.query(Said)]


# --- Cascades -------------------------------------------------------------------


def test_every_message_of_a_cascade_says_who_wrote_it_why_and_its_cost(folder: Path) -> None:
    async def steps(app: EdgeftApp, pilot: Pilot[None]) -> None:
        screen = await talk(app, pilot, "cascade.toml")
        await say(pilot, "hello")
        await until(pilot, finished(screen))
        assert titles(screen)[-1].startswith("big · cloud only · 0.")
        assert titles(screen)[-1].endswith(" USD")
        await pilot.press("f6")
        await until(pilot, lambda: "asks the device only" in status(screen))
        await say(pilot, "again")
        await until(pilot, lambda: finished(screen)() and len(screen.conversation.messages) == 4)
        assert titles(screen)[-1] == "the device · the device was asked for · free · nothing left the device"
        assert screen.conversation.messages[-1].content == LOCAL_ANSWER
        await pilot.press("ctrl+n")
        await until(pilot, lambda: not screen.query(Said))
        screen._resume_other(1)
        await until(pilot, lambda: len(screen.query(Said)) == 4)
        assert titles(screen)[1].startswith("big · cloud only · 0.")

    with faulty_cloud("good") as cloud:
        write_cascade(folder, cloud.url)
        drive(steps)
    with History(history_file()) as history:
        routes = [one.made["route"] for one in history.conversation(1).messages if one.made]
    assert [route["author"] for route in routes] == ["big", "local"]
    assert routes[0]["cost"] > 0 == routes[1]["cost"]


def test_offline_is_seen_and_harmless(folder: Path) -> None:
    write_cascade(folder, closed_port(), 'kind = "local-only"')

    async def steps(app: EdgeftApp, pilot: Pilot[None]) -> None:
        screen = await talk(app, pilot, "cascade.toml")
        await pilot.press("f6", "f6")
        await until(pilot, lambda: "asks the cloud" in status(screen))
        await say(pilot, "hello")
        await until(pilot, finished(screen))
        assert screen.conversation.messages[-1].content == LOCAL_ANSWER
        assert screen.conversation.messages[-1].state == "done"
        assert "the cloud did not answer" in titles(screen)[-1]
        assert "offline: the device answers" in status(screen)
        assert not app._notifications

    drive(steps)


def test_what_a_privacy_rule_keeps_on_the_device_no_key_sends(folder: Path) -> None:
    async def steps(app: EdgeftApp, pilot: Pilot[None]) -> None:
        screen = await talk(app, pilot, "cascade.toml")
        await pilot.press("f6", "f6")
        await say(pilot, "my salary")
        await until(pilot, finished(screen))
        assert "stays on the device" in titles(screen)[-1]

    with faulty_cloud("good") as cloud:
        write_cascade(folder, cloud.url, more='[privacy]\nredact = false\ntopics = ["salary"]')
        drive(steps)
        assert not cloud.wire


# --- Commands -------------------------------------------------------------------


def test_every_action_of_a_conversation_has_its_command(folder: Path) -> None:
    """No feature is on the screen only."""
    told = Conversation("model", "echo", id=7)
    found = chat_actions(Here("model", told, [("a.gguf", 0.5)]), cascade=True)
    bound = {binding.action for binding in ChatScreen.BINDINGS}  # type: ignore[union-attr]
    assert bound - {"stop", "actions"} == set(found)
    for action in found.values():
        command, names, words = find_command(cli, action.command)
        assert names and set(values_of(command, words)) <= {one.name for one in command.params}, action
        if action.says:
            assert f"\n{action.says.split()[0]} " in "\n" + COMMANDS
    shown = found["retry"].line
    assert shown == "echo /retry | edgeft chat model --adapter a.gguf=0.5 --resume 7"


def test_actions_are_listed_with_their_commands_and_done(folder: Path) -> None:
    async def steps(app: EdgeftApp, pilot: Pilot[None]) -> None:
        screen = await talk(app, pilot, "quick.echo.json")
        await say(pilot, "hello")
        await until(pilot, finished(screen))
        await pilot.press("f4")
        await until(pilot, lambda: isinstance(app.screen, Choose))
        listed = [str(one.prompt) for one in app.screen.query_one(OptionList).options]
        at = next(at for at, text in enumerate(listed) if "edgeft history show 1 --last --code" in text)
        await pilot.press(*["down"] * at, "c")
        assert app.clipboard == "edgeft history show 1 --last --code"
        await pilot.press("enter")
        await until(pilot, lambda: app.screen is screen and app.clipboard == "ls\n")
        await pilot.press("f9")
        assert app.clipboard == "print(1)\n"
        await pilot.press("f8")
        assert app.clipboard == CODE

    drive(steps)


def test_the_commands_do_what_the_screen_does(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with History(history_file()) as history:
        told = Conversation("m", "echo", "Be brief.", history)
        told.say("a lamp")
        told.begin_answer({"sampling": {"temperature": 0.5}})
        told.end_answer(CODE, None)
    assert main(["history", "show", "last", "--last", "--code"]) == 0
    assert capsys.readouterr().out == "ls\n"
    assert main(["history", "rename", "1", "The lamp"]) == 0
    assert main(["history", "branch", "last"]) == 0
    assert main(["history", "search", "lam", "--json"]) == 0
    out = capsys.readouterr().out
    assert "The lamp" in out and '"conversation": 2' in out
    assert main(["history", "export", "1", "talk.json"]) == 0
    (whole,) = json.loads(Path("talk.json").read_text())
    assert [one["role"] for one in whole["messages"]] == ["system", "user", "assistant"]
    assert whole["edgeft"]["messages"][1]["sampling"] == {"temperature": 0.5}
    assert main(["history", "export", "1", "talk.json"]) == 2
    assert main(["data", "check", "talk.json"]) == 0
    assert main(["history", "rm", "1", "--dry-run"]) == 0
    assert main(["history", "rm", "1"]) == 0
    assert main(["history", "show", "1"]) == 2
    with History(history_file()) as history:
        assert [one.conversation for one in history.search("lamp")] == [2]


def test_a_conversation_is_named_and_written_to_a_file(folder: Path) -> None:
    (folder / "taken.md").write_text("mine")

    async def steps(app: EdgeftApp, pilot: Pilot[None]) -> None:
        screen = await talk(app, pilot, "quick.echo.json")
        await say(pilot, "hello")
        await until(pilot, finished(screen))
        await pilot.press("f7", *"Lamps", "enter")
        await until(pilot, lambda: app.screen is screen)
        await pilot.press("ctrl+g")
        await until(pilot, lambda: bool(app.screen.query(Input)))
        field = app.screen.query_one(Input)
        field.value = "taken.md"
        await pilot.press("enter")
        await pilot.pause()
        assert app.screen is not screen
        field.value = "mine.json"
        await pilot.press("f3", "enter")
        assert app.clipboard == "edgeft history export 1 mine.json"
        await until(pilot, lambda: (folder / "mine.json").is_file())

    drive(steps)
    assert (folder / "taken.md").read_text() == "mine"
    assert json.loads((folder / "mine.json").read_text())[0]["edgeft"]["messages"][1]["sampling"]["top-k"] == 40
    with History(history_file()) as history:
        assert history.summaries()[0].title == "Lamps"


# --- A history that fails ---------------------------------------------------------


def test_a_history_that_is_damaged_meanwhile_is_begun_anew_with_all_that_was_said(folder: Path) -> None:
    async def steps(app: EdgeftApp, pilot: Pilot[None]) -> None:
        screen = await talk(app, pilot, "quick.echo.json")
        await say(pilot, "hello")
        await until(pilot, finished(screen))
        for side in ("", "-wal", "-shm"):
            with open(f"{history_file()}{side}", "r+b") as file:
                file.write(b"no database " * 2000)
        await say(pilot, "again")
        await until(pilot, lambda: finished(screen)() and len(screen.conversation.messages) == 4)
        assert screen.conversation.history is not None

    drive(steps)
    with History(history_file()) as history:
        said = history.conversation(history.latest() or 0)
        assert [one.content for one in said.messages] == ["hello", CODE, "again", CODE]
        assert all(one.state == "done" for one in said.messages)


def test_what_could_not_be_stored_for_a_while_is_stored_later(folder: Path) -> None:
    async def steps(app: EdgeftApp, pilot: Pilot[None]) -> None:
        screen = await talk(app, pilot, "quick.echo.json")
        await say(pilot, "hello")
        await until(pilot, finished(screen))
        with sqlite3.connect(history_file()) as database:
            database.execute("PRAGMA user_version = 99")
            database.execute("ALTER TABLE messages RENAME TO hidden")
        await say(pilot, "unstored")
        await until(pilot, lambda: finished(screen)() and len(screen.conversation.messages) == 4)
        assert screen.conversation.history is None
        assert any("Nothing more is stored" in str(one.title) for one in app._notifications)
        with sqlite3.connect(history_file()) as database:
            database.execute("ALTER TABLE hidden RENAME TO messages")
            database.execute("PRAGMA user_version = 3")
        await say(pilot, "more")
        await until(pilot, lambda: finished(screen)() and len(screen.conversation.messages) == 6)

    drive(steps)
    with History(history_file()) as history:
        said = history.conversation(history.latest() or 0)
        assert [one.content for one in said.messages if one.role == "user"] == ["hello", "unstored", "more"]


# --- Long conversations -----------------------------------------------------------


def test_a_long_conversation_can_be_scrolled_from_end_to_end(folder: Path) -> None:
    with History(history_file()) as history:
        told = Conversation(str(folder / "quick.echo.json"), "echo", None, history)
        with history.at_once():
            for number in range(70):
                told.say(f"question {number}")
                told.begin_answer()
                told.end_answer(f"answer {number}", None)

    async def steps(app: EdgeftApp, pilot: Pilot[None]) -> None:
        screen = ChatScreen("quick.echo.json", resume=1)
        app.push_screen(screen)
        await until(pilot, lambda: screen._opened is not None and len(screen.query(Said)) == PAGE)
        view = screen.query_one(ConversationView)
        await until(pilot, lambda: view.is_vertical_scroll_end)

        async def scroll(key: str, wanted: str) -> None:
            for _ in range(400):
                texts = [said.text for said in view.query(Said)]
                assert len(texts) <= MOST
                if wanted in texts and (view.scroll_y <= 1 if key == "pageup" else view.is_vertical_scroll_end):
                    return
                await pilot.press(key)
                await pilot.pause()
            raise AssertionError(f"{wanted} was not reached")

        await scroll("pageup", "question 0")
        first = view.query(Said).first()
        assert view.position(first) == 0
        await scroll("pagedown", "answer 69")
        assert [said.text for said in view.query(Said)][-1] == "answer 69"
        await scroll("pageup", "question 0")
        await say(pilot, "hello")
        await until(pilot, finished(screen))
        assert [said.text for said in view.query(Said)][-2:] == ["hello", CODE]
        assert view.position(view.query(Said).last()) == 141

    drive(steps)
    with History(history_file()) as history:
        assert len(history.conversation(1).messages) == 142


def test_what_one_reads_stays_in_its_place_when_older_messages_come(folder: Path) -> None:
    with History(history_file()) as history:
        told = Conversation(str(folder / "quick.echo.json"), "echo", None, history)
        for number in range(60):
            told.say(f"question {number}")

    async def main() -> None:
        app = EdgeftApp(cli)
        async with app.run_test(size=(80, 24)) as pilot:
            screen = ChatScreen("quick.echo.json", resume=1)
            app.push_screen(screen)
            await until(pilot, lambda: len(screen.query(Said)) == PAGE)
            view = screen.query_one(ConversationView)
            await until(pilot, lambda: view.is_vertical_scroll_end)
            top = view.query(Said).first()
            view.scroll_to(y=1, animate=False)
            await until(pilot, lambda: len(view.query(Said)) > PAGE)
            await until(pilot, lambda: top.region.y - view.region.y in range(-2, 2))
            assert top.text == "question 20"

    asyncio.run(main())


def test_a_draft_outlives_ctrl_q(folder: Path) -> None:
    from edgeft.tui.place import last_chat

    async def steps(app: EdgeftApp, pilot: Pilot[None]) -> None:
        await talk(app, pilot, "quick.echo.json")
        await pilot.press(*"half", "ctrl+q")

    drive(steps)
    place = last_chat()
    assert place is not None and place.draft == "half"


def test_the_prompt_is_typed_in_while_nothing_is_loaded(folder: Path) -> None:
    async def steps(app: EdgeftApp, pilot: Pilot[None]) -> None:
        screen = ChatScreen("quick.echo.json")
        app.push_screen(screen)
        await until(pilot, lambda: bool(screen.query(Prompt)))
        await pilot.press(*"early", "enter")
        await until(pilot, finished(screen))
        assert screen.conversation.messages[0].content == "early"
        assert screen.query_one(Prompt).text == ""

    drive(steps)
