"""`edgeft deploy`: bundles onto devices over SSH."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgeft.cli._output import ConsoleProgress, dry_run_option, json_option, note, print_json, print_table
from edgeft.errors import CheckFailed, EdgeftError, UsageError
from edgeft.jobs.events import JobEvents

if TYPE_CHECKING:
    from edgeft.deploy.fleet import Rollout
    from edgeft.deploy.host import Outcome
    from edgeft.deploy.link import Device

EPILOG = """\b
Examples:
  edgeft deploy demo-q4-rpi5/ pi@192.0.2.10        send what it lacks, install, ask, switch
  edgeft deploy demo.tar.zst --inventory fleet.toml --canary 1 --parallel 8
  edgeft deploy status pi@192.0.2.10
  edgeft deploy rollback demo-q4 pi@192.0.2.10
  edgeft deploy demo-q4-rpi5/ --emit ansible --out playbook/
"""
_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


class _BundleOrVerb(click.Group):
    """`status` and `rollback` are commands; anything else is a bundle to deploy."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in self.commands:
            args = ["send", *args]
        return super().resolve_command(ctx, args)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        # Flags before the bundle are the bundle's, not the group's.
        if args and args[0].startswith("-") and args[0] not in ctx.help_option_names:
            args = ["send", *args]
        return super().parse_args(ctx, args)


