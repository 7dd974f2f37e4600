"""Conversations survive: stored before they are answered, kept when they break off, shared by several processes."""

import os
import sqlite3
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from edgeft.chat import Usage
from edgeft.errors import EdgeftError, UsageError, WriteError
from edgeft.history import Conversation, History

DONE = Usage(10, 0, 5, 0.1, 0.5, "stop")
STOPPED = Usage(10, 0, 2, 0.1, 0.2, "cancel")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "history.sqlite"


@pytest.fixture
def history(path: Path) -> History:
    with History(path) as opened:
        yield opened


def talk(history: History, *texts: str, model: str = "m.gguf") -> Conversation:
    conversation = Conversation(model, "echo", None, history)
    for text in texts:
        conversation.say(text)
        conversation.begin_answer()
        conversation.end_answer(text.upper(), DONE)
    return conversation


def stored(path: Path, number: int = 1) -> list[tuple[str, str, str]]:
    """As another process sees it."""
    with History(path) as other:
        return [(one.role, one.content, one.state) for one in other.conversation(number).messages]


def test_what_the_user_says_is_stored_before_it_is_answered(history: History, path: Path) -> None:
    conversation = Conversation("m.gguf", "echo", None, history)
    conversation.say("hello")
    assert stored(path) == [("user", "hello", "done")]


