"""The screens, driven by keys, on the scripted runtime and real commands."""

import asyncio
import dataclasses
import json
import os
import signal
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import click
import pytest
from textual import events
from textual.app import App, ComposeResult
from textual.pilot import Pilot
from textual.widgets import DataTable, Input, Markdown, OptionList, Static, Tabs, TextArea

from edgeft import jobs
from edgeft.artifact import Manifest, write_manifest
from edgeft.chat import Sampling
from edgeft.cli.main import VERBS, cli
from edgeft.history import History
from edgeft.item import KINDS, Item
from edgeft.jobs.store import read_state
from edgeft.paths import history_file
from edgeft.tui.actions import actions, first_steps, general
from edgeft.tui.answer import in_the_way
from edgeft.tui.app import EdgeftApp
from edgeft.tui.chat import ChatScreen
from edgeft.tui.forms import FormScreen, arguments, fields, find_command, values_of
from edgeft.tui.home import HomeScreen
from edgeft.tui.inputs import Area, Field
from edgeft.tui.jobs import JobScreen
from edgeft.tui.output import OutputScreen
from edgeft.tui.place import last_chat
from edgeft.tui.settings import SettingsScreen, State
from edgeft.tui.talk import Prompt, Said, pieces

ANSWER = "Some **bold** text:\n\n```python\nprint(1)\n```\n"
Steps = Callable[[EdgeftApp, Pilot[None]], Awaitable[None]]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quick.echo.json").write_text(json.dumps({"default": ANSWER}))
    (tmp_path / "slow.echo.json").write_text(json.dumps({"default": "word " * 400, "delay_ms": 20}))
    return tmp_path


@asynccontextmanager
async def running(size: tuple[int, int] = (80, 24)) -> AsyncIterator[tuple[EdgeftApp, Pilot[None]]]:
    app = EdgeftApp(cli)
    async with app.run_test(size=size) as pilot:
        await until(pilot, lambda: isinstance(app.screen, HomeScreen) and bool(app.screen._shown))
        yield app, pilot


def drive(steps: Steps) -> None:
    async def main() -> None:
        async with running() as (app, pilot):
            await steps(app, pilot)

    asyncio.run(main())


async def until(pilot: Pilot[None], condition: Callable[[], bool], seconds: float = 30) -> None:
    for _ in range(int(seconds / 0.05)):
        if condition():
            return
        await pilot.pause(0.05)
    raise AssertionError(f"not reached: {condition}")


async def talk(app: EdgeftApp, pilot: Pilot[None], model: str) -> ChatScreen:
    screen = ChatScreen(model)
    app.push_screen(screen)
    await until(pilot, lambda: screen._opened is not None)
    return screen


async def say(pilot: Pilot[None], text: str) -> None:
    await pilot.press(*text, "enter")


def finished(screen: ChatScreen) -> Callable[[], bool]:
    return lambda: (
        bool(screen.conversation.messages)
        and screen.conversation.messages[-1].state in ("done", "stopped")
        and not screen.answering
        and screen.conversation.messages[-1].role == "assistant"
    )


# --- Commands -------------------------------------------------------------------


def test_every_action_is_a_command_that_the_command_line_takes() -> None:
    """No feature is on the screen only."""
    items = [Item("model", "smollm2-135m", state, "", ("chat", "smollm2-135m")) for state in ("here", "not pulled")]
    items += [Item("model", "import", "here", "", ("train", "--model", "folder", "--data", "smart-home"))]
    items += [Item("run", "run", "finished", "", ("export", "run", "--to", "gguf-q4"))]
    items += [Item("run", "run", "not finished", "", ("train", "--resume", "run"))]
    items += [Item("artifact", "a.gguf", "not verified", "", ("verify", "run", "a.gguf"))]
    items += [Item("adapter", "a.gguf", "made", "", ("chat", "base.gguf", "--adapter", "a.gguf"))]
    items += [Item("bundle", "b", state, "", ("install", "b")) for state in ("packed", "installed")]
    items += [Item("job", "j", state, "", ("jobs", "watch", "j")) for state in ("running", "done", "failed", "lost")]
    items += [Item("device", "rpi5-8g", "known", "", ("devices", "show", "rpi5-8g"))]
    assert {item.kind for item in items} == set(KINDS)
    for action in [*general(), *first_steps(), *(action for item in items for action in actions(item))]:
        command, names, words = find_command(cli, action.command)
        assert names and names[0] in VERBS, action
        values = values_of(command, words)
        known = {parameter.name for parameter in command.params}
        assert set(values) <= known and not isinstance(command, click.Group), action


