"""No feature exists on a screen only: every key has a command, which the command line takes as it stands."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path

import click
import pytest
from textual.binding import Binding
from textual.widget import Widget

import edgeft.tui
from edgeft.cli.chat import COMMANDS
from edgeft.cli.main import cli
from edgeft.tui.forms import find_command

MOVES = frozenset(
    {
        "actions",
        "app.focus_next",
        "app.focus_previous",
        "app.pop_screen",
        "app.quit",
        "back",
        "clear",
        "compare",  # draws what `edgeft curves A B` prints; CurvesScreen.command says so
        "copy",
        "copy_command",
        "dismiss",
        "filter",
        "form",  # every option of the command that the screen shows
        "help",
        "load",
        "log",
        "mark",
        "new",
        "newline",
        "next",
        "page",
        "pane",
        "part",
        "quit",
        "refresh",
        "stop",  # Ctrl-C
        "tab",
    }
)
"""What changes the view alone, or opens another screen whose keys are below."""

PAIRS: dict[tuple[str, str], str] = {
    ("OutputScreen", "run"): "doctor",
    ("JobControl", "pause"): "jobs pause last",
    ("JobControl", "cancel"): "jobs cancel last",
    ("JobControl", "retry"): "jobs retry last",
    ("TrainingScreen", "finish"): "jobs finish last",
    ("JobScreen", "curves"): "curves run",
    ("CurvesScreen", "samples"): "curves run --samples",
    ("FormScreen", "start"): "jobs start train --model m --data d",
    ("FormScreen", "plan"): "train --model m --data d --dry-run",
    ("FormScreen", "data"): "data check d --preview 2 --model m",
    ("ExportScreen", "plan"): "export run --to gguf-q4 --dry-run --json",
    ("ExportScreen", "start"): "jobs start --after last export run --to gguf-q4",
    ("LedgerScreen", "verify"): "verify m.gguf",
    ("LedgerScreen", "package"): "package m.gguf",
    ("LedgerScreen", "chat"): "chat m.gguf",
    ("LedgerScreen", "fit"): "devices fit m.gguf",
    ("DeployScreen", "send"): "deploy send run pi@one --inventory f.toml",
    ("DeployScreen", "status"): "deploy status pi@one --json",
    ("DeployScreen", "rollback"): "deploy rollback m pi@one --json",
    ("DeployScreen", "cancel"): "jobs cancel last",
    ("DevicesScreen", "best"): "devices fit m.gguf --best",
    ("DevicesScreen", "probe"): "devices probe",
    ("CascadeScreen", "keep"): "cascade set cascade.toml budget.day-money=1",
    ("ThresholdPane", "move"): "cascade threshold cascade.toml",
    ("ThresholdPane", "tune"): "cascade tune cascade.toml --data d",
    ("ChatScreen", "retry"): "/retry",
    ("ChatScreen", "edit"): "/edit TEXT",
    ("ChatScreen", "by"): "/by WHO",
    ("ChatScreen", "settings"): "/set NAME X",
    ("ChatScreen", "conversations"): "history search words",
    ("ChatScreen", "branch"): "history branch 1",
    ("ChatScreen", "rename"): "history rename 1 title",
    ("ChatScreen", "copy_answer"): "history show 1 --last",
    ("ChatScreen", "copy_code"): "history show 1 --last --code",
    ("ChatScreen", "save"): "history export 1 f.md",
    ("ConversationsScreen", "rename"): "history rename 1 title",
    ("SettingsScreen", "keep"): "/set NAME X",
    ("SettingsScreen", "tick"): "/adapter FILE",
    ("SideBySideScreen", "keep"): "chat m.gguf --resume 1",
    ("SideBySideScreen", "by"): "/by WHO",
    ("Said", "copy_code"): "history show 1 --last --code",
    ("Said", "edit"): "/edit TEXT",
    ("Said", "branch"): "history branch 1",
}
"""(screen, action) -> a command, or what one says in `edgeft chat`, that does the same. Files named here are made by
the test."""


def widgets() -> list[type[Widget]]:
    for module in pkgutil.iter_modules(edgeft.tui.__path__):
        importlib.import_module(f"edgeft.tui.{module.name}")
    found: list[type[Widget]] = []
    left = list(Widget.__subclasses__())
    while left:
        kind = left.pop()
        left += kind.__subclasses__()
        if kind.__module__.startswith("edgeft.tui."):
            found.append(kind)
    return sorted(set(found), key=lambda kind: kind.__name__)


def own_actions(kind: type[Widget]) -> set[str]:
    """Without their arguments."""
    bindings = [binding for binding in vars(kind).get("BINDINGS", ()) if isinstance(binding, Binding)]
    return {binding.action.partition("(")[0] for binding in bindings}


def paired(kind: type[Widget], action: str) -> str | None:
    return next((PAIRS[one.__name__, action] for one in kind.__mro__ if (one.__name__, action) in PAIRS), None)


def test_every_key_of_every_screen_moves_or_has_a_command() -> None:
    found = widgets()
    assert len([kind for kind in found if own_actions(kind)]) >= 12
    alone = [
        f"{kind.__name__}: {action}"
        for kind in found
        for action in sorted(own_actions(kind))
        if action not in MOVES and paired(kind, action) is None
    ]
    assert not alone, "name their commands in PAIRS"


def test_no_pair_is_of_a_key_that_is_gone() -> None:
    has = {(above.__name__, action) for kind in widgets() for action in own_actions(kind) for above in kind.__mro__}
    assert set(PAIRS) <= has


@pytest.mark.parametrize("line", sorted(set(PAIRS.values())))
def test_the_command_of_a_key_is_taken_by_the_command_line(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through click itself: options exist, values have the right type, nothing required is missing."""
    if line.startswith("/"):
        assert any(told.startswith(line) for told in COMMANDS.splitlines()), "edgeft chat knows no such word"
        return
    monkeypatch.chdir(tmp_path)
    for name in ("m.gguf", "f.toml", "cascade.toml", "run"):
        (tmp_path / name).touch()
    command, names, words = find_command(cli, line.split())
    assert not isinstance(command, click.Group), line
    command.make_context(names[-1], list(words))
