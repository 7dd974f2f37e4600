"""`edgeft toolchain build`: a runtime compiled for the processor of a board."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import click

from edgeft.cli._output import ConsoleProgress, dry_run_option, json_option, note, print_json
from edgeft.errors import UsageError

EPILOG = """\b
Examples:
  edgeft toolchain build llama-cpp --device rpi5      with dot-product instructions; package then takes it
  edgeft toolchain build llama-cpp --device rpi4-2g
"""


@click.command(epilog=EPILOG)
@click.argument("runtime", type=click.Choice(("llama-cpp",)))
@click.option("--device", help="Device profile whose processor it is for: edgeft devices list.")
@click.option("--march", help="Instead: what GCC's -march shall be, such as armv8.2-a+dotprod.")
@click.option(
    "--sdist",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Source archive; default: fetched with pip.",
)
@click.option("--jobs", "-j", type=click.IntRange(min=1), help="Compiler processes at a time; default: one per core.")
@click.option("--again", is_flag=True, help="Build although there is a wheel from before.")
@json_option
@dry_run_option
def build(
    runtime: str,
    device: str | None,
    march: str | None,
    sdist: Path | None,
    jobs: int | None,
    again: bool,
    as_json: bool,
    dry_run: bool,
) -> None:
    """Cross-compile RUNTIME for a board into a wheel that `edgeft package` takes from then on.

    Needs Debian's g++-aarch64-linux-gnu and cmake. The machine code is scanned for the instructions it was made for.
    """
    from edgeft.package import cross_build
    from edgeft.package.target import profile_of

    if (device is None) == (march is None):
        raise UsageError("give --device, or --march")
    march = march or cross_build.march_of(profile_of(device or ""))
    found = None if again else cross_build.cached(march)
    if dry_run:
        missing = cross_build.missing_tools()
        click.echo(f"would build {runtime} {cross_build.VERSION} for {march} in {cross_build.folder(march)}")
        note(f"missing: {', '.join(missing)}" if missing else "the compiler is there")
        return
    built = found or cross_build.build(march, sdist=sdist, jobs=jobs, progress=ConsoleProgress())
    if as_json:
        print_json({**dataclasses.asdict(built), "wheel": str(built.wheel), "cached": found is not None})
        return
    inside = ", ".join(f"{count:,} {name}" for name, count in built.kernels.items() if count)
    note(f"{'built before' if found else 'built'} for {march}: {inside or 'no integer dot products'}")
    click.echo(built.wheel)
