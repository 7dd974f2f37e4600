"""Deployment to a real OpenSSH server: what is sent, what is refused, and what still answers afterwards."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import random
import re
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_gguf
from sshd import Server, cable, free_port, needs_sshd, random_cuts, server

from edgeft.bundle import MANIFEST, Entry, Target, encode, entries, read_bundle
from edgeft.cli.main import main
from edgeft.deploy import agent, host, parcel
from edgeft.deploy.parcel import CHUNK, WINDOW
from edgeft.errors import CheckFailed, EdgeftError, ModelError, Unreachable, UsageError, WriteError
from edgeft.package import archives, build, install, signing
from edgeft.package.target import target_of

pytestmark = needs_sshd
FAST = host.Options(wait_s=0.05)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with server(tmp_path_factory.mktemp("device")) as made:
        yield made


def bundle(
    folder: Path,
    version: str = "1.0",
    answer: str = tiny_gguf.ANSWER,
    *,
    name: str = "pet",
    more: int = 0,
    **about: str,
) -> Path:
    """A bundle without wheels, `more` bytes of ballast in it."""
    made = folder / f"{name}-{version}"
    model = tiny_gguf.write_scripted(folder / f"{name}-{version}.gguf", tiny_gguf.chain_of(answer))
    build.build(build.Request(model, target_of("local"), name, version, with_wheels=False, **about), made)
    if more:
        (made / "model" / "ballast").write_bytes(os.urandom(more))
        relist(made)
    return made


def relist(made: Path) -> None:
    """After a change to the files of a bundle."""
    (made / MANIFEST).write_bytes(encode(dataclasses.replace(read_bundle(made), files=entries(made))))


def deploy(to: Server, made: Path, options: host.Options = FAST, port: int | None = None) -> host.Outcome:
    device = to.through(port) if port else to.device
    return asyncio.run(host.deploy(device, parcel.load(made), options))


def test_a_bundle_arrives_and_answers(tmp_path: Path, running: Server) -> None:
    made = bundle(tmp_path)
    outcome = deploy(running, made)
    assert (outcome.state, outcome.answer, outcome.before) == ("updated", tiny_gguf.ANSWER, None)
    assert outcome.sent_bytes == read_bundle(made).total_bytes
    assert running.command("pet", "Say hello.").stdout.strip() == tiny_gguf.ANSWER
    assert not (running.root / "pet" / "incoming").exists()


def test_what_is_in_use_is_left_alone(tmp_path: Path, running: Server) -> None:
    made = bundle(tmp_path, name="again")
    first, second = deploy(running, made), deploy(running, made)
    assert (first.state, second.state, second.sent_bytes) == ("updated", "unchanged", 0)
    assert second.id == first.id


def test_an_update_of_the_adapter_sends_the_adapter(tmp_path: Path, running: Server) -> None:
    old = bundle(tmp_path, "1.0", name="tuned", more=8_000_000)
    deploy(running, old)
    new = tmp_path / "new"
    old.rename(new)
    (new / "adapters").mkdir()
    (new / "adapters" / "tune.bin").write_bytes(os.urandom(200_000))
    about = dataclasses.replace(read_bundle(new), version="1.1", files=entries(new))
    (new / MANIFEST).write_bytes(encode(about))
    outcome = deploy(running, new)
    assert outcome.sent_bytes == 200_000
    assert outcome.sent_bytes < 0.05 * about.total_bytes


# --- Connections that break -------------------------------------------------


def test_ten_cuts_cost_nothing_that_had_arrived(tmp_path: Path, running: Server) -> None:
    made = bundle(tmp_path, name="cuts", more=24_000_000)
    total = read_bundle(made).total_bytes
    with cable(running, random_cuts(10, 300_000, 4_000_000)) as line:
        outcome = deploy(running, made, port=line.port)
        assert (outcome.connections, line.connections) == (11, 11)
    assert outcome.sent_bytes == total + outcome.lost_bytes
    assert outcome.lost_bytes <= 10 * WINDOW * CHUNK
    assert outcome.answer == tiny_gguf.ANSWER


def test_what_arrived_is_kept_for_the_next_time(tmp_path: Path, running: Server) -> None:
    made = bundle(tmp_path, name="later", more=6_000_000)
    with cable(running, [3_000_000, 20_000, 20_000]) as line, pytest.raises(Unreachable, match="cannot be reached"):
        deploy(running, made, dataclasses.replace(FAST, retries=1), line.port)
    waiting = asyncio.run(host.status(running.device, "later"))["apps"][0]["waiting"]
    assert 3_000_000 - WINDOW * CHUNK - 100_000 < waiting <= 3_000_000
    outcome = deploy(running, made)
    assert outcome.sent_bytes == read_bundle(made).total_bytes - waiting
    assert outcome.before is None


# --- What is refused --------------------------------------------------------


class Garbled(parcel.Parcel):
    """A sender whose memory is bad: chunks differ from what was announced, `times` times."""

    times = 0

    def chunks(self, entry: Entry, start: int) -> Iterator[bytes]:
        known = entry.sha256 in self._digests
        for index, chunk in enumerate(super().chunks(entry, start), start):
            if known and index == 3 and self.times:
                type(self).times -= 1
                chunk = bytes([chunk[0] ^ 1]) + chunk[1:]
            yield chunk


@pytest.mark.parametrize("times", [1, 99])
def test_a_damaged_chunk_is_never_written(times: int, tmp_path: Path, running: Server) -> None:
    name = f"garbled-{times}"
    made = bundle(tmp_path, name=name, more=1_500_000)
    garbled = Garbled(**vars(parcel.load(made)))
    Garbled.times = times
    if times == 1:
        outcome = asyncio.run(host.deploy(running.device, garbled, FAST))
        assert outcome.lost_bytes > 0
        assert outcome.answer == tiny_gguf.ANSWER
        return
    with pytest.raises(ModelError, match="chunk 3 of model/ballast arrived damaged 3 times"):
        asyncio.run(host.deploy(running.device, garbled, FAST))
    parts = [path for path in (running.root / name / "incoming").glob("*.part")]
    assert [path.stat().st_size for path in parts] == [3 * CHUNK]


def test_a_part_that_rotted_on_the_card_is_sent_again(tmp_path: Path, running: Server) -> None:
    made = bundle(tmp_path, name="rotten", more=2_000_000)
    with cable(running, [1_500_000, 20_000]) as line, pytest.raises(Unreachable):
        deploy(running, made, dataclasses.replace(FAST, retries=0), line.port)
    part = next((running.root / "rotten" / "incoming").glob("*.part"))
    held = part.stat().st_size
    with part.open("r+b") as stream:
        stream.seek(CHUNK + 5)
        stream.write(b"\0\1\2\3")
    outcome = deploy(running, made)
    assert outcome.sent_bytes > read_bundle(made).total_bytes - held
    assert outcome.answer == tiny_gguf.ANSWER


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"version": "0.9"}, "0.9 is older than 1.0"),
        ({"version": "1.1", "created": "2020-01-01T00:00:00+00:00"}, "made on 2020-01-01"),
        ({"target": Target("x", "pdp11", "any", "2.17")}, "made for pdp11"),
        ({"target": Target("x", "any", "2.7", "2.17")}, r"made for Python 2\.7"),
    ],
    ids=["older", "pretends to be newer", "processor", "python"],
)
def test_nothing_is_sent_of_what_will_not_be_installed(
    change: dict[str, Any], said: str, tmp_path: Path, running: Server
) -> None:
    name = f"order-{abs(hash(said))}"
    deploy(running, bundle(tmp_path, "1.0", name=name))
    made = bundle(tmp_path, "1.5", name=name)
    (made / MANIFEST).write_bytes(encode(dataclasses.replace(read_bundle(made), **change)))
    with cable(running) as line:
        with pytest.raises(EdgeftError, match=said):
            deploy(running, made, port=line.port)
        assert line.sent < 60_000  # keys and the agent
    assert not list((running.root / name).glob("incoming/*"))


def test_a_bundle_that_was_changed_never_leaves(tmp_path: Path, running: Server) -> None:
    made = bundle(tmp_path, name="changed")
    with (made / "README.txt").open("a") as stream:
        stream.write("x")
    with pytest.raises(ModelError, match=r"README\.txt in .* is not the file its manifest lists"):
        deploy(running, made)


def test_only_what_was_signed_with_the_key_leaves(tmp_path: Path) -> None:
    public, strangers = signing.make_keys(tmp_path / "a.pem"), signing.make_keys(tmp_path / "b.pem")
    made = bundle(tmp_path, name="signed")
    signing.sign(made, tmp_path / "a.pem")
    assert parcel.load(made, public).signature
    with pytest.raises(CheckFailed, match="is not signed with"):
        parcel.load(made, strangers)


@pytest.mark.parametrize("path", ["../../.bashrc", "/etc/cron.d/x", "a/../../../x"])
def test_the_agent_itself_writes_nothing_outside(path: str, tmp_path: Path) -> None:
    files = agent.Files(str(tmp_path / "apps"), "pet")
    manifest = json.dumps({"files": [{"path": path, "sha256": "0" * 64, "bytes": 0}]})
    with pytest.raises(agent.Refused, match="not a path inside the bundle"):
        agent.assemble(files, {"manifest": manifest, "signature": None})
    assert [found.name for found in tmp_path.rglob("*") if found.is_file()] == ["bundle.json"]


@pytest.mark.parametrize("name", ["../pet", "", ".hidden", "a/b"])
def test_the_agent_refuses_names_that_climb(name: str, tmp_path: Path) -> None:
    with pytest.raises(agent.Refused, match="is not a name"):
        agent.Files(str(tmp_path), name)


def test_the_agent_looks_where_the_installer_writes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert agent.default_root() == str(install.apps_root())
    monkeypatch.delenv("EDGEFT_HOME")
    for folder in (None, str(tmp_path)):
        monkeypatch.setenv("XDG_DATA_HOME", folder) if folder else monkeypatch.delenv("XDG_DATA_HOME", raising=False)
        assert agent.default_root() == str(install.apps_root())


# --- Who is at the other end ------------------------------------------------


def test_an_unknown_host_is_refused_with_its_fingerprint(tmp_path: Path, running: Server) -> None:
    shown = subprocess.run(
        ["ssh-keygen", "-lf", running.home.parent / "host_key.pub"], capture_output=True, text=True, check=True
    ).stdout.split()[1]
    made, empty = bundle(tmp_path), tmp_path / "known"
    empty.write_text("")
    stranger = dataclasses.replace(running.device, known_hosts=empty)
    with pytest.raises(CheckFailed, match=re.escape(f"host key of 127.0.0.1 is not known: {shown}")):
        asyncio.run(host.deploy(stranger, parcel.load(made), FAST))
    assert empty.read_text() == ""


def test_another_host_key_than_the_known_one_is_refused(tmp_path: Path, running: Server) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / "other"], check=True)
    (tmp_path / "known").write_text(f"* {(tmp_path / 'other.pub').read_text()}")
    device = dataclasses.replace(running.device, known_hosts=tmp_path / "known")
    with pytest.raises(CheckFailed, match="shows another host key than the known one: SHA256:"):
        asyncio.run(host.status(device))


def test_a_key_that_the_device_does_not_know(tmp_path: Path, running: Server) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / "mine"], check=True)
    device = dataclasses.replace(running.device, identity=(tmp_path / "mine",))
    with pytest.raises(EdgeftError, match="does not let this user in"):
        asyncio.run(host.status(device))


def test_nobody_listens(running: Server) -> None:
    device = running.through(free_port("127.0.0.1"))
    with pytest.raises(Unreachable, match=r"127\.0\.0\.1 cannot be reached"):
        asyncio.run(host.status(device))


def test_a_device_without_that_python(running: Server) -> None:
    device = dataclasses.replace(running.device, python="python9.9")
    with pytest.raises(EdgeftError, match="Python could not be run there"):
        asyncio.run(host.status(device))


# --- What goes wrong on the device ------------------------------------------


def test_a_model_that_answers_wrongly_is_not_switched_to(tmp_path: Path, running: Server) -> None:
    deploy(running, bundle(tmp_path, "1.0", "one", name="wrong"))
    with pytest.raises(CheckFailed, match="said 'two', not 'three'"):
        deploy(running, bundle(tmp_path, "1.1", "two", name="wrong", expected="three"))
    assert running.command("wrong", "Say hello.").stdout.strip() == "one"
    found = asyncio.run(host.status(running.device, "wrong"))["apps"][0]
    assert [version["version"] for version in found["versions"]] == ["1.0"]


def test_a_command_that_fails_after_the_switch_is_rolled_back(tmp_path: Path, running: Server) -> None:
    """The installer's own question was answered; the installed command, which is what counts, does not answer."""
    first = deploy(running, bundle(tmp_path, "1.0", "one", name="after"))
    made = bundle(tmp_path, "1.1", "two", name="after")
    script = made / "install.sh"
    text = script.read_text().replace("exec ", "", 1).replace('"$python" -s -m', 'EDGEFT_X=1 "$python" -s -m', 1)
    script.write_text(text + '\nrm "$here/../../versions"/1.1-*/model/after-1.1.gguf\n')
    relist(made)
    with pytest.raises(CheckFailed, match=f"does not answer: .*; back to {first.id}"):
        deploy(running, made)
    assert running.command("after", "Say hello.").stdout.strip() == "one"


