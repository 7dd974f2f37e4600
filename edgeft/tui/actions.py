"""What can be done with each thing on the home screen, and the command that does it."""

from __future__ import annotations

import enum
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from edgeft.item import Item


class How(enum.Enum):
    """Where a command's work is seen."""

    CHAT = "a conversation"
    AGAINST = "two conversations, once the models are chosen"
    FORM = "a form to fill in first"
    JOB = "a job in the background"
    SHOW = "its output"
    WATCH = "a job's progress"
    CURVE = "curves of runs"
    EXPORT = "the plan of every target, then a job"
    LEDGER = "what each step lost"
    DEPLOY = "devices, each with its progress"
    FIT = "a table of devices"
    CASCADE = "a cascade: settings, threshold, spending, privacy"
    HERE = "the conversation that is on the screen"


ANY = "MODEL"
"""A model that is still to be chosen."""


@dataclass(frozen=True)
class Action:
    """One thing to do."""

    title: str
    command: tuple[str, ...]
    """Arguments of `edgeft`."""
    how: How
    says: str = ""
    """What is typed into the command."""

    @property
    def line(self) -> str:
        typed = f"echo {shlex.quote(self.says)} | " if self.says else ""
        return typed + command_line(self.command)


def command_line(command: Sequence[str]) -> str:
    return shlex.join(("edgeft", *command))


def actions(item: Item) -> list[Action]:
    """What one can do with an item; the first is what one would do next."""
    return {
        "model": _model,
        "run": _run,
        "artifact": _artifact,
        "adapter": _adapter,
        "bundle": _bundle,
        "job": _job,
        "device": _device,
    }[item.kind](item)


def general() -> list[Action]:
    """What needs no item."""
    return [
        Action("Two models side by side", ("chat", ANY, "--against", ANY), How.AGAINST),
        Action("Train a model", ("train",), How.FORM),
        Action("Check a data set", ("data", "check"), How.FORM),
        Action("Prepare a data set", ("data", "prepare"), How.FORM),
        Action("Export a model", ("export",), How.EXPORT),
        Action("Pull a model", ("models", "pull"), How.FORM),
        Action("Import a model", ("models", "import"), How.FORM),
        Action("Package a model for a device", ("package",), How.FORM),
        Action("Bundles on devices: send, status, roll back", ("deploy", "send"), How.DEPLOY),
        Action("Begin a cascade", ("cascade", "init"), How.FORM),
        Action("Fit a cascade to its model", ("cascade", "tune"), How.FORM),
        Action("Judge a cascade", ("cascade", "report"), How.FORM),
        Action(
            "Cascade: settings, threshold, spending, privacy", ("cascade", "threshold", "cascade.toml"), How.CASCADE
        ),
        Action("What left the device, why, and its cost", ("cascade", "log"), How.FORM),
        Action("Devices, and what fits them", ("devices", "list"), How.FIT),
        Action("Probe this machine", ("devices", "probe"), How.JOB),
        Action("The demo: a real model in twelve minutes", ("demo",), How.JOB),
        Action("What works here, and what is missing", ("doctor",), How.SHOW),
        Action("Settings and where they come from", ("config", "show"), How.SHOW),
    ]


def against(model: str) -> Action:
    """Two models side by side."""
    return Action("Chat beside another model", ("chat", model, "--against", ANY), How.AGAINST)


def models(items: Sequence[Item]) -> list[str]:
    """What one can talk to, by the name that commands take."""
    return [item.name for item in items if any(action.how is How.CHAT for action in actions(item)[:2])]


def first_steps() -> list[Action]:
    """What one does when there is nothing yet."""
    return [
        Action("Fetch a model of 93 MB, then talk to it", ("models", "pull", "smollm2-135m"), How.JOB),
        Action("See all of it: train, export, verify, chat, in twelve minutes", ("demo",), How.JOB),
        Action("Look at data of your own", ("data", "check"), How.FORM),
        Action("What works here, and what is missing", ("doctor",), How.SHOW),
    ]


def _model(item: Item) -> list[Action]:
    if item.state != "here":
        return [Action("Pull", ("models", "pull", item.name), How.JOB)]
    found = [
        Action("Train", ("train", "--model", _path(item)), How.FORM),
        Action("Will it fit?", ("devices", "fit", _path(item)), How.FIT),
        Action("Remove from the store", ("models", "rm", item.name), How.FORM),
    ]
    if item.next[0] == "chat":
        found.insert(0, Action("Chat", item.next, How.CHAT))
        found[2:2] = [Action("Evaluate", ("eval", item.name), How.FORM), against(item.name)]
    return found


def _path(item: Item) -> str:
    """An import is trained by its folder."""
    return item.next[2] if item.next[0] == "train" else item.name


def _run(item: Item) -> list[Action]:
    if item.state == "not finished":
        return [
            Action("Continue training", ("train", "--resume", item.name), How.JOB),
            Action("Keep what it has learned", ("train", "--resume", item.name, "--finish"), How.JOB),
            Action("Curves, samples, comparison", ("curves", item.name), How.CURVE),
        ]
    return [
        Action("Export", item.next, How.EXPORT),
        Action("Curves, samples, comparison", ("curves", item.name), How.CURVE),
        Action("Will it fit?", ("devices", "fit", item.name), How.FIT),
    ]


def _artifact(item: Item) -> list[Action]:
    found = [
        Action("Chat", ("chat", item.name), How.CHAT),
        against(item.name),
        Action("Evaluate", ("eval", item.name), How.FORM),
        Action("Will it fit?", ("devices", "fit", item.name), How.FIT),
        Action("Package for a device", ("package", item.name), How.FORM),
    ]
    if item.next[0] == "verify":
        found.insert(0, Action("Verify", item.next, How.JOB))
    if item.state == "verified":
        found.insert(1, Action("See what each step lost", ("verify", item.name, "--last"), How.LEDGER))
    return found


def _adapter(item: Item) -> list[Action]:
    return [
        Action("Chat on its base", item.next, How.CHAT),
        Action("Chat beside its base", (*item.next, "--against", item.next[1]), How.CHAT),
    ]


def _bundle(item: Item) -> list[Action]:
    if item.state == "installed":
        return [
            Action("What is installed", ("install", "--list"), How.SHOW),
            Action("Go back a version", ("install", "--rollback", item.name), How.FORM),
        ]
    return [
        Action("Chat", ("chat", item.name), How.CHAT),
        Action("Bring it onto devices", ("deploy", "send", item.name), How.DEPLOY),
        Action("Install here", ("install", item.name), How.FORM),
    ]


def _job(item: Item) -> list[Action]:
    watch = Action("Watch", ("jobs", "watch", item.name), How.WATCH)
    if item.state == "paused":
        return [watch, Action("Go on", ("jobs", "resume", item.name), How.SHOW)]
    if item.state in ("running", "waiting"):
        return [watch, Action("Cancel", ("jobs", "cancel", item.name), How.SHOW)]
    after = [Action("Forget", ("jobs", "rm", item.name), How.SHOW)]
    if item.state != "done":
        after.insert(0, Action("Try again", ("jobs", "retry", item.name), How.SHOW))
    return [watch, *after]


def _device(item: Item) -> list[Action]:
    return [
        Action("Every figure with its source", ("devices", "show", item.name), How.SHOW),
        Action("Does a model fit?", ("devices", "fit", "--device", item.name), How.FORM),
    ]
