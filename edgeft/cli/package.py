"""`edgeft package`: a model and everything it needs on a device, in one folder or file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgeft.cli._output import ConsoleProgress, dry_run_option, json_option, made, note, print_json
from edgeft.errors import UsageError

if TYPE_CHECKING:
    from edgeft.package.build import Request

EPILOG = """\b
Examples:
  edgeft package demo-q4.gguf                                demo-q4-local/, for a machine like this one
  edgeft package demo-q4.gguf --device rpi5-8g --format tar.zst
  edgeft package demo-q4.gguf --device rpi4-2g --python 3.11 --glibc 2.36    an older system on it
  edgeft package --new-key release.pem                       release.pem and release.pem.pub
  edgeft package demo-q4.gguf --sign release.pem --version 1.2
"""
_FILE = click.Path(exists=True, path_type=Path)


@click.command(epilog=EPILOG)
@click.argument("model", required=False)
@click.option("--device", default="local", show_default=True, help="Device profile: edgeft devices list.")
@click.option("--architecture", help="Processor, as uname -m says; default: the profile's.")
@click.option("--python", help="Python on it, such as 3.11; default: the profile's.")
@click.option("--glibc", help="C library, as ldd --version says; default: the profile's.")
@click.option("--adapter", "adapters", multiple=True, type=_FILE, help="Adapter file to take along; repeatable.")
@click.option("--name", help="Name of the bundle and of its command; default: the model's.")
@click.option("--version", help="Numbers with dots; default: the present moment.")
@click.option("--question", default="Say hello.", show_default=True, help="Asked after installing, as a health check.")
@click.option("--expect", "expected", help="How the answer to it begins.")
@click.option("--wheel", "wheels", multiple=True, type=_FILE, help="A wheel of your own in place of the index's.")
@click.option("--no-wheels", is_flag=True, help="Leave runtime and edgeft out; the device has them.")
@click.option("--sign", "key", type=_FILE, help="Private ed25519 key (PEM) to sign with.")
@click.option("--new-key", type=click.Path(path_type=Path), help="Make a key pair and stop.")
@click.option(
    "--format", "format_", type=click.Choice(("dir", "tar.zst", "deb", "oci", "ollama", "assets")), default="dir"
)
@click.option("--out", type=click.Path(path_type=Path), help="Where to write; default: NAME-DEVICE.")
@json_option
@dry_run_option
def package(
    model: str | None, new_key: Path | None, as_json: bool, dry_run: bool, format_: str, out: Path | None, **flags: Any
) -> None:
    """Pack MODEL into a bundle that installs and runs without a network.

    A bundle holds the model, adapters, wheels for the device's Python and processor, an installer that needs no root,
    the licence, a software bill of materials, and the SHA-256 of every file.
    """
    if new_key is not None:
        from edgeft.package.signing import make_keys

        public = make_keys(new_key)
        print_json({"private": str(new_key), "public": str(public)}) if as_json else click.echo(f"{new_key}\n{public}")
        return
    if model is None:
        raise UsageError("what is to be packed?", "edgeft package MODEL --device NAME")
    from edgeft.package import build

    flags["no_wheels"] = flags["no_wheels"] or format_ in ("assets", "ollama")  # these bring their own runtime
    request = _request(model, **flags)
    place = out or Path(f"{request.name}-{request.target.device}")
    content = build.plan(request)
    for warning in content.warnings:
        note(f"note: {warning}")
    if dry_run:
        _print_plan(request, content.requirements, content.model_bytes, place, as_json)
        return
    from edgeft.package.formats import write

    bundle, written = write(request, place, format_, ConsoleProgress())
    made(written)
    if as_json:
        print_json({"path": str(written), **build.summary(bundle)})
    else:
        click.echo(f"{written}  {bundle.total_bytes / 1e6:.1f} MB, {len(bundle.files)} files, {bundle.id}")


def _request(
    model: str,
    device: str,
    architecture: str | None,
    python: str | None,
    glibc: str | None,
    adapters: tuple[Path, ...],
    name: str | None,
    version: str | None,
    question: str,
    expected: str | None,
    wheels: tuple[Path, ...],
    no_wheels: bool,
    key: Path | None,
) -> Request:
    from edgeft.package.build import Request, default_version
    from edgeft.package.target import target_of
    from edgeft.sessions import find_artifact

    path = find_artifact(model, progress=ConsoleProgress()).path
    return Request(
        model=path,
        target=target_of(device, architecture, python, glibc),
        name=name or path.name.removesuffix(".gguf").removesuffix(".litertlm").lower(),
        version=version or default_version(),
        adapters=adapters,
        question=question,
        expected=expected,
        wheels=wheels,
        with_wheels=not no_wheels,
        key=key,
    )


def _print_plan(request: Request, requirements: Any, model_bytes: int, place: Path, as_json: bool) -> None:
    target = request.target
    if as_json:
        print_json(
            {
                "path": str(place),
                "name": request.name,
                "version": request.version,
                "architecture": target.architecture,
                "python": target.python,
                "model_bytes": model_bytes,
                "requirements": list(requirements),
            }
        )
        return
    click.echo(f"would write {place}: {request.name} {request.version}, {model_bytes / 1e6:.1f} MB of model")
    click.echo(f"for {target.device}: {target.architecture}, Python {target.python}, glibc {target.glibc} or newer")
    click.echo("wheels: " + (", ".join(requirements) or "none"))