def test_rollback_and_versions_to_keep(tmp_path: Path, running: Server) -> None:
    options = dataclasses.replace(FAST, keep=3)
    ids = [deploy(running, bundle(tmp_path, f"1.{n}", f"v{n}", name="keep"), options).id for n in range(4)]
    found = asyncio.run(host.status(running.device, "keep"))["apps"][0]
    assert [version["id"] for version in found["versions"]] == ids[1:]
    assert asyncio.run(host.rollback(running.device, "keep"))["current"] == ids[2]
    assert running.command("keep", "x").stdout.strip() == "v2"
    asyncio.run(host.rollback(running.device, "keep"))
    with pytest.raises(UsageError, match="has no version before"):
        asyncio.run(host.rollback(running.device, "keep"))


@pytest.mark.parametrize("kills", [5, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_on_the_device_one_of_the_versions_answers(kills: int, tmp_path: Path, running: Server) -> None:
    """Everything that runs there for the deployment is killed: while files come, are checked, asked and switched."""
    name = f"killed-{kills}"
    deploy(running, bundle(tmp_path, "1.0", "one", name=name))
    made = bundle(tmp_path, "1.1", "two", name=name, more=2_000_000)
    duration = deploy(running, made).seconds
    asyncio.run(host.rollback(running.device, name))
    generator = random.Random(11)
    for _ in range(kills):
        work = threading.Thread(target=lambda: _tolerant(running, made))
        work.start()
        time.sleep(generator.uniform(0.05, 1.0) * duration)
        _kill_below(running.process.pid)
        work.join()
        assert running.command(name, "x").stdout.strip() in ("one", "two")
        with contextlib.suppress(UsageError):
            asyncio.run(host.rollback(running.device, name))
    assert deploy(running, made).state == "updated"
    assert running.command(name, "x").stdout.strip() == "two"


def _tolerant(to: Server, made: Path) -> None:
    with contextlib.suppress(EdgeftError):
        deploy(to, made, dataclasses.replace(FAST, retries=0))


def _kill_below(root: int) -> None:
    """SIGKILL to everything below a process, the deepest first; children that left the session too."""
    parents = {int(p.name): p for p in Path("/proc").iterdir() if p.name.isdigit()}
    below, found = [root], []
    while below:
        parent = below.pop()
        for pid in list(parents):
            with contextlib.suppress(OSError, IndexError):
                if int((Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[1]) == parent:
                    below.append(pid)
                    found.append(pid)
    for pid in reversed(found):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount and make network namespaces")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", folder], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"cannot mount here: {made.stderr}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


@needs_root
@pytest.mark.parametrize("known", [True, False], ids=["known before", "found while it comes"])
def test_a_full_disk_leaves_the_version_in_use(
    known: bool, tmp_path: Path, small_disk: Path, running: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    to = dataclasses.replace(running, device=dataclasses.replace(running.device, root=str(small_disk)))
    name = "full-before" if known else "full-later"
    deploy(to, bundle(tmp_path, "1.0", "one", name=name))
    before = tree(small_disk)
    if not known:  # as if something else had taken the space meanwhile
        monkeypatch.setattr(host, "_check_space", lambda *_: None)
    with pytest.raises(WriteError, match="MB are free" if known else "no space left"):
        deploy(to, bundle(tmp_path, "1.1", "two", name=name, more=9_000_000))
    left = {name: content for name, content in tree(small_disk).items() if "incoming/" not in name}
    assert {name: content for name, content in left.items() if content != b""} == before
    assert to.command(name, "x").stdout.strip() == "one"


def tree(folder: Path) -> dict[str, bytes | str]:
    return {
        path.relative_to(folder).as_posix(): os.readlink(path) if path.is_symlink() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if (path.is_file() or path.is_symlink()) and not path.name.startswith(".")
    }


# --- The command ------------------------------------------------------------


def flags(to: Server) -> list[str]:
    device = to.device
    words = ["--port", device.port, "--identity", device.identity[0], "--known-hosts", device.known_hosts]
    return [str(word) for word in [*words, "--python", device.python]]


def test_an_archive_is_deployed_by_the_command(
    tmp_path: Path, running: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    archives.write_tar_zst(bundle(tmp_path, name="packed"), tmp_path / "packed.tar.zst")
    assert main(["deploy", str(tmp_path / "packed.tar.zst"), "127.0.0.1", *flags(running)]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("1.0-")
    assert f"127.0.0.1 says: {tiny_gguf.ANSWER}" in err
    assert main(["deploy", "status", "127.0.0.1", "--name", "packed", *flags(running)]) == 0
    assert "in use" in capsys.readouterr().out
    assert main(["deploy", "rollback", "packed", "127.0.0.1", *flags(running)]) == 2
    assert "packed has no version before" in capsys.readouterr().err


@pytest.mark.parametrize(("host_", "code"), [("127.0.0.1:1", 4), ("", 2)])
def test_exit_codes(host_: str, code: int, tmp_path: Path, running: Server) -> None:
    made = str(bundle(tmp_path))
    assert main(["deploy", made, host_, "--retries", "0", *flags(running)]) == code


def test_an_unknown_host_ends_with_the_code_of_checks(tmp_path: Path, running: Server) -> None:
    (tmp_path / "none").write_text("")
    words = [*flags(running), "--known-hosts", str(tmp_path / "none")]
    assert main(["deploy", "status", "127.0.0.1", *words]) == 5


def test_nothing_is_installed_there(running: Server, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["deploy", "rollback", "nothing", "127.0.0.1", *flags(running)]) == 2
    assert "no 'nothing' is installed" in capsys.readouterr().err
