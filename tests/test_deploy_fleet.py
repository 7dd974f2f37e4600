"""Fleets: three hosts in network namespaces of their own, an inventory, canaries, budgets, and the same for Ansible."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny_gguf
from sshd import Server, needs_sshd, server
from test_deploy import FAST, bundle

from edgeft.cli.main import main
from edgeft.deploy import ansible, fleet, parcel
from edgeft.deploy.fleet import Rollout
from edgeft.deploy.host import Outcome
from edgeft.deploy.link import Device, parse
from edgeft.errors import ConfigError, UsageError

PLAYBOOK = shutil.which("ansible-playbook", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")
needs_ansible = pytest.mark.skipif(PLAYBOOK is None, reason="ansible-core is not installed")
HOSTS = 3


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Server]]:
    """Each with an address, an interface and a loopback of its own, reached over a virtual cable."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("only root may make network namespaces")
    with contextlib.ExitStack() as stack:
        yield [_host(number, tmp_path_factory.mktemp(f"host{number}"), stack) for number in range(HOSTS)]


def _host(number: int, folder: Path, stack: contextlib.ExitStack) -> Server:
    space, cable = f"eft{os.getpid()}-{number}", f"eft{os.getpid() % 100000}-{number}"
    here, there = (f"198.18.{os.getpid() % 250}.{4 * number + end}" for end in (1, 2))
    made = subprocess.run(["ip", "netns", "add", space], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"no network namespace: {made.stderr}")
    stack.callback(subprocess.run, ["ip", "netns", "delete", space], check=True)
    for command in (
        f"link add {cable} type veth peer name eth0 netns {space}",
        f"address add {here}/30 dev {cable}",
        f"link set {cable} up",
        f"-n {space} address add {there}/30 dev eth0",
        f"-n {space} link set eth0 up",
        f"-n {space} link set lo up",
    ):
        subprocess.run(["ip", *command.split()], check=True)
    found = stack.enter_context(server(folder, address=there, inside=("ip", "netns", "exec", space)))
    return dataclasses.replace(found, device=dataclasses.replace(found.device, name=f"host{number}"))


def roll_out(hosts: list[Server], made: Path, rollout: Rollout | None = None, **changed: Device) -> list[Outcome]:
    devices = [changed.get(to.device.name, to.device) for to in hosts]
    options = dataclasses.replace(FAST, retries=0)
    return asyncio.run(fleet.roll_out(devices, rollout or Rollout(), parcel.load(made), options, lambda _: None))


@needs_sshd
def test_all_devices_get_it(tmp_path: Path, hosts: list[Server]) -> None:
    made = bundle(tmp_path, name="all")
    assert [outcome.state for outcome in roll_out(hosts, made)] == ["updated"] * HOSTS
    assert [to.command("all", "x").stdout.strip() for to in hosts] == [tiny_gguf.ANSWER] * HOSTS
    assert [outcome.state for outcome in roll_out(hosts, made)] == ["unchanged"] * HOSTS


@needs_sshd
def test_a_canary_that_dies_saves_the_others(tmp_path: Path, hosts: list[Server]) -> None:
    roll_out(hosts, bundle(tmp_path, "1.0", "one", name="canary"))
    bad = bundle(tmp_path, "1.1", "two", name="canary", expected="three")
    outcomes = roll_out(hosts, bad)
    assert [outcome.state for outcome in outcomes] == ["failed", "untouched", "untouched"]
    assert "not 'three'" in (outcomes[0].error or "")
    assert [to.command("canary", "x").stdout.strip() for to in hosts] == ["one"] * HOSTS


@needs_sshd
@pytest.mark.parametrize(
    ("allowed", "states"), [(0, ["updated", "failed", "untouched"]), (1, ["updated", "failed", "updated"])]
)
def test_the_budget_of_failures(allowed: int, states: list[str], tmp_path: Path, hosts: list[Server]) -> None:
    gone = dataclasses.replace(hosts[1].device, port=1)
    rollout = Rollout(canary=1, parallel=1, failures=allowed)
    outcomes = roll_out(hosts, bundle(tmp_path, name=f"budget{allowed}"), rollout, host1=gone)
    assert [outcome.state for outcome in outcomes] == states


