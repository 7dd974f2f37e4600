"""`edgeft devices`: what is known of devices, what this machine measures, and what will run where and how fast."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgeft.cli._output import ConsoleProgress, dry_run_option, json_option, note, print_json, print_table

if TYPE_CHECKING:
    from edgeft.device import DeviceProfile
    from edgeft.forecast.best import Choice
    from edgeft.forecast.facts import ModelFacts
    from edgeft.forecast.fit import Forecast

EPILOG = """
\b
Examples:
  edgeft devices list                              profiles that come with edgeft, and your own
  edgeft devices show rpi5-8g                      every figure with its source
  edgeft devices probe                             measure this machine; then it is the device `local`
  edgeft devices fit model.gguf                    what it needs and how fast it will be, on every device
  edgeft devices fit hf:org/name --device rpi4-2g  the same of a model on the hub, from its header alone
  edgeft devices fit hf:org/name --best            which file to make of it for each device
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
    from edgeft.device import load_profile

    profile = load_profile(name)
    if as_json:
        print_json(profile.as_dict())
    else:
        _show_profile(profile)


def _show_profile(profile: DeviceProfile) -> None:
    from edgeft.device import UNITS, Figure

    values = {key: getattr(profile, key) for key in profile.as_dict() if key not in ("file", "kernels")}
    for key, value in values.items():
        if not isinstance(value, (Figure, bool)) and value:
            click.echo(f"{key:<14}{' '.join(value) if isinstance(value, tuple) else value}")
    click.echo()
    rows = [
        (key, f"{figure.value:,.12g}", UNITS.get(key, ""), figure.basis, figure.source)
        for key, figure in values.items()
        if isinstance(figure, Figure)
    ]
    print_table(("figure", "value", "unit", "basis", "source"), rows)
    if profile.kernels:
        click.echo()
        kernels = [
            (each.type, each.decode.value, each.prefill.value, "yes" if each.repacked else "no", each.decode.source)
            for each in profile.kernels
        ]
        print_table(("weights", "decode GB/s", "prompt GOPS", "repacked", "source"), kernels)


@devices.command()
@click.option("--out", type=click.Path(path_type=Path), help="Profile to write; default: the device `local`.")
@click.option("--runtime", default="auto", show_default=True, help="Runtime whose kernels are measured.")
@dry_run_option
@json_option
def probe(out: Path | None, runtime: str, dry_run: bool, as_json: bool) -> None:
    """Measure this machine in less than 30 s; it is then the device `local`.

    Small models with meaningless weights of every important type run through the runtime itself, at several numbers of
    threads: what they reach is what its kernels give on this processor. Nothing is downloaded, nothing needs torch.
    """
    from edgeft.device import write_profile
    from edgeft.paths import home
    from edgeft.probe.measure import probe as measure

    file = out or home() / "devices" / "local.toml"
    if dry_run:
        note(f"would measure {runtime} and write {file}")
        return
    if (load := os.getloadavg()[0]) > 0.3 and not as_json:
        note(f"other programs are at work (load {load:.1f}): the figures will be too low; run it again without them")
    found = measure(runtime, ConsoleProgress())
    write_profile(found, file)
    note(f"{file} written: --device {found.name if out is None else file}")
    if as_json:
        print_json(found.as_dict())
    else:
        _show_profile(found)


@devices.command()
@click.argument("model", metavar="MODEL")
@click.option("--device", "name", help="One device, or a profile's file; default: a table of all.")
@click.option(
    "--ctx", "context", type=click.IntRange(min=1), help="Tokens of context; default: the model's, at most 4096."
)
@click.option(
    "--kv",
    "kv_type",
    type=click.Choice(["f16", "q8_0", "q4_0"]),
    default="f16",
    show_default=True,
    help="Type of the cache of keys and values.",
)
@click.option("--to", "target", help="Of a checkpoint, the file that export makes of it; default: gguf-q4.")
@click.option("--best", "choose", is_flag=True, help="Of all files that export can make of a checkpoint, the best.")
@click.option(
    "--tps",
    "speed",
    type=click.FloatRange(min=0, min_open=True),
    help="With --best: tokens/s it must decode; default: 5.",
)
@json_option
def fit(
    model: str,
    name: str | None,
    context: int | None,
    kv_type: str,
    target: str | None,
    choose: bool,
    speed: float | None,
    as_json: bool,
) -> None:
    """Forecast memory and speed of MODEL from its header alone; a few megabytes are read, wherever it is.

    MODEL is a GGUF, a Hugging Face directory, a run, hf:org/name[:file.gguf] or an address of one of these.
    A model that does not fit the device ends with exit code 5 and the nearest thing that does.
    --best takes the file with most bits per weight that fits and decodes fast enough.
    """
    from edgeft.device import load_profile, names
    from edgeft.forecast.find import find_facts
    from edgeft.forecast.fit import exported, forecast, refuse

    wanted = [load_profile(name)] if name else [load_profile(each) for each in names()]
    if choose:
        _fit_best(find_facts(model), wanted, context, kv_type, speed, as_json=as_json, one=bool(name))
        return
    facts = exported(find_facts(model), target)
    found = [forecast(facts, device, context, kv_type) for device in wanted]
    if as_json:
        results = [each.as_dict() for each in found]
        print_json(results[0] if name else results)
    elif name:
        _show_one(found[0])
    else:
        print_table(
            _COLUMNS, [_forecast_row(each) for each in found], title=f"{facts.name}: {facts.bytes / 1e6:.0f} MB"
        )
    if name and not found[0].fits:
        raise refuse(found[0], facts, [load_profile(each) for each in names()])