def device_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Where devices are and how to get in."""
    for option in reversed(
        (
            click.option(
                "--inventory", type=_FILE, help="Devices and rollout (TOML), instead of or besides addresses."
            ),
            click.option("--only", multiple=True, metavar="NAME", help="This device of the inventory; repeatable."),
            click.option("-i", "--identity", multiple=True, type=_FILE, help="Private SSH key; default: as ssh does."),
            click.option("--port", type=click.IntRange(1, 65535), help="SSH port; default: 22."),
            click.option(
                "--known-hosts", type=click.Path(path_type=Path), help="Host keys to trust; ~/.ssh/known_hosts."
            ),
            click.option("--python", help="Python on the device; default: the bundle's version, else python3."),
            click.option("--root", help="Where versions go on the device; default: in edgeft's data folder there."),
            click.option("--bin", "bin_folder", help="Where the command goes on the device; ~/.local/bin."),
        )
    ):
        command = option(command)
    return command


@click.group(cls=_BundleOrVerb, epilog=EPILOG, subcommand_metavar="BUNDLE [USER@]HOST… | COMMAND")
def deploy() -> None:
    """Bring a bundle onto devices over SSH; `edgeft deploy send --help` shows all options.

    Only files that a device lacks are sent, every chunk is checked, and a broken connection goes on where it was. The
    new version is asked a question on the device; unless it answers, the version before stays in use.
    """


@deploy.command(epilog=EPILOG)
@click.argument("bundle", type=click.Path(exists=True, path_type=Path))
@click.argument("addresses", nargs=-1, metavar="[USER@]HOST…")
@device_options
@click.option("--key", type=_FILE, help="Public key that must have signed the bundle.")
@click.option("--keep", type=click.IntRange(min=1), default=2, show_default=True, help="Versions that stay.")
@click.option("--allow-downgrade", is_flag=True, help="Deploy although a newer version is installed.")
@click.option("--no-health-check", is_flag=True, help="Switch without asking the bundle's question.")
@click.option("--again", is_flag=True, help="Install although this version is in use.")
@click.option(
    "--retries", type=click.IntRange(min=0), default=5, show_default=True, help="Broken connections in a row."
)
@click.option("--canary", type=click.IntRange(min=0), help="Devices that must succeed first; default: 1.")
@click.option("--parallel", type=click.IntRange(min=1), help="Devices at a time; default: 4.")
@click.option("--failures", type=click.IntRange(min=0), help="How many may fail before the rest is left alone; 0.")
@click.option("--emit", type=click.Choice(("ansible",)), help="Write a playbook and role instead of deploying.")
@click.option("--out", type=click.Path(path_type=Path), help="Where --emit writes; default: NAME-ansible.")
@json_option
@dry_run_option
def send(
    bundle: Path,
    addresses: tuple[str, ...],
    key: Path | None,
    emit: str | None,
    out: Path | None,
    canary: int | None,
    parallel: int | None,
    failures: int | None,
    as_json: bool,
    dry_run: bool,
    **flags: Any,
) -> None:
    """Deploy BUNDLE (a folder or an archive); the word `send` can be left out."""
    import tempfile

    from edgeft.deploy import fleet, parcel
    from edgeft.package.formats import opened

    devices, rollout = _devices(addresses, **{name: flags.pop(name) for name in _DEVICE_FLAGS}, needed=not emit)
    rollout = fleet.limited(rollout, canary=canary, parallel=parallel, failures=failures)
    with tempfile.TemporaryDirectory() as temporary, opened(bundle, Path(temporary)) as folder:
        load = parcel.load(folder, key)
        if dry_run:
            _print_plan(load, devices, as_json)
        elif emit:
            _emit(load, devices, rollout, out or Path(f"{load.bundle.name}-ansible"), as_json)
        else:
            _send(load, devices, rollout, as_json, **flags)


_DEVICE_FLAGS = ("inventory", "only", "identity", "port", "known_hosts", "python", "root", "bin_folder")


def _devices(
    addresses: tuple[str, ...],
    inventory: Path | None,
    only: tuple[str, ...],
    identity: tuple[Path, ...],
    port: int | None,
    known_hosts: Path | None,
    python: str | None,
    root: str | None,
    bin_folder: str | None,
    needed: bool = True,
) -> tuple[list[Device], Rollout]:
    import dataclasses

    from edgeft.deploy import fleet, link

    given: dict[str, Any] = {
        "identity": identity,
        "port": port,
        "known_hosts": known_hosts,
        "python": python,
        "root": root,
        "bin": bin_folder,
    }
    given = {key: value for key, value in given.items() if value}
    devices, rollout = fleet.read_inventory(inventory) if inventory else ([], fleet.Rollout())
    # Of an address with a port of its own, that one counts.
    found = [link.parse(text) for text in addresses] + fleet.only(devices, only)
    if not found and needed:
        raise UsageError("which device?", "edgeft deploy BUNDLE user@host, or --inventory FILE.")
    return [dataclasses.replace(device, **(given | {"port": device.port or port})) for device in found], rollout


def _send(
    load: Any,
    devices: list[Device],
    rollout: Rollout,
    as_json: bool,
    keep: int,
    allow_downgrade: bool,
    no_health_check: bool,
    again: bool,
    retries: int,
) -> None:
    from edgeft.deploy import fleet, host

    options = host.Options(keep, allow_downgrade, not no_health_check, retries, again=again)
    for device in devices:
        _tell_job(host.Outcome(device.label, "waiting"))
    if len(devices) == 1:
        outcomes = [_send_one(devices[0], load, options)]
    else:
        outcomes = asyncio.run(fleet.roll_out(devices, rollout, load, options, _report, _watched))
    for outcome in outcomes:
        if outcome.state == "untouched":
            _tell_job(outcome)
    if as_json:
        print_json([outcome.as_dict() for outcome in outcomes])
    elif len(devices) > 1:
        rows = [(o.device, o.state, o.id, round(o.sent_bytes / 1e6, 1), o.seconds) for o in outcomes]
        print_table(("device", "state", "id", "MB sent", "seconds"), rows)
    else:
        click.echo(outcomes[0].id)
    if bad := [outcome for outcome in outcomes if outcome.state in ("failed", "untouched")]:
        raise CheckFailed(
            f"{len(bad)} of {len(outcomes)} devices do not have it: {', '.join(outcome.device for outcome in bad)}",
            "Run it again when the reason is gone; devices that have it are left alone.",
        )


def _send_one(device: Device, load: Any, options: Any) -> Outcome:
    """Raises: what stopped it, with its own exit code."""
    from edgeft.deploy import host

    try:
        outcome = asyncio.run(host.deploy(device, load, options, ConsoleProgress(device.label)))
    except EdgeftError as error:
        _tell_job(host.failed(device, error))
        raise
    _report(outcome)
    return outcome


def _watched(device: Device) -> ConsoleProgress:
    return ConsoleProgress(device.label, quiet=True)


def _tell_job(outcome: Outcome) -> None:
    """For whoever watches the job: where the device stands."""
    if events := JobEvents.from_environment(outcome.device):
        events.tell(outcome.state, outcome.error or outcome.id or "")


def _report(outcome: Outcome) -> None:
    _tell_job(outcome)
    if outcome.error:
        note(f"{outcome.device}: {outcome.error}" + (f"\n  {outcome.hint}" if outcome.hint else ""))
        return
    note(f"{outcome.device}: {outcome.state}, {outcome.id}; {outcome.sent_bytes / 1e6:.1f} MB sent")
    if outcome.answer:
        note(f"{outcome.device} says: {outcome.answer.strip()}")


def _print_plan(load: Any, devices: list[Device], as_json: bool) -> None:
    bundle = load.bundle
    names = [device.label for device in devices]
    if as_json:
        print_json({"name": bundle.name, "id": bundle.id, "bytes": bundle.total_bytes, "devices": names})
        return
    click.echo(f"would deploy {bundle.name} {bundle.id}, {bundle.total_bytes / 1e6:.1f} MB at most, to:")
    for name in names:
        click.echo(f"  {name}")


def _emit(load: Any, devices: list[Device], rollout: Rollout, out: Path, as_json: bool) -> None:
    from edgeft.deploy import ansible

    files = ansible.write(load, devices, rollout, out)
    if as_json:
        print_json({"path": str(out), "files": files})
    else:
        note(f"ansible-playbook -i {out / 'inventory.ini'} {out / 'deploy.yml'}")
        click.echo(out)


@deploy.command()
@click.argument("addresses", nargs=-1, metavar="[USER@]HOST…")
@click.option("--name", help="Only this application.")
@device_options
@json_option
def status(addresses: tuple[str, ...], name: str | None, as_json: bool, **flags: Any) -> None:
    """What is installed on devices, and what waits half transferred."""
    from edgeft.deploy import host

    devices, _ = _devices(addresses, **flags)
    answers = asyncio.run(_of_each(devices, lambda device: host.status(device, name)))
    if as_json:
        print_json(answers)
    else:
        print_table(("device", "name", "version", "", "installed", "id"), [row for a in answers for row in _rows(a)])
    _raise_first(answers)


async def _of_each(devices: list[Device], question: Callable[[Device], Awaitable[dict[str, Any]]]) -> list[Any]:
    """Of one device the error itself, with its exit code; of several, errors among the answers."""
    from edgeft.deploy import fleet

    return [await question(devices[0])] if len(devices) == 1 else await fleet.ask_all(devices, question)


def _rows(answer: dict[str, Any]) -> list[tuple[object, ...]]:
    rows: list[tuple[object, ...]] = []
    for app in answer.get("apps", []):
        for version in reversed(app["versions"]):
            used = "in use" if version["id"] == app["current"] else ""
            row = (answer["device"], app["name"], version["version"], used, version["installed"], version["id"])
            rows.append(row)
        if app["waiting"]:
            rows.append((answer["device"], app["name"], "", f"{app['waiting'] / 1e6:.1f} MB arrived", "", ""))
    return rows or [(answer["device"], "", "", "unreachable" if "error" in answer else "nothing", "", "")]


@deploy.command()
@click.argument("name")
@click.argument("addresses", nargs=-1, metavar="[USER@]HOST…")
@device_options
@json_option
@dry_run_option
def rollback(name: str, addresses: tuple[str, ...], as_json: bool, dry_run: bool, **flags: Any) -> None:
    """Go back to the version of NAME that was in use before."""
    from edgeft.deploy import host

    devices, _ = _devices(addresses, **flags)
    if dry_run:
        note(f"would roll {name} back on {', '.join(device.label for device in devices)}")
        return
    answers = asyncio.run(_of_each(devices, lambda device: host.rollback(device, name)))
    if as_json:
        print_json(answers)
    else:
        for answer in answers:
            if "error" not in answer:
                click.echo(f"{answer['device']}: {answer['current']}")
    _raise_first(answers)


def _raise_first(answers: list[dict[str, Any]]) -> None:
    """Nothing of several devices is lost: each error is said, and the exit code tells that there was one."""
    bad = [answer for answer in answers if "error" in answer]
    for answer in bad:
        note(f"{answer['error']}" + (f"\n  {answer['hint']}" if answer["hint"] else ""))
    if bad:
        raise CheckFailed(f"{len(bad)} of {len(answers)} devices failed")
