"""The screens for devices, cascades and exports, driven by keys through what one does on them."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from textual.command import CommandList
from textual.pilot import Pilot
from textual.widgets import DataTable, Input, Select, Static
from textual.widgets.option_list import Option
from tiny_gguf import write_random

from edgeft.cli.main import cli
from edgeft.device import load_profile, names, write_profile
from edgeft.forecast.find import find_facts
from edgeft.forecast.fit import forecast
from edgeft.tui.app import EdgeftApp
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
        await pilot.press("down", "down", "enter")  # will it fit?
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
