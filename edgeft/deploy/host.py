"""One device: what it lacks is sent, installed, asked a question; a connection that breaks goes on where it was."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections import deque
from dataclasses import dataclass
from typing import Any

from edgeft.bundle import Entry
from edgeft.errors import EdgeftError, ModelError, Unreachable, WriteError
from edgeft.package.install import Installed, State, check_order, check_target
from edgeft.progress import Progress, Silent

from .link import Device, Link, checked, connected
from .parcel import CHUNK, WINDOW, Parcel

_DAMAGED = 3
"""A chunk that arrives damaged so often is given up."""
_LONGEST_WAIT_S = 30.0


@dataclass(frozen=True)
class Options:
    """How to deploy."""

    keep: int = 2
    allow_downgrade: bool = False
    ask: bool = True
    retries: int = 5
    """Broken connections in a row without a byte of progress."""
    wait_s: float = 1.0
    """Before the first new attempt; doubled each time."""
    again: bool = False
    """Install although the device has this very version in use."""


@dataclass
class Outcome:
    """What happened on one device."""

    device: str
    state: str
    """updated, unchanged, failed, or untouched."""
    id: str | None = None
    before: str | None = None
    """The version in use until then."""
    answer: str | None = None
    sent_bytes: int = 0
    """Of files, as often as they were sent."""
    lost_bytes: int = 0
    """Of those, what was on the way when a connection broke, or arrived damaged, and was sent again."""
    connections: int = 0
    seconds: float = 0.0
    error: str | None = None
    hint: str | None = None
    _reached: dict[str, int] = dataclasses.field(default_factory=dict, repr=False)
    """Digest of a file -> chunks of it that were sent."""

    def as_dict(self) -> dict[str, Any]:
        value = dataclasses.asdict(self)
        del value["_reached"]
        return value

    def resume(self, entry: Entry, position: int) -> None:
        """Chunks from `position` on are sent (again)."""
        again = range(position, self._reached.get(entry.sha256, 0))
        self.lost_bytes += sum(min(CHUNK, entry.bytes - index * CHUNK) for index in again)
        self._reached[entry.sha256] = position

    def sent(self, entry: Entry, size: int) -> None:
        self.sent_bytes += size
        self._reached[entry.sha256] += 1


async def deploy(device: Device, parcel: Parcel, options: Options, progress: Progress | None = None) -> Outcome:
    """Bring a bundle onto a device.

    Raises:
        Unreachable: the connection could not be held. CheckFailed: host key, order of versions, or a wrong answer.
        ModelError, WriteError, EdgeftError: as the installer says. The version in use answers in every case.
    """
    outcome, started = Outcome(device.label, "failed"), time.monotonic()
    failures, shown = 0, progress or Silent()
    while True:
        before = outcome.sent_bytes
        try:
            async with connected(device, _pythons(parcel)) as link:
                outcome.connections += 1
                await _once(link, parcel, options, outcome, shown)
            outcome.seconds = round(time.monotonic() - started, 2)
            return outcome
        except Unreachable:
            failures = 1 if outcome.sent_bytes > before else failures + 1
            if failures > options.retries:
                raise
            await asyncio.sleep(min(options.wait_s * 2 ** (failures - 1), _LONGEST_WAIT_S))
        finally:
            shown.finish()


def _pythons(parcel: Parcel) -> tuple[str, ...]:
    wanted = parcel.bundle.target.python
    return ("python3",) if wanted == "any" else (f"python{wanted}", "python3")


async def _once(link: Link, parcel: Parcel, options: Options, outcome: Outcome, progress: Progress) -> None:
    bundle, root = parcel.bundle, link.device.root
    here = await link.call("status", root=root, name=bundle.name)
    check_target(bundle, here["architecture"], here["python"], link.device.label)
    state = _state(bundle.name, here)
    if outcome.before is None:
        outcome.before = state.current
    if not options.again and state.current and state.current.startswith(bundle.id):
        outcome.id, outcome.state = state.current, "updated" if outcome.sent_bytes else "unchanged"
        return
    check_order(bundle, state, options.allow_downgrade)
    files = parcel.files()
    wanted = [{"sha256": entry.sha256, "bytes": entry.bytes} for entry in files.values()]
    answer = await link.call("missing", root=root, name=bundle.name, files=wanted)
    lacking = [(files[item["sha256"]], int(item["held"])) for item in answer["missing"]]
    _check_space(link.device, parcel, lacking, here["free"])
    progress.start(f"Sending to {link.device.label}", sum(entry.bytes - held for entry, held in lacking), "bytes")
    for entry, _ in lacking:
        await send(link, parcel, entry, outcome, progress)
    progress.finish()
    progress.start(f"Installing on {link.device.label}", None)
    result = await link.call("install", **_request(link.device, parcel, options))
    outcome.id, outcome.answer, outcome.state = result["id"], result["answer"], "updated"


def _state(name: str, here: dict[str, Any]) -> State:
    """Raises: ModelError when the device's own list cannot be read."""
    app: dict[str, Any] = next((app for app in here["apps"] if app["name"] == name), {"current": None, "versions": []})
    try:
        return State(name, app["current"], tuple(Installed(**version) for version in app["versions"]))
    except TypeError as error:
        raise ModelError(f"{here['host']}: the list of versions of {name} cannot be read: {error}") from error


