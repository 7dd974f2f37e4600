"""`edgeft devices`: what is known of devices, what this machine measures, and what will run where and how fast."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from edgeft.cli._output import json_option, print_json, print_table

if TYPE_CHECKING:
    from edgeft.device import DeviceProfile

EPILOG = """
\b
Examples:
  edgeft devices list                              profiles that come with edgeft, and your own
  edgeft devices show rpi5-8g                      every figure with its source
  edgeft devices probe                             measure this machine; then it is the device `local`
"""


@click.group(epilog=EPILOG)
def devices() -> None:
    """Profiles of devices, and what a model will need and do on them."""


@devices.command(name="list")
@json_option
def list_(as_json: bool) -> None:
    """Every device there is a profile of."""
    from edgeft.device import load_profile, names

    profiles = [load_profile(name) for name in names()]
    if as_json:
        print_json([profile.as_dict() for profile in profiles])
        return
    rows = [_row(profile) for profile in profiles]
    print_table(("device", "what it is", "RAM GB", "usable GB", "GB/s", "GOPS"), rows)


def _row(profile: DeviceProfile) -> tuple[object, ...]:
    prefill = profile.prefill_repacked or profile.prefill
    memory, usable = profile.memory.value / 1e9, profile.usable / 1e9
    return profile.name, profile.title, round(memory, 1), round(usable, 1), profile.bandwidth.value, prefill.value


@devices.command()
@click.argument("name", metavar="DEVICE")
@json_option
def show(name: str, as_json: bool) -> None:
    """One device: every figure, how it was found and where it is from."""
    from edgeft.device import Figure, load_profile

    profile = load_profile(name)
    if as_json:
        print_json(profile.as_dict())
        return
    values = {key: getattr(profile, key) for key in profile.as_dict() if key != "file"}
    for key, value in values.items():
        if not isinstance(value, Figure) and value:
            click.echo(f"{key:<14}{' '.join(value) if isinstance(value, tuple) else value}")
    click.echo()
    rows = [
        (key, f"{figure.value:,.12g}", _UNITS.get(key, ""), figure.basis, figure.source)
        for key, figure in values.items()
        if isinstance(figure, Figure)
    ]
    print_table(("figure", "value", "unit", "basis", "source"), rows)


_UNITS = {
    "memory": "bytes",
    "reserve": "bytes",
    "bandwidth": "GB/s",
    "prefill": "GOPS",
    "prefill_repacked": "GOPS",
    "storage": "MB/s",
}