def _fit_best(
    facts: ModelFacts,
    wanted: list[DeviceProfile],
    context: int | None,
    kv_type: str,
    speed: float | None,
    *,
    as_json: bool,
    one: bool,
) -> None:
    """Raises: CheckFailed when one device was asked for and nothing fits it."""
    from edgeft.device import load_profile, names
    from edgeft.forecast.best import FLUENT, best, candidates, choices
    from edgeft.forecast.fit import refuse

    found = [best(choices(facts, device, context, kv_type, speed or FLUENT)) for device in wanted]
    if as_json:
        results = [choice.as_dict() for choice in found]
        print_json(results[0] if one else results)
    else:
        print_table(_BEST, [_best_row(choice) for choice in found], title=facts.name)
    if one and not found[0].forecast.fits:
        others = [load_profile(each) for each in names()]
        raise refuse(found[0].forecast, candidates(facts)[found[0].target], others)


_BEST = (
    "device",
    "file",
    "bits",
    "runtime",
    "threads",
    "context",
    "mmap",
    "repack",
    "needs MB",
    "decode t/s",
    "prompt t/s",
)


def _best_row(choice: Choice) -> tuple[object, ...]:
    found = choice.forecast
    if not found.fits:
        return found.device.name, "none fits", *[""] * (len(_BEST) - 2)
    settings, repacked = found.settings, bool(found.memory.repacked)
    return (
        found.device.name,
        choice.target + ("" if choice.fluent else ", slow"),
        f"{choice.bits_per_weight:.1f}",
        found.runtime,
        f"{found.device.decode_threads.value:.0f}",
        str(settings.context),
        "on" if settings.mmap else "off",
        "on" if repacked else "off",
        f"{found.memory.total / 1e6:.0f}",
        str(found.decode),
        str(found.prefill),
    )


_COLUMNS = ("device", "fits", "needs MB", "of MB", "context", "largest", "decode t/s", "prompt t/s", "load s")


def _forecast_row(found: Forecast) -> tuple[object, ...]:
    return (
        found.device.name,
        "yes" if found.fits else "no",
        round(found.memory.total / 1e6),
        round(found.device.usable / 1e6),
        found.settings.context,
        found.largest_context,
        str(found.decode),
        str(found.prefill),
        "" if found.load_seconds is None else f"{found.load_seconds:.1f}",
    )


def _show_one(found: Forecast) -> None:
    parts = [(key, f"{value / 1e6:,.1f}") for key, value in found.as_dict()["memory"].items()]
    click.echo(f"{found.model} on {found.device.title}\n")
    print_table(("memory", "MB"), parts)
    click.echo()
    settings, device = found.settings, found.device
    lines = {
        "context": f"{settings.context} tokens, keys and values in {settings.kv_type}; at most {found.largest_context}",
        "decode": f"{found.decode} tokens/s, {found.decode_full} when the context is full",
        "prompt": f"{found.prefill} tokens/s",
        "load": "" if found.load_seconds is None else f"{found.load_seconds:.1f} s, the first time",
        "runtime": found.runtime,
        "threads": f"{device.decode_threads.value:.0f} to decode, {device.cores.value:.0f} for the prompt",
        "mmap": "on" if settings.mmap else "off",
        "repacking": "off" if not settings.repack else "on" if found.memory.repacked else "",
    }
    for key, value in lines.items():
        if value:
            click.echo(f"{key:<10} {value}")
    for text in found.notes:
        note(f"note: {text}")
