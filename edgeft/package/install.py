"""Installing a bundle on the device: verified, versions side by side, an atomic switch, and a way back.

    <root>/<name>/blobs/<sha256>        files, each once, whatever version uses them
    <root>/<name>/site/<digest>/        unpacked wheels
    <root>/<name>/versions/<id>/        hard links to blobs; .site is a link to the wheels
    <root>/<name>/current               symbolic link to the version in use
    <root>/<name>/state.json            which versions there are, in the order they were installed

Whatever happens before the link is replaced leaves the version in use as it was.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import fcntl
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeft import paths
from edgeft.bundle import (
    MANIFEST,
    NAME,
    SIGNATURE,
    Bundle,
    Entry,
    check_files,
    read_bundle,
    version_key,
)
from edgeft.errors import CheckFailed, EdgeftError, ModelError, UsageError, WriteError
from edgeft.progress import Progress, Silent

from . import signing, wheels

WHEELS = "wheels"
_HEALTH_S = 300


@dataclass(frozen=True)
class Installed:
    """One version on this device."""

    id: str
    version: str
    created: str
    """When the bundle was made."""
    installed: str
    site: str
    """Digest that names the unpacked wheels; empty without wheels."""


@dataclass(frozen=True)
class State:
    """What is installed under one name."""

    name: str
    current: str | None
    """Id of the version in use."""
    versions: tuple[Installed, ...]
    """Oldest first."""


@dataclass(frozen=True)
class Result:
    """What an installation did."""

    name: str
    id: str
    previous: str | None
    copied_bytes: int
    """Of files that were not there yet."""
    launcher: Path
    answer: str | None
    """What the model said to the bundle's question."""


@dataclass(frozen=True)
class Options:
    """How to install."""

    root: Path
    bin: Path
    """Where the launcher goes."""
    keep: int = 2
    """Versions that stay, the new one included."""
    key: Path | None = None
    """Public key that must have signed the bundle."""
    allow_downgrade: bool = False
    check_health: bool = True


def apps_root() -> Path:
    return paths.home() / "apps"


def names(root: Path) -> list[str]:
    """What is installed."""
    return sorted(file.parent.name for file in root.glob("*/state.json"))


def state(root: Path, name: str) -> State:
    """Raises: UsageError when nothing is installed under the name, ModelError when its state is damaged."""
    home = _home(root, name)
    if not (home / "state.json").is_file():
        there = ", ".join(names(root)) or "nothing"
        raise UsageError(f"no {name!r} is installed in {root}", f"There is: {there}.")
    return _read_state(home)


def install(folder: Path, options: Options, progress: Progress | None = None) -> Result:
    """Install the bundle in `folder` and switch to it once it has answered.

    Raises:
        ModelError: the bundle is damaged, tampered with or not made for this device.
        CheckFailed: wrong signature, older than what is installed, or the model gives no (or another) answer.
        WriteError: no space, or no permission. In every case the version in use stays.
    """
    bundle = check(folder, options)
    home = _home(options.root, bundle.name)
    with _writing(home), _locked(home):
        before = _read_state(home)
        check_order(bundle, before, options.allow_downgrade)
        _check_launcher(home, options.bin)
        _check_space(folder, bundle, home)
        identifier = _unused(bundle, before)
        copied = _stage(folder, bundle, home, identifier, progress or Silent())
        site = _unpack(home, home / "versions" / identifier)
        answer = None
        try:
            if options.check_health:
                answer = check_health(home / "versions" / identifier, bundle)
        except BaseException:
            if identifier not in {version.id for version in before.versions}:
                shutil.rmtree(home / "versions" / identifier, ignore_errors=True)
                _sweep(home, before)
            raise
        after = _switch(home, before, bundle, identifier, site, options.keep)
        _sweep(home, after)
        launcher = _write_launcher(home, options.bin)
    return Result(bundle.name, identifier, before.current, copied, launcher, answer)


