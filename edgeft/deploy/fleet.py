"""Many devices: an inventory, a few first, then the others side by side, and an end when too many fail.

[rollout]
canary = 1          # devices that must succeed before any other is touched
parallel = 4        # at a time after that
failures = 0        # how many may fail before no further one is started

[defaults]          # any key of a device
user = "pi"
identity = "~/.ssh/fleet"

[devices.kitchen]
host = "192.0.2.10"
"""

from __future__ import annotations

import asyncio
import dataclasses
import tomllib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeft.errors import ConfigError, EdgeftError, UsageError
from edgeft.progress import Progress

from .host import Options, Outcome, deploy, failed
from .link import Device
from .parcel import Parcel

_TEXTS = ("host", "user", "identity", "known_hosts", "python", "root", "bin")


@dataclass(frozen=True)
class Rollout:
    """How a fleet is updated."""

    canary: int = 1
    parallel: int = 4
    failures: int = 0


def read_inventory(file: Path) -> tuple[list[Device], Rollout]:
    """Devices in the order of the file.

    Raises:
        ConfigError: the file cannot be read, or a key is unknown or of the wrong type.
    """
    try:
        raw = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read: {error}") from error
    if unknown := set(raw) - {"rollout", "defaults", "devices"}:
        raise ConfigError(f"{file}: unknown table {min(unknown)!r}", "There are: rollout, defaults, devices.")
    tables, defaults = raw.get("devices", {}), raw.get("defaults", {})
    if not isinstance(tables, dict) or not tables:
        raise ConfigError(f"{file} has no devices", 'One per table: [devices.kitchen] with host = "…".')
    devices = [_device(name, {"host": name, **defaults, **table}, file) for name, table in tables.items()]
    return devices, _rollout(raw.get("rollout", {}), file)


def _device(name: str, table: dict[str, Any], file: Path) -> Device:
    for key, value in table.items():
        kind = {"port": int}.get(key, str if key in _TEXTS else None)
        if kind is None or type(value) is not kind:
            raise ConfigError(f"{file}: devices.{name}.{key} is not allowed, or not of the right type")
    values: dict[str, Any] = dict(table)
    if "identity" in values:
        values["identity"] = (Path(values["identity"]),)
    if "known_hosts" in values:
        values["known_hosts"] = Path(values["known_hosts"])
    return Device(name=name, **values)


def _rollout(table: dict[str, Any], file: Path) -> Rollout:
    least = {"canary": 0, "parallel": 1, "failures": 0}
    for key, value in table.items():
        if key not in least or type(value) is not int or value < least[key]:
            raise ConfigError(f"{file}: rollout.{key} = {value!r} is not allowed")
    return Rollout(**table)


def only(devices: Sequence[Device], names: Sequence[str]) -> list[Device]:
    """Those of the given names, all without any. Raises: UsageError."""
    if unknown := set(names) - {device.name for device in devices}:
        raise UsageError(f"the inventory has no device {min(unknown)!r}")
    return [device for device in devices if not names or device.name in names]


def limited(rollout: Rollout, **given: int | None) -> Rollout:
    """With what a command line says instead of the file."""
    return dataclasses.replace(rollout, **{key: value for key, value in given.items() if value is not None})


async def roll_out(
    devices: Sequence[Device],
    rollout: Rollout,
    parcel: Parcel,
    options: Options,
    report: Callable[[Outcome], None],
    watch: Callable[[Device], Progress] | None = None,
) -> list[Outcome]:
    """Deploy to all, in order; a device's failure is its outcome. One outcome per device, in the same order.

    Args:
        watch: what is told of a device's progress.
    """

    async def one(device: Device) -> Outcome:
        try:
            outcome = await deploy(device, parcel, options, watch(device) if watch else None)
        except EdgeftError as error:
            outcome = failed(device, error)
        report(outcome)
        return outcome

    first, rest = devices[: rollout.canary], devices[rollout.canary :]
    outcomes = list(await asyncio.gather(*map(one, first)))
    if any(outcome.error for outcome in outcomes):
        return outcomes + [_untouched(device) for device in rest]
    return outcomes + await _side_by_side(rest, rollout, one)


async def _side_by_side(
    devices: Sequence[Device], rollout: Rollout, one: Callable[[Device], Awaitable[Outcome]]
) -> list[Outcome]:
    slots, failures = asyncio.Semaphore(rollout.parallel), 0

    async def turn(device: Device) -> Outcome:
        nonlocal failures
        async with slots:
            if failures > rollout.failures:
                return _untouched(device)
            outcome = await one(device)
            failures += outcome.error is not None
            return outcome

    return list(await asyncio.gather(*map(turn, devices)))


def _untouched(device: Device) -> Outcome:
    return Outcome(device.label, "untouched")


async def ask_all(devices: Sequence[Device], question: Callable[[Device], Awaitable[dict[str, Any]]]) -> list[Any]:
    """The same of every device; an error is an answer too."""

    async def one(device: Device) -> dict[str, Any]:
        try:
            return await question(device)
        except EdgeftError as error:
            return {"device": device.label, "error": error.message, "hint": error.hint}

    return list(await asyncio.gather(*map(one, devices)))