@pytest.mark.parametrize("verb", ["train", "export", "package", "verify", "eval"])
def test_a_form_has_every_option_of_its_command(verb: str) -> None:
    command, _, _ = find_command(cli, [verb])
    left_out = {parameter.name for parameter in command.params} - {parameter.name for parameter in fields(command)}
    assert left_out <= {"as_json", "dry_run", "list_", "last"}  # about output, or instead of the work


def test_what_a_form_says_the_command_understands() -> None:
    command, _, _ = find_command(cli, ["train"])
    words = ["--model", "m", "--data", "d", "--rank", "8", "--dora", "--target-modules", "q_proj,k_proj"]
    values = values_of(command, words)
    assert values_of(command, list(arguments(values, command))) == values
    assert list(arguments({"model": "a b", "rank": "", "dora": False}, command)) == ["--model", "a b"]


# --- Screens --------------------------------------------------------------------


def test_home_shows_what_is_here_and_does_the_next_step(folder: Path) -> None:
    job = jobs.wait(jobs.start(["config", "show"]))

    async def steps(app: EdgeftApp, pilot: Pilot[None]) -> None:
        home = app.screen
        assert isinstance(home, HomeScreen)
        await pilot.press("slash", *job.id, "enter")
        await until(pilot, lambda: len(home._shown) == 1)
        assert job.id in str(home.query_one("#next", Static).render())
        await pilot.press("enter")
        await until(pilot, lambda: isinstance(app.screen, JobScreen))
        await pilot.press("escape", "escape")
        await until(pilot, lambda: len(home._shown) > 1 and app.screen is home)

    drive(steps)


def test_the_next_start_begins_where_one_was(folder: Path) -> None:
    for name in ("a.gguf", "b.gguf", "c.gguf"):
        (folder / name).write_bytes(b"GGUF")

    async def leave(app: EdgeftApp, pilot: Pilot[None]) -> None:
        home = app.screen
        assert isinstance(home, HomeScreen)
        while home.query_one(Tabs).active != "artifact":
            await pilot.press("right")
            await pilot.pause()
        await until(pilot, lambda: len(home._shown) == 3)
        await pilot.press("down", "ctrl+q")

    async def back(app: EdgeftApp, pilot: Pilot[None]) -> None:
        home = app.screen
        assert isinstance(home, HomeScreen)
        await until(pilot, lambda: len(home._shown) == 3)
        await until(pilot, lambda: home.selected is not None and home.selected.name == "b.gguf")

    drive(leave)
    drive(back)


def test_an_empty_home_says_how_to_begin(folder: Path) -> None:
    async def steps(app: EdgeftApp, pilot: Pilot[None]) -> None:
        welcome = app.screen.query_one("#welcome", Static)
        assert all(action.line in str(welcome.render()) for action in first_steps())
        assert welcome.display and welcome.region.bottom <= 22 and app.screen.query_one(DataTable).size.height >= 3
        (folder / "mine.gguf").write_bytes(b"GGUF")
        await pilot.press("r")
        await until(pilot, lambda: not welcome.display)

    drive(steps)