def check(folder: Path, options: Options) -> Bundle:
    """Everything that can be known before a byte is written. Raises: as `install`."""
    if options.key is not None:
        signing.verify(folder, options.key)
    bundle = read_bundle(folder)
    check_target(bundle, platform.machine(), f"{sys.version_info.major}.{sys.version_info.minor}")
    check_order(bundle, _read_state(_home(options.root, bundle.name)), options.allow_downgrade)
    check_files(folder, bundle)
    return bundle


def rollback(root: Path, name: str) -> State:
    """Go back to the version installed before the one in use. Raises: UsageError when there is none."""
    home = _home(root, name)
    state(root, name)
    with _writing(home), _locked(home):
        now = _read_state(home)
        ids = [version.id for version in now.versions]
        at = ids.index(now.current) if now.current in ids else 0
        if at == 0:
            raise UsageError(f"{name} has no version before {now.current}")
        _point(home, ids[at - 1])
        return dataclasses.replace(now, current=ids[at - 1])


def uninstall(root: Path, name: str, bin_folder: Path) -> None:
    """Remove every version and the launcher. Raises: UsageError."""
    home = _home(root, name)
    state(root, name)
    launcher = bin_folder / name
    if launcher.is_file() and str(home) in launcher.read_text(encoding="utf-8", errors="replace"):
        launcher.unlink()
    with _writing(home), _locked(home):
        (home / "current").unlink(missing_ok=True)
        (home / "state.json").unlink(missing_ok=True)
    shutil.rmtree(home)


# --- Checks -----------------------------------------------------------------


def _home(root: Path, name: str) -> Path:
    if not NAME.fullmatch(name):
        raise UsageError(f"{name!r} is not a name", "Small letters, digits, dots and dashes.")
    return root.absolute() / name


def _unused(bundle: Bundle, now: State) -> str:
    """The folder for a bundle's files: never the one in use, which stays whole until another has taken its place."""
    return f"{bundle.id}-again" if now.current == bundle.id else bundle.id


def check_target(bundle: Bundle, here: str, python: str, where: str = "this machine") -> None:
    """Raises: ModelError when a bundle was made for another processor or Python than `here` and `python`."""
    if bundle.target.architecture not in (here, "any"):
        raise ModelError(
            f"{bundle.name} was made for {bundle.target.architecture}; {where} is {here}",
            f"Make one for it: edgeft package … --architecture {here}.",
        )
    if bundle.target.python not in (python, "any"):
        raise ModelError(
            f"{bundle.name} was made for Python {bundle.target.python}; {where} has {python}",
            f"Run it with python{bundle.target.python}, or make a bundle with --python {python}.",
        )


def check_order(bundle: Bundle, now: State, allowed: bool) -> None:
    """Newer by version and by date. A higher version on an older date is an old bundle that pretends to be newer."""
    current = next((version for version in now.versions if version.id == now.current), None)
    if current is None or allowed or current.id.startswith(bundle.id):
        return
    hint = "If you want it anyway: --allow-downgrade."
    if version_key(bundle.version) < version_key(current.version):
        raise CheckFailed(f"{bundle.name} {bundle.version} is older than {current.version}, which is installed", hint)
    if bundle.created < current.created:
        raise CheckFailed(
            f"{bundle.name} {bundle.version} was made on {bundle.created}, before {current.version}, which is "
            f"installed ({current.created})",
            hint,
        )


def _check_space(folder: Path, bundle: Bundle, home: Path) -> None:
    blobs = home / "blobs"
    needed = sum(entry.bytes for entry in bundle.files if not (blobs / entry.sha256).exists())
    needed += sum(unpacked_size(folder / entry.path) for entry in bundle.files if entry.path.endswith(".whl"))
    free = shutil.disk_usage(home).free
    if needed > free:
        raise WriteError(
            f"{home} needs {needed / 1e6:.0f} MB; {free / 1e6:.0f} MB are free", "Free some space, or choose --root."
        )


def unpacked_size(wheel: Path) -> int:
    import zipfile

    try:
        with zipfile.ZipFile(wheel) as archive:
            return sum(member.file_size for member in archive.infolist())
    except zipfile.BadZipFile as error:
        raise ModelError(f"{wheel.name} is damaged: {error}", "Copy the bundle again.") from error


