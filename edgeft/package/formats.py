"""The forms a bundle can take: a folder, an archive, a Debian package, an OCI image, and what other programs read."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path

from edgeft import paths
from edgeft.bundle import Bundle
from edgeft.errors import UsageError, WriteError
from edgeft.progress import Progress

from . import archives, service, wheels
from .build import Request, build, plan

_SUFFIXES = {"tar.zst": ".tar.zst", "deb": ".deb", "oci": ".oci.tar"}
_DEBIAN = {"aarch64": "arm64", "x86_64": "amd64", "armv7l": "armhf", "riscv64": "riscv64"}
"""`uname -m` -> Debian's name, which OCI shares but for armhf."""


def write(request: Request, place: Path, format_: str, progress: Progress) -> tuple[Bundle, Path]:
    """Make a bundle in one of the formats; returns where it is.

    Raises:
        UsageError: the place is taken, or the format cannot hold this model. Else as `build`.
    """
    if format_ == "dir":
        return build(request, place, progress), place
    if format_ in ("ollama", "assets"):
        return _for_others(request, place, format_, progress)
    if format_ in ("deb", "oci") and request.target.architecture not in _DEBIAN:
        raise UsageError(f"no {format_} is made for {request.target.architecture}")
    suffix = _SUFFIXES[format_]
    out = place if place.name.endswith(suffix) else place.with_name(place.name + suffix)
    if out.exists():
        raise UsageError(f"{out} exists", "Remove it, or choose another --out.")
    try:
        with wheels.temporary_folder(out) as temporary:
            folder = Path(temporary) / request.name
            bundle = build(request, folder, progress)
            progress.start(f"Writing {out.name}", None)
            {"tar.zst": archives.write_tar_zst, "deb": write_deb, "oci": write_oci}[format_](folder, out)
    except OSError as error:
        raise WriteError.from_os_error(error, out) from error
    finally:
        progress.finish()
    return bundle, out


@contextlib.contextmanager
def opened(bundle: Path, root: Path) -> Iterator[Path]:
    """A bundle's folder; of an archive, a temporary one beside where it will be installed."""
    if bundle.is_dir():
        yield bundle
        return
    try:
        with wheels.temporary_folder(root / bundle.name) as temporary:
            archives.unpack(bundle, Path(temporary))
            yield Path(temporary)
    except OSError as error:
        raise WriteError.from_os_error(error, root) from error


# --- Debian -----------------------------------------------------------------


def write_deb(folder: Path, out: Path) -> None:
    """A binary package (deb(5)): the bundle below /usr/lib/edgeft, its wheels unpacked, a command in /usr/bin."""
    from edgeft.bundle import read_bundle

    bundle = read_bundle(folder)
    home = f"usr/lib/edgeft/{bundle.name}"
    site = folder.parent / "site"
    wheels.unpack(sorted((folder / "wheels").glob("*.whl")), site)
    data = folder.parent / "data.tar.xz"
    with tarfile.open(data, "w:xz", preset=1, format=tarfile.GNU_FORMAT) as archive:
        for parent in ("usr", "usr/bin", "usr/lib", "usr/lib/edgeft", home, f"{home}/bundle", f"{home}/site"):
            archives.add_folder(archive, f"./{parent}")
        archives.add_text(archive, f"./usr/bin/{bundle.name}", _DEB_LAUNCHER.format(home=f"/{home}"), 0o755)
        for parent in ("usr/lib/systemd", "usr/lib/systemd/system"):
            archives.add_folder(archive, f"./{parent}")
        archives.add_text(archive, f"./usr/lib/systemd/system/{bundle.name}.service", service.for_system(bundle.name))
        archives.add(archive, folder, f"./{home}/bundle/")
        if site.is_dir():
            archives.add(archive, site, f"./{home}/site/")
    control = io.BytesIO()
    with tarfile.open(fileobj=control, mode="w:gz", format=tarfile.GNU_FORMAT) as archive:
        archives.add_text(archive, "./control", _control(bundle, _installed_kb(folder, site)))
    with paths.atomic_write(out) as stream, data.open("rb") as read:
        stream.write(b"!<arch>\n")
        for name, content in (("debian-binary", b"2.0\n"), ("control.tar.gz", control.getvalue())):
            stream.write(_ar_header(name, len(content)) + content + b"\n" * (len(content) % 2))
        stream.write(_ar_header(data.name, data.stat().st_size))
        shutil.copyfileobj(read, stream, 1 << 20)
        stream.write(b"\n" * (data.stat().st_size % 2))


