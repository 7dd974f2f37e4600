"""Driving the screens by keys."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from textual.pilot import Pilot
from textual.screen import Screen
from textual.widgets import DataTable, Static

from edgeft.cli.main import cli
from edgeft.tui.app import EdgeftApp
from edgeft.tui.home import HomeScreen

Steps = Callable[[EdgeftApp, Pilot[None]], Awaitable[None]]
AnyScreen = TypeVar("AnyScreen", bound=Screen[None])
PATIENCE_S = 180
"""How long anything may take on a busy machine before a test fails."""


def drive(steps: Steps, size: tuple[int, int] = (80, 24)) -> None:
    """Run the application without a terminal, from its first screen on."""

    async def main() -> None:
        app = EdgeftApp(cli)
        async with app.run_test(size=size) as pilot:
            await until(pilot, lambda: isinstance(app.screen, HomeScreen) and bool(app.screen._shown))
            await steps(app, pilot)

    asyncio.run(main())


async def until(pilot: Pilot[None], condition: Callable[[], bool], seconds: float = PATIENCE_S) -> None:
    for _ in range(int(seconds / 0.05)):
        if condition():
            return
        await pilot.pause(0.05)
    raise AssertionError(f"not reached within {seconds} s; on the screen: {seen(pilot)}")


async def on(pilot: Pilot[None], kind: type[AnyScreen]) -> AnyScreen:
    """The screen, when it is the one that is seen."""
    await until(pilot, lambda: isinstance(pilot.app.screen, kind) and pilot.app.screen.is_mounted)
    screen = pilot.app.screen
    assert isinstance(screen, kind)
    return screen


def said(screen: Screen[None], selector: str) -> str:
    return str(screen.query_one(selector, Static).render())


def rows(screen: Screen[None], selector: str) -> list[list[str]]:
    table = screen.query_one(selector, DataTable)
    return [list(map(str, table.get_row_at(at))) for at in range(table.row_count)]


def keys(screen: Screen[None]) -> set[str]:
    """Descriptions of the keys that the footer offers now."""
    return {active.binding.description for active in screen.active_bindings.values() if active.binding.show}


def seen(pilot: Pilot[None]) -> str:
    lines = [str(widget.render()) for widget in pilot.app.screen.query(Static)]
    return f"{type(pilot.app.screen).__name__}: " + " | ".join(filter(None, lines))
