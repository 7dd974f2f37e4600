"""Bundles: what is in them, and what a device does with good ones and bad ones."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny_gguf

from edgeft.bundle import MANIFEST, Bundle, Target, check_files, decode, encode, read_bundle, safe_path, version_key
from edgeft.cli.main import main
from edgeft.errors import CheckFailed, EdgeftError, ModelError, UsageError
from edgeft.package import archives, build, formats, install, service, signing, wheels
from edgeft.package.target import target_of

needs_skopeo = pytest.mark.skipif(shutil.which("skopeo") is None, reason="skopeo is not installed")
needs_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
needs_dpkg = pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="dpkg-deb is not installed")


def model(folder: Path, answer: str = tiny_gguf.ANSWER) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return tiny_gguf.write_scripted(folder / "model.gguf", tiny_gguf.chain_of(answer))


def bundle(
    folder: Path, version: str = "1.0", answer: str = tiny_gguf.ANSWER, *, key: Path | None = None, **more: str
) -> Path:
    """A bundle without wheels: this Python's own edgeft runs it."""
    request = build.Request(
        model(folder / f"made-{version}", answer),
        target_of("local"),
        "pet",
        version,
        with_wheels=False,
        key=key,
        **more,
    )
    build.build(request, folder / f"pet-{version}")
    return folder / f"pet-{version}"


@pytest.fixture
def options(tmp_path: Path) -> install.Options:
    return install.Options(tmp_path / "apps", tmp_path / "bin")


def tree(folder: Path) -> dict[str, bytes | str]:
    """Everything below a folder, to compare before and after."""
    found: dict[str, bytes | str] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            found[name] = os.readlink(path)
        elif path.is_file() and path.name != ".lock":
            found[name] = path.read_bytes()
    return found


