"""The screens for devices, cascades and exports, driven by keys through what one does on them."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from test_cascade_tune import cases
from textual.command import CommandList
from textual.pilot import Pilot
from textual.widgets import DataTable, Input, Select, Static, TabbedContent, TextArea
from textual.widgets.option_list import Option
from tiny_gguf import write_random

from edgeft.cascade.audit import AuditLog
from edgeft.cascade.budget import Budget
from edgeft.cascade.calibration import read_calibration
from edgeft.cascade.edit import edited, keys
from edgeft.cascade.settings import PolicySettings, read_settings
from edgeft.cascade.tune import Goal, at_threshold, tune
from edgeft.cascade.types import Record
from edgeft.cli.main import cli, main
from edgeft.device import load_profile, names, write_profile
from edgeft.forecast.find import find_facts
from edgeft.forecast.fit import forecast
from edgeft.tui.app import EdgeftApp
from edgeft.tui.cascade import CascadeScreen, PrivacyPane, RoutesPane, SettingsPane, ThresholdPane
from edgeft.tui.devices import DeviceScreen, DevicesScreen
from edgeft.tui.home import HomeScreen

Steps = Callable[[EdgeftApp, Pilot[None]], Awaitable[None]]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@asynccontextmanager
async def running(size: tuple[int, int]) -> AsyncIterator[tuple[EdgeftApp, Pilot[None]]]:
    app = EdgeftApp(cli)
    async with app.run_test(size=size) as pilot:
        await until(pilot, lambda: isinstance(app.screen, HomeScreen) and bool(app.screen._shown))
        yield app, pilot


def drive(steps: Steps, size: tuple[int, int] = (80, 24)) -> None:
    async def main() -> None:
        async with running(size) as (app, pilot):
            await steps(app, pilot)

    asyncio.run(main())


async def until(pilot: Pilot[None], condition: Callable[[], bool], seconds: float = 30) -> None:
    for _ in range(int(seconds / 0.05)):
        if condition():
            return
        await pilot.pause(0.05)
    raise AssertionError(f"not reached: {condition}")


async def choose(app: EdgeftApp, pilot: Pilot[None], title: str) -> None:
    """An action by its title, through the command palette."""
    await pilot.press("ctrl+p")
    await pilot.pause()
    await pilot.press(*title)
    await until(pilot, lambda: any(title in str(one.prompt) for one in _hits(app)))
    await pilot.press("enter")


def _hits(app: EdgeftApp) -> Sequence[Option]:
    found = app.screen.query(CommandList)
    return list(found.first().options) if found else []


def said(app: EdgeftApp, selector: str) -> str:
    return str(app.screen.query_one(selector, Static).render())


# --- Devices --------------------------------------------------------------------


@pytest.mark.parametrize("size", [(80, 24), (160, 50)])
def test_what_a_model_needs_on_every_device(folder: Path, size: tuple[int, int]) -> None:
    write_random(folder / "mine.gguf", context=8192)

    async def steps(app: EdgeftApp, pilot: Pilot[None]) -> None:
        await pilot.press("slash", *"mine.gguf", "enter", "a")
        await pilot.pause()
        await pilot.press("down", "down", "down", "enter")  # will it fit?
        await until(pilot, lambda: isinstance(app.screen, DevicesScreen) and bool(app.screen.rows))
        screen = app.screen
        assert isinstance(screen, DevicesScreen)
        assert {row.device.name for row in screen.rows} == set(names())
        assert said(app, "#line") == "$ edgeft devices fit mine.gguf"
        table = screen.query_one(DataTable)
        assert table.row_count == len(screen.rows) and table.size.height >= 12
        first = screen.rows[0]
        wanted = forecast(find_facts("mine.gguf"), first.device)
        assert table.get_row_at(0)[:5] == [
            first.device.name,
            "yes",
            f"{wanted.memory.total / 1e6:,.0f}",
            f"{first.device.usable / 1e6:,.0f}",
            str(wanted.decode),
        ]
        assert f"context {4096}" in said(app, "#why") and "mmap on" in said(app, "#why")

        screen.query_one("#context", Input).focus()
        await pilot.press(*"512", "enter")
        await until(pilot, lambda: "context 512" in said(app, "#why"))
        screen.query_one("#kv", Select).value = "q8_0"
        await until(pilot, lambda: said(app, "#line") == "$ edgeft devices fit mine.gguf --ctx 512 --kv q8_0")
        await until(
            pilot, lambda: all(row.choice and row.choice.forecast.settings.kv_type == "q8_0" for row in screen.rows)
        )

        table.focus()
        await pilot.press("down", "enter")
        await until(pilot, lambda: isinstance(app.screen, DeviceScreen))
        name = screen.rows[1].device.name
        assert said(app, "Static.command").startswith(f"$ edgeft devices fit mine.gguf --device {name} ")
        await until(pilot, lambda: app.screen.query_one(DataTable).row_count > 10)
        figures = app.screen.query_one(DataTable)
        shown = {figures.get_row_at(at)[0]: figures.get_row_at(at) for at in range(figures.row_count)}
        profile = load_profile(name)
        assert shown["bandwidth"][1:] == [
            f"{profile.bandwidth.value:g} GB/s",
            profile.bandwidth.basis,
            profile.bandwidth.source,
        ]
        assert shown["memory: kv"][1].endswith(" MB")
        await pilot.press("escape")
        await until(pilot, lambda: app.screen is screen)

    drive(steps, size)


def test_a_device_that_is_too_small_says_what_would_fit(folder: Path) -> None:
    small = load_profile("rpi4-2g")
    import dataclasses

    tiny = dataclasses.replace(
        small, name="tiny", memory=dataclasses.replace(small.memory, value=small.reserve.value + 60e6)
    )
    from edgeft.paths import home

    write_profile(tiny, home() / "devices" / "tiny.toml")
    write_random(folder / "mine.gguf", context=1 << 20)

    async def steps(app: EdgeftApp, pilot: Pilot[None]) -> None:
        await choose(app, pilot, "Devices, and what fits them")
        await until(pilot, lambda: isinstance(app.screen, DevicesScreen) and bool(app.screen.rows))
        screen = app.screen
        assert isinstance(screen, DevicesScreen)
        assert said(app, "#line") == "$ edgeft devices list"
        await pilot.press(*"mine.gguf", "tab", *"1048576", "enter")
        await until(pilot, lambda: bool(screen.rows) and screen.rows[-1].choice is not None)
        last = screen.rows[-1]
        assert last.device.name == "tiny" and last.choice and not last.choice.forecast.fits
        screen.query_one(DataTable).move_cursor(row=len(screen.rows) - 1)
        most = last.choice.forecast.largest_context
        await until(pilot, lambda: f"With --ctx {most} it fits." in said(app, "#why"))

        screen.query_one("#model", Input).value = "nothing.gguf"
        screen.query_one("#model").focus()
        await pilot.press("enter")
        await until(pilot, lambda: "nothing.gguf" in said(app, "#why") and not screen.rows)

    drive(steps)


def test_probing_this_machine_is_a_job(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = []
    monkeypatch.setattr(EdgeftApp, "start", lambda self, command: started.append(tuple(command)))

    async def steps(app: EdgeftApp, pilot: Pilot[None]) -> None:
        await choose(app, pilot, "Devices, and what fits them")
        await until(pilot, lambda: isinstance(app.screen, DevicesScreen) and bool(app.screen.rows))
        await pilot.press("f4", "f3")
        await pilot.pause()
        assert app.clipboard == "edgeft devices list"

    drive(steps)
    assert started == [("devices", "probe")]


# --- Cascade --------------------------------------------------------------------


@pytest.fixture
def cascade(folder: Path) -> Path:
    """A tuned cascade of which one answer was kept and one was sent."""
    (folder / "a.echo.json").write_text('{"default": "no"}')
    assert main(["cascade", "init", "cascade.toml", "--model", "a.echo.json"]) == 0
    file = folder / "cascade.toml"
    found = tune(cases(300, 0), PolicySettings(), "learned", Goal("quality", 0.95), "x")
    found.write(folder / "c.json")
    changes = {"policy.kind": "learned", "policy.calibration": "c.json", "audit.file": "audit.sqlite"}
    file.write_text(edited(file.read_text(), {**changes, "privacy.topics": ("salary",)}, file))
    settings = read_settings(file)
    audit = AuditLog(settings.audit_file, settings.audit)
    audit.add(Record("1", 1e9, authors=["local"], reason="learned: risk 0.1 at most 0.2"))
    audit.add(Record("2", 1e9, authors=["cloud"], reason="learned: risk 0.9 above 0.2", left_device=True, cost=0.01))
    audit.close()
    budget = Budget(settings.budget, settings.spending_file)
    budget.reserve(0.01, 40)
    budget.close()
    return file


async def at_cascade(app: EdgeftApp, pilot: Pilot[None], part: str) -> CascadeScreen:
    await choose(app, pilot, "Cascade: settings")
    await until(pilot, lambda: isinstance(app.screen, CascadeScreen) and app.screen.loaded is not None)
    screen = app.screen
    assert isinstance(screen, CascadeScreen)
    while screen.query_one(TabbedContent).active != part:
        await pilot.press("f8")
        await pilot.pause()
    return screen


@pytest.mark.parametrize("size", [(80, 24), (160, 50)])
def test_settings_are_checked_while_they_are_typed_and_written_with_their_comments(
    cascade: Path, size: tuple[int, int]
) -> None:
    before = cascade.read_text()

    async def steps(app: EdgeftApp, pilot: Pilot[None]) -> None:
        screen = await at_cascade(app, pilot, "settings")
        pane = screen.query_one(SettingsPane)
        await until(pilot, lambda: len(pane.query("Input, Select")) == len(keys(screen.loaded.settings)))  # type: ignore[union-attr]
        names = [key.name for key in pane._keys]
        assert pane.query_one("#keys").size.height >= 14
        field = pane.query_one(f"#key-{names.index('budget.day-money')}", Input)
        field.focus()
        field.value = ""
        await pilot.press(*"0.2x")
        await until(pilot, lambda: "budget.day-money must be a number" in pane.problem)
        await pilot.press("ctrl+s")
        await pilot.pause(0.3)
        assert cascade.read_text() == before
        await pilot.press("backspace", *"50")
        pane.query_one(f"#key-{names.index('privacy.redact')}", Select).value = "false"
        command = "$ edgeft cascade set cascade.toml budget.day-money=0.250 privacy.redact=false"
        await until(pilot, lambda: said(app, "#line") == command and not pane.problem)
        await pilot.press("f3")
        assert app.clipboard == command[2:]
        await pilot.press("ctrl+s")
        await until(pilot, lambda: cascade.read_text() != before and not pane.typed())

    drive(steps, size)
    changed = [(a, b) for a, b in zip(before.splitlines(), cascade.read_text().splitlines(), strict=True) if a != b]
    assert [b.split(" ")[:3] for _, b in changed] == [["day-money", "=", "0.25"], ["redact", "=", "false"]]
    assert all(a.partition("#")[2] == b.partition("#")[2] for a, b in changed)


@pytest.mark.parametrize("size", [(80, 24), (160, 50)])
def test_the_threshold_moves_quality_cost_and_the_share_of_the_cloud(cascade: Path, size: tuple[int, int]) -> None:
    file = cascade.with_name("c.json")
    before = read_calibration(file)

    async def steps(app: EdgeftApp, pilot: Pilot[None]) -> None:
        screen = await at_cascade(app, pilot, "threshold")
        pane = screen.query_one(ThresholdPane)
        await until(pilot, lambda: "kept:" in said(app, "#outcome") and pane.has_focus)
        assert pane.query_one("#curve").size.height >= 12
        await pilot.press(*["right"] * 3)
        await until(pilot, lambda: pane.threshold is not None and pane.threshold < before.threshold)
        assert pane.threshold is not None
        _, share, quality, cost = at_threshold(before, pane.threshold)
        assert share > at_threshold(before, before.threshold)[1]
        shown = f"{share:.1%} to the cloud, quality {quality:.1%}, {cost:.6f} USD per request"
        assert said(app, "#outcome").startswith(f"here: {pane.threshold:.4g}, {shown}")
        assert said(app, "#line") == f"$ edgeft cascade threshold cascade.toml --to {pane.threshold!r}"
        wanted = pane.threshold
        assert read_calibration(file) == before
        await pilot.press("ctrl+s")
        await until(pilot, lambda: read_calibration(file).threshold == wanted and pane.threshold is None)

    drive(steps, size)


def test_spending_and_routes_follow_what_is_answered(cascade: Path) -> None:
    settings = read_settings(cascade)

    async def steps(app: EdgeftApp, pilot: Pilot[None]) -> None:
        screen = await at_cascade(app, pilot, "routes")
        table = screen.query_one(RoutesPane).query_one(DataTable)
        await until(pilot, lambda: table.row_count == 2)
        assert table.get_row_at(0)[1:4] == ["cloud", "yes", "0.010000"]
        assert "this day: 0.010000 of 0.5 USD, 40 tokens" in said(app, "#spent")
        await until(pilot, lambda: "risk 0.9 above 0.2" in said(app, "#route"))
        audit = AuditLog(settings.audit_file, settings.audit)
        audit.add(Record("3", 1e9, authors=["local"], reason="offline"))
        audit.close()
        await until(pilot, lambda: table.row_count == 3)
        assert said(app, "#line").splitlines()[0] == "$ edgeft cascade log cascade.toml"

    drive(steps)


def test_what_would_leave_the_device_is_shown_while_it_is_typed(cascade: Path) -> None:
    pytest.importorskip("datafog")

    async def steps(app: EdgeftApp, pilot: Pilot[None]) -> None:
        screen = await at_cascade(app, pilot, "privacy")
        pane = screen.query_one(PrivacyPane)
        pane.query_one("#text").focus()
        await pilot.press(*"ask ada@example.org")
        leaves = pane.query_one("#leaves", TextArea)
        await until(pilot, lambda: leaves.text == "ask [EMAIL_1]" and said(app, "#verdict") == "replaced: 1 EMAIL")
        await pilot.press(*" salary")
        await until(pilot, lambda: "topic 'salary'" in said(app, "#verdict") and not leaves.text)

    drive(steps)


def test_a_folder_without_a_cascade_says_how_to_begin(folder: Path) -> None:
    async def steps(app: EdgeftApp, pilot: Pilot[None]) -> None:
        await choose(app, pilot, "Cascade: settings")
        await until(
            pilot, lambda: isinstance(app.screen, CascadeScreen) and "edgeft cascade init" in said(app, "#line")
        )
        await pilot.press("ctrl+s", "f3", "f8", "left", "f8", "f8")
        await pilot.pause()

    drive(steps)