def test_an_answer_is_stored_while_it_grows(history: History, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgeft.history._GROWTH_S", 0)
    conversation = Conversation("m.gguf", "echo", None, history)
    conversation.say("hello")
    conversation.begin_answer()
    assert stored(path)[1] == ("assistant", "", "writing")
    conversation.grow_answer("Hi th")
    assert stored(path)[1] == ("assistant", "Hi th", "writing")
    conversation.end_answer("Hi there", DONE)
    assert stored(path)[1] == ("assistant", "Hi there", "done")


def test_growing_is_not_written_more_often_than_needed(history: History, path: Path) -> None:
    conversation = talk(history)
    conversation.say("hello")
    conversation.begin_answer()
    for count in range(1000):
        conversation.grow_answer("x" * count)
    assert len(stored(path)[1][1]) < 1000


def test_a_stopped_answer_is_kept_and_marked(history: History, path: Path) -> None:
    conversation = Conversation("m.gguf", "echo", None, history)
    conversation.say("hello")
    conversation.begin_answer()
    conversation.end_answer("Hi th", STOPPED)
    assert stored(path)[1] == ("assistant", "Hi th", "stopped")


def test_a_conversation_without_a_word_leaves_no_trace(history: History) -> None:
    Conversation("m.gguf", "echo", "be kind", history).change_system("be brief")
    assert history.summaries() == []


def test_a_conversation_is_resumed_as_it_was(history: History) -> None:
    conversation = talk(history, "one", "two")
    conversation.change_system("be brief")
    assert conversation.id is not None
    again = Conversation.resume(history, conversation.id)
    assert again.prompt() == conversation.prompt()
    assert again.prompt()[0] == {"role": "system", "content": "be brief"}
    assert (again.model, again.runtime) == ("m.gguf", "echo")
    assert again.messages[1].usage == DONE.as_dict()


def test_what_is_withdrawn_is_out_of_the_conversation_and_still_in_the_file(history: History, path: Path) -> None:
    conversation = talk(history, "one")
    assert conversation.withdraw("user") is None
    taken = conversation.withdraw("assistant")
    assert taken is not None and taken.content == "ONE"
    assert stored(path) == [("user", "one", "done")]
    with sqlite3.connect(path) as database:
        assert database.execute("SELECT content FROM messages WHERE withdrawn").fetchall() == [("ONE",)]


def test_the_latest_is_the_one_spoken_in_last(history: History) -> None:
    first = talk(history, "a", model="a.gguf")
    second = talk(history, "b", model="b.gguf")
    first.say("again")
    assert history.latest() == first.id
    assert history.latest("b.gguf") == second.id
    assert history.latest("c.gguf") is None


def test_summaries_are_newest_first_with_the_first_words(history: History) -> None:
    talk(history, "first words", "more")
    talk(history, "second talk")
    assert [(one.title, one.messages) for one in history.summaries()] == [("second talk", 2), ("first words", 4)]


def test_without_a_history_everything_stays_in_memory() -> None:
    conversation = Conversation("m.gguf", "echo")
    conversation.say("hello")
    conversation.begin_answer()
    conversation.end_answer("Hi", DONE)
    assert [message["content"] for message in conversation.prompt()] == ["hello", "Hi"]
    assert conversation.id is None


# --- The file -----------------------------------------------------------------


def test_nobody_else_may_read_it(history: History, path: Path) -> None:
    talk(history, "a secret")
    for file in path.parent.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600, file


def test_the_file_says_its_version_and_uses_a_write_ahead_log(history: History, path: Path) -> None:
    with sqlite3.connect(path) as database:
        assert database.execute("PRAGMA user_version").fetchone() == (3,)
        assert database.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_a_later_version_adds_to_what_is_there(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of the first version, from before there were titles and a search, gets both."""
    from edgeft import history as module

    with monkeypatch.context() as patch:
        patch.setattr(module, "_MIGRATIONS", module._MIGRATIONS[:1])
        with History(path) as old:
            old.begin("m.gguf", "echo", None)
    with sqlite3.connect(path) as database:
        for role, text in (("user", "kept"), ("assistant", "kept too")):
            values = (1, "2026-01-01T00:00:00+00:00", role, text, "done")
            columns = "conversation, created, role, content, state"
            database.execute(f"INSERT INTO messages ({columns}) VALUES (?, ?, ?, ?, ?)", values)
    for _ in range(2):
        with History(path) as new:
            assert new.conversation(1).messages[0].content == "kept"
            assert [found.role for found in new.search("kep")] == ["user", "assistant"]
    with sqlite3.connect(path) as database:
        assert database.execute("PRAGMA user_version").fetchone() == (3,)


def test_search_finds_words_by_their_beginnings_and_not_what_was_withdrawn(history: History) -> None:
    number = history.begin("m.gguf", "echo", None)
    history.add(number, "user", "Lamps in the library")
    heater = history.add(number, "user", "a heater")
    assert [found.snippet for found in history.search("libr lamp")] == ["«Lamps» in the «library»"]
    history.rename(number, "Warmth")
    assert [(found.title, found.role) for found in history.search("heater")] == [("Warmth", "user")]
    history.update(heater, "a radiator", "done")
    assert not history.search("heater") and history.search("radiator")
    history.withdraw(heater)
    assert not history.search("radiator")
    assert not history.search("  ") and not history.search('"lamp OR heater') and not history.search("NEAR(")


def test_a_branch_begins_alike_and_grows_apart(history: History) -> None:
    number = talk(history, "first").id or 0
    history.add(number, "assistant", "cut sho", "writing")
    third = history.add(number, "user", "third")
    history.add(number, "assistant", "left out")
    branch = history.branch(number, third)
    said = [(message.content, message.state) for message in history.conversation(branch).messages]
    assert said[-2:] == [("cut sho", "stopped"), ("third", "done")]
    assert history.conversation(number).messages[-1].content == "left out"


def test_a_migration_that_fails_changes_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgeft import history as module

    with History(path):
        pass
    broken = (*module._MIGRATIONS, ("CREATE TABLE half (id)", "not SQL"))
    monkeypatch.setattr(module, "_MIGRATIONS", broken)
    with pytest.raises(EdgeftError):
        History(path)
    with sqlite3.connect(path) as database:
        assert database.execute("PRAGMA user_version").fetchone() == (3,)
        assert database.execute("SELECT name FROM sqlite_master WHERE name = 'half'").fetchone() is None


def test_a_file_from_a_newer_edgeft_is_left_alone(path: Path) -> None:
    with History(path):
        pass
    with sqlite3.connect(path) as database:
        database.execute("PRAGMA user_version = 99")
    with pytest.raises(EdgeftError, match="newer edgeft") as caught:
        History(path)
    assert "--no-history" in (caught.value.hint or "")


def test_a_file_that_is_no_database_is_one_clear_message(path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(b"this is a diary, not a database " * 100)
    with pytest.raises(EdgeftError, match=r"history\.sqlite cannot be used") as caught:
        History(path)
    assert "--no-history" in (caught.value.hint or "")
    assert path.read_bytes().startswith(b"this is a diary")


def test_a_folder_that_cannot_be_made_is_one_clear_message(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match="history"):
        History(tmp_path / "file" / "history.sqlite")


def test_an_unknown_number_names_the_way_to_find_one(history: History) -> None:
    with pytest.raises(UsageError, match="no conversation 7") as caught:
        history.conversation(7)
    assert "history list" in (caught.value.hint or "")


WRITER = """
import sys
from pathlib import Path
from edgeft.history import Conversation, History
for _ in range(20):
    with History(Path(sys.argv[1])) as history:
        conversation = Conversation("m.gguf", "echo", None, history)
        conversation.say(sys.argv[2])
        conversation.begin_answer()
        conversation.end_answer(sys.argv[2], None)
"""


def test_processes_that_write_at_once_lose_nothing(path: Path) -> None:
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, path, name], env=os.environ) for name in "abc"]
    assert [writer.wait(timeout=60) for writer in writers] == [0, 0, 0]
    with History(path) as history:
        titles = [summary.title for summary in history.summaries(limit=1000)]
        assert sorted(titles) == sorted("abc" * 20)
        assert all(len(history.conversation(one.id).messages) == 2 for one in history.summaries(limit=1000))