def ask(options: install.Options, question: str = "Say hello.") -> str:
    done = subprocess.run([options.bin / "pet", question], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# --- The way it should go ---------------------------------------------------


def test_from_a_file_to_a_command_that_answers(tmp_path: Path, options: install.Options) -> None:
    result = install.install(bundle(tmp_path), options)
    assert result.answer == tiny_gguf.ANSWER
    assert ask(options) == tiny_gguf.ANSWER
    found = read_bundle(options.root / "pet" / "current")
    assert (found.version, found.licence, found.target.architecture) == ("1.0", None, target_of("local").architecture)


def test_an_update_copies_what_changed_and_can_be_taken_back(tmp_path: Path, options: install.Options) -> None:
    first = install.install(bundle(tmp_path, "1.0", "one"), options)
    second = install.install(bundle(tmp_path, "1.1", "two"), options)
    assert (first.previous, second.previous) == (None, first.id)
    assert ask(options) == "two"
    assert install.rollback(options.root, "pet").current == first.id
    assert ask(options) == "one"
    with pytest.raises(UsageError, match="no version before"):
        install.rollback(options.root, "pet")


def test_installing_again_copies_nothing(tmp_path: Path, options: install.Options) -> None:
    made = bundle(tmp_path)
    assert install.install(made, options).copied_bytes > 0
    assert install.install(made, options).copied_bytes == 0
    assert len(install.state(options.root, "pet").versions) == 1


def test_versions_beyond_those_to_keep_are_removed_with_their_files(tmp_path: Path, options: install.Options) -> None:
    for number, answer in enumerate(("one", "two", "three")):
        install.install(bundle(tmp_path, f"1.{number}", answer), options)
    home = options.root / "pet"
    assert [version.version for version in install.state(options.root, "pet").versions] == ["1.1", "1.2"]
    used = {entry.sha256 for folder in (home / "versions").iterdir() for entry in read_bundle(folder).files}
    assert {blob.name for blob in (home / "blobs").iterdir()} == used


def test_the_version_in_use_is_never_taken_apart(
    tmp_path: Path, options: install.Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = bundle(tmp_path)
    first = install.install(made, options)

    def stop(*_: object) -> str:
        assert ask(options) == tiny_gguf.ANSWER
        raise CheckFailed("stopped")

    monkeypatch.setattr(install, "check_health", stop)
    with pytest.raises(CheckFailed, match="stopped"):
        install.install(made, options)
    assert install.state(options.root, "pet").current == first.id
    assert ask(options) == tiny_gguf.ANSWER


def test_nothing_is_left_of_what_is_uninstalled(tmp_path: Path, options: install.Options) -> None:
    install.install(bundle(tmp_path), options)
    install.uninstall(options.root, "pet", options.bin)
    assert tree(options.root) == {}
    assert not (options.bin / "pet").exists()


def test_a_blob_that_rotted_is_copied_again(tmp_path: Path, options: install.Options) -> None:
    made = bundle(tmp_path)
    install.install(made, options)
    entry = next(entry for entry in read_bundle(made).files if entry.path.endswith(".gguf"))
    blob = options.root / "pet" / "blobs" / entry.sha256
    blob.chmod(0o644)
    blob.write_bytes(b"\0" * entry.bytes)
    assert install.install(made, options).copied_bytes == entry.bytes
    assert ask(options) == tiny_gguf.ANSWER


def test_an_adapter_of_a_bundle_is_loaded_with_it(tmp_path: Path, options: install.Options) -> None:
    base = tiny_gguf.write_random(tmp_path / "base.gguf")
    random_ = np.random.default_rng(5)
    a, b = (random_.standard_normal(shape).astype(np.float32) for shape in ((4, 64), (64, 4)))
    adapter = tiny_gguf.write_adapter(tmp_path / "tune.gguf", "blk.0.attn_q.weight", a, b, alpha=8)
    plain = build.Request(base, target_of("local"), "plain", "1", with_wheels=False)
    tuned = dataclasses.replace(plain, name="tuned", adapters=(adapter,))
    answers = []
    for request in (plain, tuned):
        build.build(request, tmp_path / request.name)
        answers.append(install.install(tmp_path / request.name, options).answer)
    assert answers[0] != answers[1]


# --- What is refused, before anything is written ----------------------------


def change(file: Path, edit: Callable[[dict], None]) -> None:  # type: ignore[type-arg]
    value = json.loads(file.read_text())
    edit(value)
    file.write_text(json.dumps(value))


def tampered_file(made: Path) -> None:
    file = made / "model" / "model.gguf"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def added_file(made: Path) -> None:
    (made / "model" / "more.txt").write_text("x")


def missing_file(made: Path) -> None:
    (made / "README.txt").unlink()


def link_to_the_outside(made: Path) -> None:
    shutil.copy(made / "README.txt", made.parent / "elsewhere")
    (made / "README.txt").unlink()
    (made / "README.txt").symlink_to(made.parent / "elsewhere")


def linked_folder(made: Path) -> None:
    (made / "model").rename(made.parent / "model-elsewhere")
    (made / "model").symlink_to(made.parent / "model-elsewhere")


def linked_manifest(made: Path) -> None:
    (made / MANIFEST).rename(made.parent / "manifest")
    (made / MANIFEST).symlink_to(made.parent / "manifest")


def entry_path(path: str) -> Callable[[Path], None]:
    def edit(made: Path) -> None:
        change(made / MANIFEST, lambda value: value["files"][0].update(path=path))

    return edit


def key_of(name: str, value: object) -> Callable[[Path], None]:
    def edit(made: Path) -> None:
        change(made / MANIFEST, lambda manifest: manifest.update({name: value}))

    return edit


BAD: dict[str, tuple[Callable[[Path], None], str]] = {
    "changed": (tampered_file, "model.gguf in .* is not the file its manifest lists"),
    "added": (added_file, "more.txt, which bundle.json does not list"),
    "missing": (missing_file, "lacks README.txt"),
    "link": (link_to_the_outside, "README.txt in .* is not an ordinary file"),
    "linked folder": (linked_folder, "model in .* is not an ordinary file"),
    "linked manifest": (linked_manifest, "is not a bundle's manifest"),
    "climbing": (entry_path("../../.bashrc"), "not a path inside the bundle"),
    "absolute": (entry_path("/etc/passwd"), "not a path inside the bundle"),
    "backslashes": (entry_path("..\\x"), "not a path inside the bundle"),
    "twice": (entry_path("install.sh"), "lists install.sh twice"),
    "name climbs": (key_of("name", "../pet"), "name '../pet' is not allowed"),
    "version": (key_of("version", "1.0; rm"), "version '1.0; rm' is not allowed"),
    "model outside": (key_of("model", "../x"), "not a path inside the bundle"),
    "model not listed": (key_of("model", "model/other.gguf"), "not among its files"),
    "schema": (key_of("schema", 99), "has schema 99"),
    "no files": (key_of("files", None), "is not a bundle's manifest"),
    "architecture": (key_of("target", dataclasses.asdict(Target("x", "pdp11", "any", "2.17"))), "made for pdp11"),
    "python": (key_of("target", {**dataclasses.asdict(target_of("local")), "python": "2.7"}), "made for Python 2.7"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bundle_that_is_not_right_is_refused(name: str, tmp_path: Path, options: install.Options) -> None:
    install.install(bundle(tmp_path, "1.0", "one"), options)
    before, made = tree(options.root), bundle(tmp_path, "1.1", "two")
    edit, said = BAD[name]
    edit(made)
    with pytest.raises(ModelError, match=said):
        install.install(made, options)
    assert tree(options.root) == before
    assert ask(options) == "one"


@pytest.mark.parametrize(
    ("older", "said"),
    [
        ({"version": "1.4"}, "1.4 is older than 1.5"),
        ({"version": "1.6", "created": "2020-01-01T00:00:00+00:00"}, "before 1.5, which is installed"),
    ],
    ids=["older", "pretends to be newer"],
)
def test_an_older_bundle_is_refused(older: dict[str, str], said: str, tmp_path: Path, options: install.Options) -> None:
    install.install(bundle(tmp_path, "1.5", "one"), options)
    before, made = tree(options.root), bundle(tmp_path, "1.9", "two")
    change(made / MANIFEST, lambda value: value.update(older))
    with pytest.raises(CheckFailed, match=said):
        install.install(made, options)
    assert tree(options.root) == before
    allowed = dataclasses.replace(options, allow_downgrade=True)
    assert install.install(made, allowed).answer == "two"


def test_only_what_was_signed_with_the_key_is_installed(tmp_path: Path, options: install.Options) -> None:
    private, other = tmp_path / "key.pem", tmp_path / "other.pem"
    public, strangers = signing.make_keys(private), signing.make_keys(other)
    assert private.stat().st_mode & 0o077 == 0
    signed, unsigned = bundle(tmp_path, "1.0", key=private), bundle(tmp_path, "1.1")
    strict = dataclasses.replace(options, key=public)
    for made, key, said in ((unsigned, public, "is not signed"), (signed, strangers, "is not signed with")):
        with pytest.raises(CheckFailed, match=said):
            install.install(made, dataclasses.replace(options, key=key))
    assert not options.root.exists()
    install.install(signed, strict)
    change(signed / MANIFEST, lambda value: value.update(version="9.0"))
    with pytest.raises(CheckFailed, match="is not signed with"):
        install.install(signed, strict)


def test_a_key_is_never_overwritten(tmp_path: Path) -> None:
    signing.make_keys(tmp_path / "key.pem")
    with pytest.raises(UsageError, match="exists"):
        signing.make_keys(tmp_path / "key.pem")


# --- What goes wrong on the device ------------------------------------------


def test_a_model_that_does_not_answer_as_it_should_is_not_switched_to(tmp_path: Path, options: install.Options) -> None:
    install.install(bundle(tmp_path, "1.0", "one"), options)
    before = tree(options.root)
    with pytest.raises(CheckFailed, match="said 'two', not 'three'"):
        install.install(bundle(tmp_path, "1.1", "two", expected="three"), options)
    assert tree(options.root) == before
    assert ask(options) == "one"


def test_a_model_that_cannot_be_loaded_is_not_switched_to(tmp_path: Path, options: install.Options) -> None:
    install.install(bundle(tmp_path, "1.0", "one"), options)
    file = tmp_path / "broken" / "model.gguf"
    file.parent.mkdir()
    file.write_bytes(b"GGUF" + bytes(100))
    build.build(build.Request(file, target_of("local"), "pet", "1.1", with_wheels=False), tmp_path / "bad")
    with pytest.raises(CheckFailed, match="does not run here"):
        install.install(tmp_path / "bad", options)
    assert ask(options) == "one"


def test_no_space_leaves_the_version_in_use(
    tmp_path: Path, options: install.Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    install.install(bundle(tmp_path, "1.0", "one"), options)
    before, made = tree(options.root), bundle(tmp_path, "1.1", "two")
    usage = shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(install.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(EdgeftError, match="0 MB are free"):
        install.install(made, options)
    assert tree(options.root) == before


@pytest.mark.parametrize("kills", [6, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_any_moment_one_of_the_two_versions_answers(
    kills: int, tmp_path: Path, options: install.Options
) -> None:
    install.install(bundle(tmp_path, "1.0", "one"), options)
    made = bundle(tmp_path, "1.1", "two")
    command = [sys.executable, "-m", "edgeft", "install", made, "--root", options.root, "--bin", options.bin]
    started = time.monotonic()
    subprocess.run(command, check=True, capture_output=True)
    duration, generator = time.monotonic() - started, random.Random(3)
    for kill in range(kills):
        if kill % 2:  # every other time it is the version in use that is installed again
            install.rollback(options.root, "pet")
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(generator.uniform(0.3, 1.0) * duration)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert ask(options) in ("one", "two")
        current = install.state(options.root, "pet").current
        assert current is not None
        subprocess.run(command, check=True, capture_output=True)
        assert ask(options) == "two"


def test_two_installations_at_once_do_not_mix(tmp_path: Path, options: install.Options) -> None:
    made = bundle(tmp_path)
    install.install(made, options)
    with (
        install._locked(options.root / "pet"),
        pytest.raises(EdgeftError, match="another installation of pet is running"),
    ):
        install.install(made, options)


def test_a_program_of_the_same_name_is_left_alone(tmp_path: Path, options: install.Options) -> None:
    options.bin.mkdir()
    (options.bin / "pet").write_text("#!/bin/sh\necho mine\n")
    with pytest.raises(EdgeftError, match="is another program"):
        install.install(bundle(tmp_path), options)
    assert (options.bin / "pet").read_text() == "#!/bin/sh\necho mine\n"


# --- Archives ---------------------------------------------------------------


def packed(tmp_path: Path, format_: str) -> Path:
    request = build.Request(model(tmp_path / "m"), target_of("local"), "pet", "1.0", with_wheels=False)
    return formats.write(request, tmp_path / "out" / "pet", format_, install.Silent())[1]


def test_an_archive_installs_like_a_folder(tmp_path: Path, options: install.Options) -> None:
    file = packed(tmp_path, "tar.zst")
    assert file.name == "pet.tar.zst"
    where = ["--root", str(options.root), "--bin", str(options.bin)]
    assert main(["install", str(file), *where]) == 0
    assert ask(options) == tiny_gguf.ANSWER
    assert [path.name for path in options.root.iterdir()] == ["pet"]


def test_equal_folders_make_equal_archives(tmp_path: Path) -> None:
    made = bundle(tmp_path)
    for name in ("a", "b"):
        archives.write_tar_zst(made, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def hostile(kind: str, name: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = {"link": tarfile.SYMTYPE, "hard link": tarfile.LNKTYPE, "device": tarfile.CHRTYPE}.get(
        kind, tarfile.REGTYPE
    )
    info.linkname = "/etc/passwd"
    return info


@pytest.mark.parametrize(
    ("kind", "name", "said"),
    [
        ("file", "../climb", "not a path inside the bundle"),
        ("file", "/absolute", "not a path inside the bundle"),
        ("file", "not-listed", "is not what bundle.json lists"),
        ("file", "README.txt", "is not what bundle.json lists"),
        ("link", "README.txt", "is not an ordinary file"),
        ("hard link", "README.txt", "is not an ordinary file"),
        ("device", "README.txt", "is not an ordinary file"),
    ],
)
def test_a_hostile_archive_writes_nothing_outside(kind: str, name: str, said: str, tmp_path: Path) -> None:
    made, file, folder = bundle(tmp_path), tmp_path / "evil.tar", tmp_path / "into"
    folder.mkdir()
    with tarfile.open(file, "w") as archive:
        archive.add(made / MANIFEST, MANIFEST)
        info = hostile(kind, name)
        info.size = 3 if kind == "file" else 0
        archive.addfile(info, io.BytesIO(b"xxx"))
    outside = {path for path in tmp_path.rglob("*") if folder not in path.parents}
    with pytest.raises(ModelError, match=said):
        archives.unpack(file, folder)
    assert {path for path in tmp_path.rglob("*") if folder not in path.parents} == outside
    assert [path.name for path in folder.iterdir()] == [MANIFEST]


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_an_archive_that_was_cut_short_is_refused(share: float, tmp_path: Path, options: install.Options) -> None:
    file = packed(tmp_path, "tar.zst")
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    with pytest.raises(ModelError), formats.opened(file, options.root) as folder:
        install.install(folder, options)
    assert tree(options.root) == {}


@needs_dpkg
def test_a_debian_package_is_one(tmp_path: Path) -> None:
    file = packed(tmp_path, "deb")
    shown = subprocess.run(["dpkg-deb", "--field", file], check=True, capture_output=True, text=True).stdout
    assert "Package: pet\nVersion: 1.0\n" in shown
    subprocess.run(["dpkg-deb", "--extract", file, tmp_path / "root"], check=True)
    home = tmp_path / "root" / "usr" / "lib" / "edgeft" / "pet"
    assert read_bundle(home / "bundle").name == "pet"
    assert os.access(tmp_path / "root" / "usr" / "bin" / "pet", os.X_OK)
    assert "User" in (tmp_path / "root" / "usr" / "lib" / "systemd" / "system" / "pet.service").read_text()


def test_an_image_holds_what_its_digests_say(tmp_path: Path) -> None:
    import hashlib

    with tarfile.open(packed(tmp_path, "oci")) as archive:
        content = {member.name: archive.extractfile(member).read() for member in archive}  # type: ignore[union-attr]
    for name, data in content.items():
        if name.startswith("blobs/sha256/"):
            assert name.removeprefix("blobs/sha256/") == hashlib.sha256(data).hexdigest()
    reference = json.loads(content["index.json"])["manifests"][0]
    image = json.loads(content[f"blobs/sha256/{reference['digest'].removeprefix('sha256:')}"])
    layer = content[f"blobs/sha256/{image['layers'][0]['digest'].removeprefix('sha256:')}"]
    with tarfile.open(fileobj=io.BytesIO(layer)) as archive:
        assert "bundle/bundle.json" in archive.getnames()
        assert "bundle/model/model.gguf" in archive.getnames()


@needs_skopeo
def test_skopeo_reads_the_image_and_copies_it(tmp_path: Path) -> None:
    file = packed(tmp_path, "oci")
    shown = subprocess.run(["skopeo", "inspect", f"oci-archive:{file}"], check=True, capture_output=True, text=True)
    about = json.loads(shown.stdout)
    assert about["Labels"]["org.opencontainers.image.title"] == "pet"
    assert (about["Os"], about["Architecture"]) == ("linux", formats._DEBIAN[target_of("local").architecture])
    copy = ["skopeo", "--insecure-policy", "copy", "--quiet", f"oci-archive:{file}", f"dir:{tmp_path / 'copy'}"]
    subprocess.run(copy, check=True, capture_output=True)  # every digest and size is compared on the way
    layer = tmp_path / "copy" / about["Layers"][0].removeprefix("sha256:")
    with tarfile.open(layer) as archive:
        archive.extractall(tmp_path / "root", filter="data")
    check_files(tmp_path / "root" / "bundle", read_bundle(tmp_path / "root" / "bundle"))


def test_ollama_gets_a_file_it_understands(tmp_path: Path) -> None:
    folder = packed(tmp_path, "ollama")
    assert (folder / "Modelfile").read_text().startswith("FROM ./model/model.gguf\n")
    assert not (folder / "install.sh").exists()


def test_assets_of_a_format_that_no_wheel_runs(tmp_path: Path) -> None:
    made = model(tmp_path / "m")
    phone = made.rename(made.with_name("pet.litertlm"))
    out = tmp_path / "app"
    assert main(["package", str(phone), "--format", "assets", "--out", str(out)]) == 0
    assert 'noCompress += "litertlm"' in next(out.glob("README*")).read_text()


# --- Services ---------------------------------------------------------------


def test_a_bundle_has_a_service_of_the_user(tmp_path: Path) -> None:
    text = (bundle(tmp_path) / "systemd" / "pet.service").read_text()
    assert "ExecStart=%h/.local/bin/pet --serve\n" in text
    assert "IPAddressDeny=any\nIPAddressAllow=localhost\n" in text


@needs_systemd
@pytest.mark.parametrize("unit", [service.for_user, service.for_system], ids=["user", "system"])
def test_systemd_understands_every_line_of_a_service(unit: Callable[[str], str], tmp_path: Path) -> None:
    file = tmp_path / "pet.service"
    file.write_text(re.sub(r"(?m)^ExecStart=.*", "ExecStart=/bin/true", unit("pet")))
    who = ["--user"] if unit is service.for_user else []
    done = subprocess.run(["systemd-analyze", *who, "verify", file], capture_output=True, text=True)
    assert str(file) not in done.stderr, done.stderr


@needs_systemd
def test_a_service_is_rated_ok(tmp_path: Path) -> None:
    """systemd's own scale: 0 is closed, 10 is open; below 2 of 10 is "OK"."""
    (tmp_path / "pet.service").write_text(service.for_system("pet"))
    rate = ["systemd-analyze", "security", "--offline=true", "--threshold=20", tmp_path / "pet.service"]
    done = subprocess.run(rate, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


# --- Wheels -----------------------------------------------------------------


def test_edgeft_runs_from_the_wheel_it_makes_of_itself(tmp_path: Path) -> None:
    wheel = wheels.build_own(tmp_path)
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {"edgeft/__main__.py", "edgeft/converters/gguf.py", "edgeft/runtimes/echo.py"} <= names
    assert not any("__pycache__" in name or name.startswith("tests/") for name in names)
    code = "import edgeft.runtimes.echo as e, edgeft.package.install; print(e.__file__)"
    shown = subprocess.run(
        [sys.executable, "-S", "-c", code],
        env={**os.environ, "PYTHONPATH": str(wheel)},
        cwd=tmp_path,  # the checkout's own folder would come first
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert str(wheel) in shown
    assert wheels.describe(wheel).name == "edgeft"


def test_equal_code_makes_an_equal_wheel(tmp_path: Path) -> None:
    made = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        made.append(wheels.build_own(tmp_path / name).read_bytes())
    assert made[0] == made[1]


def test_tags_of_a_device_begin_with_the_newest_and_end_with_the_oldest() -> None:
    tags = wheels.platforms(Target("rpi5", "aarch64", "3.11", "2.36"))
    assert tags[0] == "manylinux_2_36_aarch64"
    assert tags[-2:] == ["manylinux_2_17_aarch64", "manylinux2014_aarch64"]
    with pytest.raises(UsageError, match=r"no wheels are built for glibc 2\.5"):
        wheels.platforms(Target("old", "aarch64", "3.11", "2.5"))


def test_what_runs_a_model_is_pinned_to_what_is_installed_here() -> None:
    from importlib.metadata import version

    wanted = wheels.requirements("gguf")
    assert f"xllamacpp=={version('xllamacpp')}" in wanted
    assert not any(text.startswith(("torch", "transformers", "edgeft")) for text in wanted)


def test_a_wheel_that_climbs_is_refused(tmp_path: Path) -> None:
    wheel = tmp_path / "evil-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("../evil.py", "")
    with pytest.raises(ModelError, match="not a path inside"):
        wheels.unpack([wheel], tmp_path / "site")
    assert not (tmp_path / "evil.py").exists()


def test_modules_of_a_data_folder_land_at_the_top(tmp_path: Path) -> None:
    wheel = tmp_path / "x-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("x-1.data/purelib/x.py", "y = 1")
        archive.writestr("x-1.data/scripts/x", "")
    wheels.unpack([wheel], tmp_path / "site")
    assert [path.name for path in (tmp_path / "site").iterdir()] == ["x.py"]


# --- Small things -----------------------------------------------------------


def test_a_manifest_survives_writing_and_reading(tmp_path: Path) -> None:
    found = read_bundle(bundle(tmp_path))
    assert decode(encode(found), "here") == found
    assert isinstance(found, Bundle)


@pytest.mark.parametrize(("older", "newer"), [("1", "1.1"), ("1.9", "1.10"), ("2026.1123.90000", "2026.1123.100000")])
def test_versions_are_numbers(older: str, newer: str) -> None:
    assert version_key(older) < version_key(newer)
    assert version_key("1.0") == version_key("1")


@pytest.mark.parametrize("path", ["", ".", "a/../b", "/a", "a//b", "a/", "a\\b", "a\nb", None, 3])
def test_paths_that_are_not_inside(path: object) -> None:
    with pytest.raises(ModelError):
        safe_path(path, "here")


def test_a_device_is_known_by_its_profile_or_described() -> None:
    assert target_of("rpi5-8g") == Target("rpi5-8g", "aarch64", "3.13", "2.41")
    assert target_of("rpi5-8g", python="3.11", glibc="2.36").python == "3.11"
    assert target_of("mine", "aarch64", "3.11", "2.36") == Target("mine", "aarch64", "3.11", "2.36")
    with pytest.raises(UsageError, match="no device 'mine'"):
        target_of("mine", python="3.11")
    with pytest.raises(UsageError, match="runs no Python"):
        target_of("iphone-15-pro")


def test_a_bundle_takes_the_place_of_nothing(tmp_path: Path) -> None:
    bundle(tmp_path)
    with pytest.raises(UsageError, match="exists"):
        bundle(tmp_path)


def test_a_model_that_changed_since_it_was_made_is_not_packed(tmp_path: Path) -> None:
    from edgeft.artifact import Manifest, write_manifest

    file = model(tmp_path)
    write_manifest(file, Manifest("gguf", "gguf-q4", {}, 1, 4.0, 1, "0" * 64))
    with pytest.raises(ModelError, match="has changed since it was made"):
        build.plan(build.Request(file, target_of("local"), "pet", "1"))


def test_the_command_says_what_it_would_pack(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = model(tmp_path)
    assert main(["package", str(file), "--dry-run", "--json", "--out", str(tmp_path / "out")]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["name"] == "model"
    assert any(text.startswith("xllamacpp==") for text in plan["requirements"])
    assert not (tmp_path / "out").exists()