def test_a_form_follows_what_is_typed_and_starts_a_job(folder: Path) -> None:
    async def steps(app: EdgeftApp, pilot: Pilot[None]) -> None:
        await pilot.press("n")
        await pilot.pause()
        await pilot.press("down", "down", "enter")  # look at data of your own
        await until(pilot, lambda: isinstance(app.screen, FormScreen))
        form = app.screen
        assert isinstance(form, FormScreen)
        await pilot.press(*"smart-home")
        await until(pilot, lambda: form.words == ("data", "check", "smart-home"))
        await pilot.press("ctrl+s")
        await until(pilot, lambda: isinstance(app.screen, JobScreen) and app.screen.job.state.ended)
        assert isinstance(app.screen, JobScreen)
        assert app.screen.job.command == ("data", "check", "smart-home") and app.screen.job.state == "done"

    drive(steps)


def test_a_plan_is_shown_before_anything_starts(folder: Path) -> None:
    async def steps(app: EdgeftApp, pilot: Pilot[None]) -> None:
        form = FormScreen(cli, ("models", "pull", "smollm2-135m"), app.start)
        app.push_screen(form)
        await pilot.pause()
        await pilot.press("f5")
        await until(pilot, lambda: "would fetch smollm2-135m" in form.query_one("#plan", TextArea).text)
        assert not jobs.list_jobs()

    drive(steps)


def test_a_short_command_shows_what_it_says(folder: Path) -> None:
    async def steps(app: EdgeftApp, pilot: Pilot[None]) -> None:
        app.push_screen(screen := OutputScreen(("devices", "show", "rpi5-8g")))
        await pilot.pause()
        await until(pilot, lambda: "bandwidth" in screen.query_one(TextArea).text)

    drive(steps)


def test_help_names_the_keys_of_the_screen(folder: Path) -> None:
    from edgeft.tui.help import HelpScreen, help_text

    async def steps(app: EdgeftApp, pilot: Pilot[None]) -> None:
        assert "| Next step |" in help_text(app.screen) or "| Actions |" in help_text(app.screen)
        await pilot.press("question_mark")
        await until(pilot, lambda: isinstance(app.screen, HelpScreen))

    drive(steps)


# --- Chat -----------------------------------------------------------------------


def test_a_conversation_is_stored_streamed_and_shown_whole(folder: Path) -> None:
    async def steps(app: EdgeftApp, pilot: Pilot[None]) -> None:
        screen = await talk(app, pilot, "quick.echo.json")
        await say(pilot, "hello there")
        await until(pilot, finished(screen))
        assert [said.text for said in screen.query(Said)] == ["hello there", ANSWER]
        assert "tokens/s" in str(screen.query_one("#status", Static).render())
        await pilot.press("ctrl+b")
        await until(pilot, lambda: screen.conversation.id == 2)

    drive(steps)
    with History(history_file()) as history:
        said = [(one.role, one.content) for one in history.conversation(1).messages]
        assert said == [("user", "hello there"), ("assistant", ANSWER)]
        assert [one.role for one in history.conversation(2).messages] == ["user", "assistant"]


def test_esc_stops_an_answer_and_keeps_what_is_there(folder: Path) -> None:
    async def steps(app: EdgeftApp, pilot: Pilot[None]) -> None:
        screen = await talk(app, pilot, "slow.echo.json")
        await say(pilot, "hello")
        await until(pilot, lambda: len(screen.query(Said)) == 2 and len(screen.query(Said).last().text) > 20)
        await pilot.press("escape")
        await until(pilot, finished(screen))
        last = screen.conversation.messages[-1]
        assert last.state == "stopped" and 20 < len(last.content) < 1900
        assert app.screen is screen

    drive(steps)


def test_edit_takes_the_last_message_back_and_again_answers_anew(folder: Path) -> None:
    async def steps(app: EdgeftApp, pilot: Pilot[None]) -> None:
        screen = await talk(app, pilot, "quick.echo.json")
        await say(pilot, "hello")
        await until(pilot, finished(screen))
        first = screen.conversation.messages[-1].id
        await pilot.press("ctrl+r")
        await until(pilot, lambda: finished(screen)() and screen.conversation.messages[-1].id != first)
        await pilot.press("f2")
        await until(pilot, lambda: screen.query_one(Prompt).text == "hello")
        assert not screen.conversation.messages and not screen.query(Said)

    drive(steps)