def check_health(version: Path, bundle: Bundle) -> str:
    """Ask the staged version its question, in a process of its own.

    Raises:
        CheckFailed: it does not answer within five minutes, says nothing, or not what is expected.
    """
    command = [sys.executable, "-s", "-m", "edgeft", "run", str(version), bundle.question, "--json"]
    command += ["--max-tokens", "32", "--temperature", "0"]
    try:
        done = subprocess.run(
            command, env=_environment(version), stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=_HEALTH_S, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise CheckFailed(f"{bundle.name} {bundle.version} gave no answer in {_HEALTH_S} s", _STAYS) from error
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise CheckFailed(f"{bundle.name} {bundle.version} does not run here: {said}", _STAYS)
    answer = str(json.loads(done.stdout.splitlines()[-1])["text"])
    if not answer.strip() or (bundle.expected is not None and not answer.startswith(bundle.expected)):
        wanted = "something" if bundle.expected is None else repr(bundle.expected)
        raise CheckFailed(f"asked {bundle.question!r}, {bundle.name} said {answer!r}, not {wanted}", _STAYS)
    return answer


_STAYS = "The version in use was left as it is."


def _environment(version: Path) -> dict[str, str]:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONHOME"}
    if (version / ".site").is_dir():
        environment["PYTHONPATH"] = str(version / ".site")
    return environment


# --- Writing ----------------------------------------------------------------


@contextlib.contextmanager
def _writing(home: Path) -> Iterator[None]:
    try:
        home.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise WriteError.from_os_error(error, home) from error


@contextlib.contextmanager
def _locked(home: Path) -> Iterator[None]:
    """One installation at a time under a name; the lock goes with the process."""
    with (home / ".lock").open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise EdgeftError(f"another installation of {home.name} is running", "Wait until it has ended.") from None
        yield


def _stage(folder: Path, bundle: Bundle, home: Path, identifier: str, progress: Progress) -> int:
    """Blobs and hard links of a version; returns the bytes that were not there yet."""
    blobs, copied = home / "blobs", 0
    blobs.mkdir(exist_ok=True)
    progress.start("Copying", bundle.total_bytes, "bytes")
    try:
        with wheels.temporary_folder(home / "versions" / identifier) as temporary:
            staged = Path(temporary) / "version"
            for entry in bundle.files:
                blob = blobs / entry.sha256
                if not _intact(blob, entry):
                    _copy(folder / entry.path, blob, entry)
                    copied += entry.bytes
                place = staged / entry.path
                place.parent.mkdir(parents=True, exist_ok=True)
                _link(blob, place)
                progress.advance(entry.bytes, entry.path)
            for name in (MANIFEST, SIGNATURE):
                if (folder / name).is_file():
                    shutil.copyfile(folder / name, staged / name)
            final = home / "versions" / identifier
            if final.exists():  # an earlier one, not in use, or left by a kill before the switch
                shutil.rmtree(final)
            staged.replace(final)
            paths.sync_directory(final.parent)
    finally:
        progress.finish()
    return copied


def _intact(blob: Path, entry: Entry) -> bool:
    """A blob from an earlier installation may have rotted on its card."""
    return blob.is_file() and blob.stat().st_size == entry.bytes and paths.sha256_file(blob) == entry.sha256


def _copy(source: Path, blob: Path, entry: Entry) -> None:
    """Copy, and compare what arrived with the manifest: the source may have changed since it was checked."""
    import hashlib

    digest = hashlib.sha256()
    with paths.atomic_write(blob) as stream, source.open("rb") as read:
        while block := read.read(1 << 20):
            digest.update(block)
            stream.write(block)
        if digest.hexdigest() != entry.sha256:
            raise ModelError(f"{entry.path} changed while it was copied", "Copy the bundle again.")
    blob.chmod(0o555 if entry.executable else 0o444)


def _link(blob: Path, place: Path) -> None:
    try:
        place.hardlink_to(blob)
    except OSError:  # FAT and some network disks have no links
        shutil.copy2(blob, place)


def _unpack(home: Path, version: Path) -> str:
    """The bundle's wheels, unpacked once for all versions that share them."""
    found, digest = wheels.wheel_set(version / WHEELS)
    if not found:
        return ""
    site = home / "site" / digest[:16]
    if not site.is_dir():
        with wheels.temporary_folder(site) as temporary:
            wheels.unpack(found, Path(temporary) / "site")
            (Path(temporary) / "site").replace(site)
            paths.sync_directory(site.parent)
    (version / ".site").symlink_to(Path("..", "..", "site", site.name))
    return site.name


def _switch(home: Path, before: State, bundle: Bundle, identifier: str, site: str, keep: int) -> State:
    """Make the new version the current one. Three atomic steps, and after each of them the folder is in order."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    added = Installed(identifier, bundle.version, bundle.created, now, site)
    _write_state(home, [*(version for version in before.versions if version.id != identifier), added])
    _point(home, identifier)
    versions = [*(version for version in before.versions if not version.id.startswith(bundle.id)), added]
    kept = versions[-max(1, keep) :]
    _write_state(home, kept)
    return State(bundle.name, identifier, tuple(kept))


def _point(home: Path, identifier: str) -> None:
    """Replace the link in one step."""
    temporary = home / ".current.tmp"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(Path("versions") / identifier)
    temporary.replace(home / "current")
    paths.sync_directory(home)


def _sweep(home: Path, now: State) -> None:
    """Remove versions, wheels and blobs that nothing uses any more."""
    ids = {version.id for version in now.versions} | {now.current}
    for version in (home / "versions").glob("*"):
        if version.name not in ids:
            shutil.rmtree(version, ignore_errors=True)
    for version in (home / "versions").glob(".*.tmp"):
        shutil.rmtree(version, ignore_errors=True)
    sites = {version.site for version in now.versions}
    for site in (home / "site").glob("*"):
        if site.name not in sites:
            shutil.rmtree(site, ignore_errors=True)
    used = {
        entry.sha256
        for identifier in ids
        if identifier and (home / "versions" / identifier / MANIFEST).is_file()
        for entry in read_bundle(home / "versions" / identifier).files
    }
    for blob in (home / "blobs").glob("*"):
        if blob.name not in used:
            blob.unlink(missing_ok=True)


def _read_state(home: Path) -> State:
    """The link says which version is in use; the file says which there are."""
    file, link = home / "state.json", home / "current"
    current = Path(os.readlink(link)).name if link.is_symlink() else None
    if not file.is_file():
        return State(home.name, current, ())
    try:
        raw: Any = json.loads(file.read_text(encoding="utf-8"))
        versions = tuple(Installed(**version) for version in raw["versions"])
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{file} is damaged: {error}", f"Remove {home} and install again.") from error
    return State(home.name, current, versions)


def _write_state(home: Path, versions: Sequence[Installed]) -> None:
    paths.write_json(home / "state.json", {"versions": [dataclasses.asdict(version) for version in versions]})


def _check_launcher(home: Path, folder: Path) -> None:
    launcher = folder / home.name
    if launcher.is_file() and str(home) not in launcher.read_text(encoding="utf-8", errors="replace"):
        raise WriteError(f"{launcher} is another program", "Choose another folder with --bin.")


def _write_launcher(home: Path, folder: Path) -> Path:
    """A command of the model's name: a conversation, or with words behind it one answer."""
    launcher = folder / home.name
    text = _LAUNCHER.format(home=_quoted(home), python=_quoted(Path(sys.executable)))
    with paths.atomic_write(launcher, 0o777) as stream:  # executable at once: a kill may come before a chmod
        stream.write(text.encode())
    return launcher


def _quoted(path: Path) -> str:
    import shlex

    return shlex.quote(str(path))


_LAUNCHER = """\
#!/bin/sh
# A model installed by edgeft. Without arguments a conversation, with arguments one answer.
here=$(readlink -f {home}/current) || exit 1
[ ! -d "$here/.site" ] || export PYTHONPATH="$here/.site"
if [ $# -eq 0 ]; then
    exec {python} -s -m edgeft chat "$here"
elif [ "$1" = --serve ]; then
    shift
    exec {python} -s -m edgeft serve "$here" "$@"
fi
exec {python} -s -m edgeft run "$here" "$*"
"""
