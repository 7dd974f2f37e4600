"""From a base model to a conversation without leaving the screen: train, export, verify, package, chat."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
from screens import drive, on, rows, said, until
from textual.pilot import Pilot
from textual.widgets import Input

from edgeft.artifact import read_manifest
from edgeft.bundle import is_bundle, read_bundle
from edgeft.data import smart_home
from edgeft.jobs import State
from edgeft.tui.app import EdgeftApp
from edgeft.tui.chat import ChatScreen
from edgeft.tui.export import ExportScreen
from edgeft.tui.forms import FormScreen
from edgeft.tui.jobs import JobScreen
from edgeft.tui.ledger import LedgerScreen
from edgeft.tui.talk import Prompt
from edgeft.tui.training import TrainingScreen

SMART_HOME = Path(smart_home.__file__).parent


def fill(form: FormScreen, **values: str) -> None:
    for name, value in values.items():
        form.query_one(f"#field-{name}", Input).value = value


async def ended(pilot: Pilot[None], screen: JobScreen | TrainingScreen, seconds: float) -> None:
    """The job on the screen has ended well, and its next step is offered."""
    await until(pilot, lambda: screen.job.state.ended, seconds)
    assert screen.job.state is State.DONE, screen.job.stderr.read_text()
    await until(pilot, lambda: "Enter:" in said(screen, "#state"))


def walk(
    model: str, data: str, options: dict[str, str], seconds: float, times: dict[str, float]
) -> Callable[..., object]:
    """The steps of a person: everything by keys, except that long values are put into their fields."""
    began = time.monotonic()

    def took(what: str) -> None:
        times[what] = round(time.monotonic() - began - sum(times.values()), 1)

    async def steps(app: EdgeftApp, pilot: Pilot[None]) -> None:
        await pilot.press("n")
        await pilot.pause()
        titles = [str(option.prompt).splitlines()[0] for option in app.screen.query_one("OptionList").options]  # type: ignore[attr-defined]
        await pilot.press(*["down"] * titles.index("Train a model"), "enter")
        form = await on(pilot, FormScreen)
        fill(form, model=model, data=data, out="runs/mine", samples="2", **options)
        await pilot.press("ctrl+s")
        training = await on(pilot, TrainingScreen)
        await ended(pilot, training, seconds)
        await until(pilot, lambda: bool(training.seen) and bool(training.seen[0].samples))
        took("train")

        await pilot.press("enter")
        export = await on(pilot, ExportScreen)
        assert said(export, "#line") == "$ edgeft export --to gguf-q4 runs/mine"
        await until(pilot, lambda: "gguf-q4" in export.fits)
        assert any(row[1] == "yes" for row in rows(export, "#devices-table"))
        await pilot.press("ctrl+s")
        await ended(pilot, exporting := await on(pilot, JobScreen), seconds)
        assert exporting.job.command[0] == "export"
        took("export")

        await pilot.press("enter")
        await until(pilot, lambda: isinstance(app.screen, JobScreen) and app.screen is not exporting)
        await ended(pilot, await on(pilot, JobScreen), seconds)
        await pilot.press("enter")
        ledger = await on(pilot, LedgerScreen)
        await until(pilot, lambda: len(rows(ledger, "#steps")) >= 3)
        assert "as it should be" in said(ledger, "#about")
        took("verify")

        await pilot.press("p")
        packing = await on(pilot, FormScreen)
        fill(packing, device="local", out="mine")
        packing.query_one("#field-no_wheels").value = True  # type: ignore[attr-defined]
        await pilot.press("ctrl+s")
        await ended(pilot, await on(pilot, JobScreen), seconds)
        took("package")

        await pilot.press("enter")
        chat = await on(pilot, ChatScreen)
        await until(pilot, lambda: chat._opened is not None, seconds)
        chat.query_one(Prompt).load_text("turn off the lamp")
        await pilot.press("enter")
        said_last = lambda: chat.conversation.messages[-1]  # noqa: E731
        await until(pilot, lambda: len(chat.conversation.messages) > 1 and said_last().state == "done", seconds)
        assert said_last().role == "assistant"
        took("chat")

    return steps


def check(folder: Path) -> None:
    """What the commands have left behind is what the screens showed."""
    (file,) = folder.glob("*.gguf")
    manifest = read_manifest(file)
    assert manifest is not None and manifest.verification["ok"]
    assert is_bundle(folder / "mine") and any(
        entry.path.endswith(".gguf") for entry in read_bundle(folder / "mine").files
    )


def test_a_tiny_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # a tiny model gains nothing from threads
    tiny.write_loadable(tmp_path / "base")
    (tmp_path / "data").mkdir()
    for split, count in (("train", 40), ("valid", 6), ("test", 6)):
        turns = [[("user", f"{split} {at}"), ("assistant", str(at * 7))] for at in range(count)]
        lines = [json.dumps({"messages": [{"role": role, "content": text} for role, text in one]}) for one in turns]
        (tmp_path / "data" / f"{split}.jsonl").write_text("\n".join(lines))
    drive(walk("base", "data", {"epochs": "1", "micro_tokens": "192"}, 180, {}), (120, 40))
    check(tmp_path)


@pytest.mark.slow
@pytest.mark.model
def test_smollm2(
    tmp_path: Path, smollm2_hf: Path, monkeypatch: pytest.MonkeyPatch, record_property: Callable[[str, object], None]
) -> None:
    """The real model, for a few steps; the times of the stages go into the test's report."""
    monkeypatch.chdir(tmp_path)
    times: dict[str, float] = {}
    (tmp_path / "data").mkdir()
    for split, count in (("train", 200), ("valid", 12), ("test", 8)):  # of the commands of the demo
        lines = (SMART_HOME / f"{split}.jsonl").read_text().splitlines()[:count]
        (tmp_path / "data" / f"{split}.jsonl").write_text("\n".join(lines))
    drive(walk(str(smollm2_hf), "data", {"epochs": "0.25", "eval_every": "6"}, 1500, times), (120, 40))
    check(tmp_path)
    record_property("seconds", times)
    print(times)