def _ar_header(name: str, size: int) -> bytes:
    return f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{size:<10}`\n".encode()


def _installed_kb(*folders: Path) -> int:
    return sum(file.stat().st_size for folder in folders for file in folder.rglob("*") if file.is_file()) // 1024


def _control(bundle: Bundle, kilobytes: int) -> str:
    major, minor = (int(part) for part in bundle.target.python.split("."))
    return (
        f"Package: {bundle.name.replace('_', '-')}\nVersion: {bundle.version}\nSection: misc\nPriority: optional\n"
        f"Architecture: {_DEBIAN[bundle.target.architecture]}\nInstalled-Size: {kilobytes}\n"
        f"Depends: python3 (>= {major}.{minor}), python3 (<< {major}.{minor + 1}), libc6 (>= {bundle.target.glibc}), "
        "libgomp1\nMaintainer: edgeft <edgeft@localhost>\n"
        f"Description: the language model {bundle.name}, answering offline\n"
        " A fine-tuned model with its runtime; needs no network.\n"
    )


_DEB_LAUNCHER = """\
#!/bin/sh
export PYTHONPATH={home}/site
if [ $# -eq 0 ]; then
    exec python3 -s -m edgeft chat {home}/bundle
elif [ "$1" = --serve ]; then
    shift
    exec python3 -s -m edgeft serve {home}/bundle "$@"
fi
exec python3 -s -m edgeft run {home}/bundle "$*"
"""


# --- OCI --------------------------------------------------------------------


def write_oci(folder: Path, out: Path) -> None:
    """An image archive (OCI image layout 1.0) with the bundle in one layer, under /bundle.

    It holds no operating system: mount it as an image volume, or build on it with `COPY --from`.
    """
    from edgeft.bundle import read_bundle

    bundle = read_bundle(folder)
    layer = folder.parent / "layer.tar"
    with tarfile.open(layer, "w", format=tarfile.PAX_FORMAT) as archive:
        archives.add_folder(archive, "bundle")
        archives.add(archive, folder, "bundle/")
    digest = paths.sha256_file(layer)
    config = _json(
        {
            "architecture": _DEBIAN[bundle.target.architecture],
            "os": "linux",
            "created": bundle.created.replace("+00:00", "Z"),
            "config": {"Labels": _labels(bundle), "WorkingDir": "/bundle"},
            "rootfs": {"type": "layers", "diff_ids": [f"sha256:{digest}"]},
        }
    )
    layer_of = {"mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": f"sha256:{digest}"}
    image = _json(
        {
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": _reference("application/vnd.oci.image.config.v1+json", config),
            "layers": [{**layer_of, "size": layer.stat().st_size}],
            "annotations": _labels(bundle),
        }
    )
    reference = _reference("application/vnd.oci.image.manifest.v1+json", image)
    tag = {"annotations": {"org.opencontainers.image.ref.name": bundle.version}}
    index = _json({"schemaVersion": 2, "manifests": [{**reference, **tag}]})
    with paths.atomic_write(out) as stream, tarfile.open(fileobj=stream, mode="w") as archive:
        archives.add_text(archive, "oci-layout", '{"imageLayoutVersion": "1.0.0"}')
        archives.add_text(archive, "index.json", index)
        for text in (config, image):
            archives.add_text(archive, f"blobs/sha256/{hashlib.sha256(text.encode()).hexdigest()}", text)
        with layer.open("rb") as read:
            info = tarfile.TarInfo(f"blobs/sha256/{digest}")
            info.size = layer.stat().st_size
            archive.addfile(info, read)


def _labels(bundle: Bundle) -> dict[str, str]:
    labels = {"title": bundle.name, "version": bundle.version, "licenses": bundle.licence or ""}
    return {f"org.opencontainers.image.{key}": value for key, value in labels.items() if value}


def _json(value: object) -> str:
    return json.dumps(value, sort_keys=True)


def _reference(kind: str, text: str) -> dict[str, object]:
    digest = hashlib.sha256(text.encode()).hexdigest()
    return {"mediaType": kind, "digest": f"sha256:{digest}", "size": len(text.encode())}


# --- Other programs ---------------------------------------------------------


def _for_others(request: Request, place: Path, format_: str, progress: Progress) -> tuple[Bundle, Path]:
    """The files alone, for a program that brings its own runtime."""
    import dataclasses

    nowhere = dataclasses.replace(request, with_wheels=False, target=dataclasses.replace(request.target, python="any"))
    content = plan(nowhere)
    is_gguf = content.artifact.path.suffix == ".gguf"
    if format_ == "ollama" and not is_gguf:
        raise UsageError(f"Ollama runs GGUF files, not {content.artifact.path.name}", "edgeft export … --to gguf-q4")
    bundle = build(nowhere, place, progress)
    (place / "install.sh").unlink()
    if format_ == "ollama":
        paths.write_text(place / "Modelfile", modelfile(bundle, _system(content.artifact.manifest)))
    else:
        paths.write_text(place / "README.md", _assets_text(bundle, is_gguf))
    return bundle, place


def _system(manifest: object) -> str | None:
    return getattr(manifest, "system", None)


def modelfile(bundle: Bundle, system: str | None) -> str:
    """For `ollama create`: Ollama takes the chat template and the end tokens from the GGUF."""
    lines = [f"FROM ./{bundle.model}", *(f"ADAPTER ./{path}" for path in bundle.adapters.values())]
    if system:
        lines.append(f'SYSTEM """{system}"""')
    lines.append("PARAMETER temperature 0")
    return "\n".join(lines) + "\n"


def _assets_text(bundle: Bundle, is_gguf: bool) -> str:
    programs = "llama.cpp's Android and iOS examples" if is_gguf else "an app with the engine of this format"
    suffix = Path(bundle.model).suffix.removeprefix(".") or "pte"  # a folder holds a program
    return _ASSETS.format(
        name=bundle.name, version=bundle.version, model=bundle.model, programs=programs, suffix=suffix
    )


_ASSETS = """\
# {name} {version}

Copy `{model}` into the app's files; {programs} opens it from there.

* Android: `adb push` it to the app's folder for testing; in a release, download it at the first start or ship it as an
  asset pack. A compressed file inside the APK cannot be mapped into memory; in Gradle:
  `androidResources {{ noCompress += "{suffix}" }}`.
* iOS: add it to the target as a folder reference, and open it by its path in the app's bundle.

`bundle.json` has the SHA-256 of every file; compare after a download.
"""