@needs_sshd
def test_the_command_and_an_inventory(tmp_path: Path, hosts: list[Server], capsys: pytest.CaptureFixture[str]) -> None:
    made, file = bundle(tmp_path, name="command"), inventory(tmp_path, hosts)
    assert main(["deploy", str(made), "--inventory", str(file), "--json"]) == 0
    outcomes = json.loads(capsys.readouterr().out)
    assert [(outcome["device"], outcome["state"]) for outcome in outcomes] == [
        (f"host{number}", "updated") for number in range(HOSTS)
    ]
    assert main(["deploy", "status", "--inventory", str(file), "--only", "host2", "--name", "command", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)[0]
    assert found["device"] == "host2"
    assert found["apps"][0]["current"] == outcomes[2]["id"]
    assert main(["deploy", "rollback", "command", "--inventory", str(file), "--only", "host0"]) == 2


def inventory(folder: Path, hosts: list[Server]) -> Path:
    lines = ["[rollout]", "canary = 1", "[defaults]", f'python = "{sys.executable}"']
    for to in hosts:
        lines += [f"[devices.{to.device.name}]", f'host = "{to.device.host}"', f"port = {to.device.port}"]
        lines += [f'identity = "{to.device.identity[0]}"', f'known_hosts = "{to.device.known_hosts}"']
    file = folder / "fleet.toml"
    file.write_text("\n".join(lines))
    return file


# --- Ansible ----------------------------------------------------------------


@needs_ansible
def test_a_playbook_that_ansible_accepts(tmp_path: Path) -> None:
    made = bundle(tmp_path, name="play")
    files = ansible.write(parcel.load(made), [parse("pi@192.0.2.1")], Rollout(), tmp_path / "out")
    assert "roles/edgeft_bundle/tasks/main.yml" in files
    assert len([name for name in files if "/blobs/" in name]) == len(parcel.load(made).files())
    shown = run_playbook(tmp_path / "out", "--syntax-check")
    assert shown.returncode == 0, shown.stdout + shown.stderr


@needs_sshd
@needs_ansible
@pytest.mark.slow
def test_ansible_deploys_what_is_missing(tmp_path: Path, hosts: list[Server]) -> None:
    roll_out(hosts[:2], bundle(tmp_path, "1.0", "one", name="play"))
    load, devices = parcel.load(bundle(tmp_path, "1.1", "two", name="play")), [to.device for to in hosts]
    ansible.write(load, devices, Rollout(), tmp_path / "out")
    for expected in ("changed=", "changed=0"):
        done = run_playbook(tmp_path / "out")
        assert done.returncode == 0, done.stdout + done.stderr
        assert expected in done.stdout.splitlines()[-2]
    assert [to.command("play", "x").stdout.strip() for to in hosts] == ["two"] * HOSTS
    bad = parcel.load(bundle(tmp_path, "1.2", "three", name="play", expected="four"))
    ansible.write(bad, devices, Rollout(), tmp_path / "bad")
    assert run_playbook(tmp_path / "bad").returncode != 0
    assert [to.command("play", "x").stdout.strip() for to in hosts] == ["two"] * HOSTS


def run_playbook(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    assert PLAYBOOK is not None
    environment = {**os.environ, "ANSIBLE_LOCALHOST_WARNING": "0", "ANSIBLE_HOME": str(folder.parent / "ansible")}
    return subprocess.run(
        [PLAYBOOK, "-i", folder / "inventory.ini", folder / "deploy.yml", *words],
        env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


# --- Inventories and addresses ----------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[devices", "cannot be read"),
        ("", "has no devices"),
        ("[device.a]", "unknown table 'device'"),
        ('[devices.a]\nhots = "x"', r"devices\.a\.hots is not allowed"),
        ('[devices.a]\nport = "22"', r"devices\.a\.port is not allowed"),
        ("[rollout]\ncanary = -1\n[devices.a]", r"rollout\.canary = -1 is not allowed"),
        ("[rollout]\nparallel = 0\n[devices.a]", r"rollout\.parallel = 0 is not allowed"),
    ],
)
def test_an_inventory_that_is_not_right(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "fleet.toml").write_text(text)
    with pytest.raises(ConfigError, match=said):
        fleet.read_inventory(tmp_path / "fleet.toml")


def test_an_inventory(tmp_path: Path) -> None:
    (tmp_path / "fleet.toml").write_text(
        '[rollout]\nparallel = 2\n[defaults]\nuser = "pi"\n[devices.hall]\n[devices.den]\nhost = "10.0.0.9"\nport = 23'
    )
    devices, rollout = fleet.read_inventory(tmp_path / "fleet.toml")
    assert devices == [Device("hall", "pi", name="hall"), Device("10.0.0.9", "pi", 23, name="den")]
    assert fleet.limited(rollout, canary=3, failures=None) == Rollout(3, 2, 0)
    assert fleet.only(devices, ["den"]) == devices[1:]
    with pytest.raises(UsageError, match="no device 'attic'"):
        fleet.only(devices, ["attic"])


@pytest.mark.parametrize(
    ("text", "device"),
    [
        ("hall", Device("hall")),
        ("pi@hall:2222", Device("hall", "pi", 2222)),
        ("pi@[2001:db8::1]:22", Device("2001:db8::1", "pi", 22)),
        ("a b", None),
        ("pi@", None),
        ("hall:x", None),
        ("", None),
    ],
)
def test_addresses(text: str, device: Device | None) -> None:
    if device:
        assert parse(text) == device
        return
    with pytest.raises(UsageError, match="is not the address of a device"):
        parse(text)


def test_no_address(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["deploy", str(bundle(tmp_path))]) == 2
    assert "which device?" in capsys.readouterr().err


def test_a_dry_run_reaches_nobody(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = bundle(tmp_path, name="dry")
    assert main(["deploy", str(made), "pi@192.0.2.1", "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["devices"] == ["192.0.2.1"]