def test_a_paste_is_one_message(folder: Path) -> None:
    from textual import events

    async def steps(app: EdgeftApp, pilot: Pilot[None]) -> None:
        screen = await talk(app, pilot, "quick.echo.json")
        app.post_message(events.Paste("one\ntwo\nthree"))
        await pilot.pause()
        await pilot.press("ctrl+j", "4", "enter")
        await until(pilot, finished(screen))
        assert screen.conversation.messages[0].content == "one\ntwo\nthree\n4"

    drive(steps)


def test_a_model_that_dies_loses_nothing_and_comes_back(folder: Path) -> None:
    async def steps(app: EdgeftApp, pilot: Pilot[None]) -> None:
        screen = await talk(app, pilot, "slow.echo.json")
        await say(pilot, "hello")
        await until(pilot, lambda: len(screen.query(Said)) == 2 and len(screen.query(Said).last().text) > 20)
        assert screen._process._process
        os.kill(screen._process._process.pid, signal.SIGKILL)
        await until(pilot, finished(screen))
        assert screen.conversation.messages[-1].state == "stopped"
        assert len(screen.conversation.messages[-1].content) > 20
        await say(pilot, "again")
        await until(pilot, lambda: len(screen.query(Said)) == 4 and len(screen.query(Said).last().text) > 20)
        await pilot.press("escape")
        await until(pilot, finished(screen))

    drive(steps)


def test_a_damaged_history_is_set_aside_and_a_new_one_begun(folder: Path) -> None:
    history_file().parent.mkdir(parents=True, exist_ok=True)
    history_file().write_bytes(b"no database " * 1000)

    async def steps(app: EdgeftApp, pilot: Pilot[None]) -> None:
        screen = await talk(app, pilot, "quick.echo.json")
        assert any("damaged" in str(one.title) for one in app._notifications)
        await say(pilot, "hello")
        await until(pilot, finished(screen))

    drive(steps)
    (aside,) = history_file().parent.glob("history.sqlite.damaged-*")
    assert aside.read_bytes() == b"no database " * 1000
    with History(history_file()) as history:
        assert [one.content for one in history.conversation(1).messages] == ["hello", ANSWER]


def test_a_history_of_a_newer_edgeft_stays_where_it_is(folder: Path) -> None:
    History(history_file()).close()
    with sqlite3.connect(history_file()) as database:
        database.execute("PRAGMA user_version = 99")

    async def steps(app: EdgeftApp, pilot: Pilot[None]) -> None:
        screen = await talk(app, pilot, "quick.echo.json")
        assert screen.conversation.history is None
        assert any("Nothing will be stored" in str(one.title) for one in app._notifications)

    drive(steps)
    assert not list(history_file().parent.glob("*damaged*"))


def test_a_killed_job_is_told(folder: Path) -> None:
    job = jobs.start(("run", str(folder / "slow.echo.json"), "hello"))

    async def steps(app: EdgeftApp, pilot: Pilot[None]) -> None:
        screen = JobScreen(job)
        app.push_screen(screen)
        await until(pilot, lambda: jobs.find_job(job.id).state is jobs.State.RUNNING)
        state = read_state(jobs.find_job(job.id))
        for name in ("supervisor", "command"):
            os.kill(state[name], signal.SIGKILL)
        await until(pilot, lambda: screen.job.state.ended)
        assert screen.job.state in (jobs.State.FAILED, jobs.State.LOST)

    drive(steps)


def test_a_model_that_cannot_be_loaded_is_said(folder: Path) -> None:
    async def steps(app: EdgeftApp, pilot: Pilot[None]) -> None:
        screen = ChatScreen("nothing.gguf")
        app.push_screen(screen)
        await until(
            pilot,
            lambda: "not loaded" in str(screen.query_one("#status", Static).render()) if screen.is_mounted else False,
        )
        await say(pilot, "kept")
        await until(pilot, lambda: screen.query_one(Prompt).text == "kept" and not screen.conversation.messages)

    drive(steps)
    place = last_chat()
    assert place is not None and place.draft == "kept"