def _check_space(device: Device, parcel: Parcel, lacking: list[tuple[Entry, int]], free: int) -> None:
    needed = sum(entry.bytes - held for entry, held in lacking)
    needed += parcel.unpacked_bytes([entry for entry, _ in lacking])
    if needed > free:
        raise WriteError(
            f"{device.label} needs {needed / 1e6:.0f} MB; {free / 1e6:.0f} MB are free",
            "Free some space there, or choose another disk with --root. Nothing was sent.",
        )


def _request(device: Device, parcel: Parcel, options: Options) -> dict[str, Any]:
    arguments = ["--keep", str(options.keep)]
    arguments += ["--bin", device.bin] if device.bin else []
    arguments += ["--allow-downgrade"] if options.allow_downgrade else []
    arguments += [] if options.ask else ["--no-health-check"]
    return {
        "manifest": parcel.manifest,
        "signature": parcel.signature,
        "arguments": arguments,
        "ask": options.ask,
        "question": parcel.bundle.question,
        "expected": parcel.bundle.expected,
    }


async def send(link: Link, parcel: Parcel, entry: Entry, outcome: Outcome, progress: Progress) -> None:
    """One file, from where the device has it. Raises: ModelError when a chunk does not arrive undamaged."""
    digests = await asyncio.to_thread(parcel.digests, entry)
    about = {"sha256": entry.sha256, "chunk": CHUNK, "digests": digests, "executable": entry.executable}
    position, damaged = int((await link.call("begin", **about))["next"]), 0
    while position < len(digests):
        reached = await _stream(link, parcel, entry, position, outcome, progress)
        damaged = damaged + 1 if reached == position else 1
        if reached < len(digests) and damaged >= _DAMAGED:
            raise ModelError(
                f"{link.device.label}: chunk {reached} of {entry.path} arrived damaged {damaged} times",
                "Check this machine's memory and disk, and the device's.",
            )
        position = reached
    await link.call("finish")


async def _stream(link: Link, parcel: Parcel, entry: Entry, start: int, outcome: Outcome, progress: Progress) -> int:
    """Send chunks until the end or until one is refused; returns the number of those the device has."""
    waiting: deque[int] = deque()
    good = start
    outcome.resume(entry, start)
    for index, chunk in enumerate(parcel.chunks(entry, start), start):
        await link.write("chunk", chunk, index=index)
        outcome.sent(entry, len(chunk))
        waiting.append(len(chunk))
        while len(waiting) >= WINDOW:
            if not await _confirmed(link, waiting, progress, entry):
                return await _drain(link, waiting, good)
            good += 1
    while waiting:
        if not await _confirmed(link, waiting, progress, entry):
            return await _drain(link, waiting, good)
        good += 1
    return good


async def _confirmed(link: Link, waiting: deque[int], progress: Progress, entry: Entry) -> bool:
    answer = await link.read()
    size = waiting.popleft()
    if answer.get("error") == "chunk":
        return False
    checked(link.device, answer)
    progress.advance(size, entry.path)
    return True


async def _drain(link: Link, waiting: deque[int], good: int) -> int:
    """Chunks behind a refused one are refused too; their answers must not be taken for others'."""
    while waiting:
        waiting.popleft()
        await link.read()
    return good


async def status(device: Device, name: str | None = None) -> dict[str, Any]:
    """What is installed on a device. Raises: as `connected`."""
    async with connected(device) as link:
        return {**await link.call("status", root=device.root, name=name), "device": device.label}


async def rollback(device: Device, name: str) -> dict[str, Any]:
    """Back to the version before. Raises: UsageError when there is none; as `connected`."""
    async with connected(device) as link:
        return {**await link.call("rollback", root=device.root, name=name), "device": device.label}


def failed(device: Device, error: EdgeftError) -> Outcome:
    return Outcome(device.label, "failed", error=error.message, hint=error.hint)