def test_old_conversations_are_found_by_their_words_and_opened(folder: Path) -> None:
    async def steps(app: EdgeftApp, pilot: Pilot[None]) -> None:
        screen = await talk(app, pilot, "quick.echo.json")
        for text in ("a lamp", "a heater"):
            await say(pilot, text)
            await until(pilot, finished(screen))
            await pilot.press("ctrl+n")
            await until(pilot, lambda: not screen.query(Said))
        await pilot.press("ctrl+o")
        await until(pilot, lambda: bool(app.screen.query(DataTable)) and app.screen.query_one(DataTable).row_count == 2)
        await pilot.press(*"lam")
        await until(pilot, lambda: app.screen.query_one(DataTable).row_count == 1)
        await pilot.press("enter")
        await until(pilot, lambda: len(screen.query(Said)) == 2)
        assert screen.conversation.messages[0].content == "a lamp"

    drive(steps)


def test_settings_hold_from_the_next_message_on(folder: Path) -> None:
    async def steps(app: EdgeftApp, pilot: Pilot[None]) -> None:
        screen = await talk(app, pilot, "quick.echo.json")
        await pilot.press("ctrl+t")
        await until(pilot, lambda: bool(app.screen.query("#system")))
        app.screen.query_one("#system", TextArea).load_text("Say the other thing.")
        app.screen.query_one("#temperature", Input).value = "0.5"
        await pilot.press("ctrl+s")
        await until(pilot, lambda: screen.sampling.temperature == 0.5)
        await say(pilot, "hello")
        await until(pilot, finished(screen))
        assert screen.conversation.prompt()[0] == {"role": "system", "content": "Say the other thing."}

    drive(steps)


def test_adapters_of_the_folder_are_ticked_and_keep_what_was_typed(folder: Path) -> None:
    manifest = Manifest("adapter", "gguf-lora", {"F16": 8}, 8, 16.0, 16, "0" * 64, {"reference": "m"})
    for name in ("a.gguf", "b.gguf"):
        (folder / name).write_bytes(b"GGUF")
        write_manifest(folder / name, manifest)
    wanted = State("", Sampling(), (("a.gguf", 0.5),))

    async def steps(app: EdgeftApp, pilot: Pilot[None]) -> None:
        kept: list[State | None] = []
        screen = SettingsScreen(wanted)
        app.push_screen(screen, kept.append)
        await until(pilot, lambda: screen.is_mounted and screen.query_one("#known", OptionList).option_count == 2)
        known, field = screen.query_one("#known", OptionList), screen.query_one("#adapters", Input)

        def shown() -> list[str]:
            return [str(option.prompt) for option in known.options]

        assert shown() == ["[x] a.gguf", "[ ] b.gguf"]
        known.focus()
        await pilot.press("down", "space")
        await until(pilot, lambda: shown() == ["[x] a.gguf", "[x] b.gguf"])
        assert field.value == "a.gguf=0.5,b.gguf=1"
        await pilot.press("up", "enter")
        await until(pilot, lambda: shown() == ["[ ] a.gguf", "[x] b.gguf"])
        assert field.value == "b.gguf=1"
        field.value = ""
        await until(pilot, lambda: shown() == ["[ ] a.gguf", "[ ] b.gguf"])
        field.value = "./b.gguf"
        await until(pilot, lambda: shown() == ["[ ] a.gguf", "[x] b.gguf"])
        await pilot.press("ctrl+s")
        await until(pilot, lambda: bool(kept))
        assert kept[0] and kept[0].adapters == (("./b.gguf", 1.0),)

    drive(steps)


def test_long_answers_are_cut_between_paragraphs_and_never_inside_code() -> None:
    paragraph, code = "word " * 100 + "\n\n", "```python\n" + "print(1)\n\n" * 800 + "```\n\n"
    text = paragraph * 30 + code + paragraph * 30
    found = pieces(text)
    assert "\n\n".join(found) == text
    assert len(found) > 4
    assert all(piece.count("```") in (0, 2) for piece in found)
    assert pieces("") == [""]
    assert pieces("x" * 10_000) == ["x" * 10_000]


def test_an_answer_in_pieces_is_drawn_whole(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEFT_RUN_CONTEXT", "20000")
    answer = "\n\n".join(f"paragraph {number} " + "word " * 60 for number in range(20))
    (folder / "long.echo.json").write_text(json.dumps({"default": answer}))

    async def steps(app: EdgeftApp, pilot: Pilot[None]) -> None:
        screen = await talk(app, pilot, "long.echo.json")
        screen.sampling = dataclasses.replace(screen.sampling, max_tokens=100_000)
        await say(pilot, "hello")
        await until(pilot, finished(screen))
        said = screen.query(Said).last()
        assert said.text == answer
        drawn = [block.source for block in said.query(Markdown)]
        assert drawn == pieces(answer)
        assert "\n\n".join(drawn) == answer
        assert len(drawn) == 3

    drive(steps)


def test_a_window_of_a_few_columns_does_not_end_the_program(folder: Path) -> None:
    async def steps(app: EdgeftApp, pilot: Pilot[None]) -> None:
        await talk(app, pilot, "quick.echo.json")
        await pilot.press("h", "enter")
        await until(pilot, lambda: len(app.screen.query(Said)) == 2)
        app.notify("a long note " * 10)
        for columns in range(1, 13):
            for rows in (1, 2, 3, 8):
                await pilot.resize_terminal(columns, rows)
                await pilot.pause(0.02)
        await pilot.resize_terminal(80, 24)
        await pilot.press("x")
        assert app.screen.query_one(Prompt).text == "x"

    drive(steps)


@pytest.mark.parametrize("kind", [Field, Area, Prompt])
def test_keys_that_come_together_are_done_in_their_order(kind: type[Field | Area]) -> None:
    """As a slow line delivers them: letters in between keys that delete and move."""

    class Typing(App[None]):
        def compose(self) -> ComposeResult:
            yield kind(id="field")

    async def main() -> str:
        async with Typing().run_test() as pilot:
            field = pilot.app.query_one("#field", kind)
            field.focus()
            await pilot.pause()
            for key, character in (
                ("a", "a"),
                ("b", "b"),
                ("backspace", "\x7f"),
                ("c", "c"),
                ("left", None),
                ("d", "d"),
            ):
                pilot.app.post_message(events.Key(key, character))
            await until(pilot, lambda: len(_text(field)) == 3)
            return _text(field)

    def _text(field: Field | Area) -> str:
        return field.value if isinstance(field, Field) else field.text

    assert asyncio.run(main()) == "adc"


def test_what_is_typed_behind_enter_stays_in_the_prompt(folder: Path) -> None:
    async def steps(app: EdgeftApp, pilot: Pilot[None]) -> None:
        screen = await talk(app, pilot, "slow.echo.json")
        for key in ("a", "enter", "b"):
            app.post_message(events.Key(key, key if len(key) == 1 else None))
        prompt = screen.query_one(Prompt)
        await until(pilot, lambda: len(screen.query(Said)) == 2)
        assert (screen.query(Said).first(Said).text, prompt.text) == ("a", "b")
        for key in ("enter", "c"):
            app.post_message(events.Key(key, key if len(key) == 1 else None))
        await until(pilot, lambda: prompt.text == "b\nc")  # an answer is being written: it comes back
        assert len(screen.query(Said)) == 2

    drive(steps)


def test_words_are_drawn_when_no_key_waits_for_it() -> None:
    drawn = [not in_the_way(since) for since in (0.0, 0.02, 0.08, 0.2, 0.4)]
    assert drawn == [False, True, False, False, True]
