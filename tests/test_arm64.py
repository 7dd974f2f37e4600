"""A Raspberry Pi 5's bundle, installed and asked in an arm64 Debian under qemu-user, without a network.

What is proven: wheels, installer and cross-compiled kernels work on that processor and give the answers this
machine gives. How fast they are cannot be seen under emulation. Run by `make test-arm64`; the first time it fetches
Debian packages and wheels and compiles llama.cpp.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgeft.package import build, cross_build, kernels
from edgeft.package.target import target_of

RUN = Path(os.environ.get("EDGEFT_TEST_RUN", Path(__file__).parent.parent / "demo" / "run"))
"""A trained run of SmolLM2-135M, such as `edgeft demo` leaves."""
QUESTIONS = (
    "kitchen light off",
    "set the bedroom heater to 21 degrees",
    "hey there, i'd like the fan at ninety percent",
    "flip the garage lights off in fifty five minutes",
    "i'd like you to close my bank account",
)
BINFMT = Path("/proc/sys/fs/binfmt_misc")
QEMU = Path("/usr/lib/binfmt.d/qemu-aarch64.conf")
_USER = 1000
ILLEGAL = (-signal.SIGILL, 128 + signal.SIGILL)
"""How a process ends that meets an instruction its processor lacks: itself, and as a shell reports it."""
PACKAGES = "python3,dash,coreutils,libstdc++6"

pytestmark = [
    pytest.mark.arm64,
    pytest.mark.slow,
    pytest.mark.model,
    pytest.mark.skipif(os.geteuid() != 0, reason="only root may enter another system"),
    pytest.mark.skipif(
        shutil.which("mmdebstrap") is None or not QEMU.is_file(),
        reason="apt-get install qemu-user-static mmdebstrap",
    ),
    pytest.mark.skipif(bool(cross_build.missing_tools()), reason="apt-get install g++-aarch64-linux-gnu cmake"),
    pytest.mark.skipif(
        not (RUN / "adapter").is_dir(), reason=f"no run {RUN}: edgeft demo makes it; another: EDGEFT_TEST_RUN"
    ),
]


@pytest.fixture(scope="module")
def debian(cache: Path) -> Path:
    """The system of a Raspberry Pi 5's profile: Debian 13 with Python and nothing else; unpacked, never configured."""
    folder = cache / "debian-13-arm64"
    if not (folder / "usr" / "bin" / "python3.13").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run(
            ["mmdebstrap", "--quiet", "--mode=root", "--architectures=arm64", "--variant=extract",
             f"--include={PACKAGES}", "trixie", folder],
            check=True,
        )  # fmt: skip
        for name in ("bin", "sbin", "lib"):
            (folder / name).symlink_to(f"usr/{name}")
    return folder


@pytest.fixture(scope="module")
def emulated() -> Iterator[None]:
    """The kernel runs arm64 programs by qemu, as long as the tests run."""
    if not (BINFMT / "register").exists():
        subprocess.run(["mount", "-t", "binfmt_misc", "binfmt_misc", BINFMT], check=True)
    ours = not (BINFMT / "qemu-aarch64").exists()
    if ours:
        (BINFMT / "register").write_text(QEMU.read_text().strip())
    yield
    if ours:
        (BINFMT / "qemu-aarch64").write_text("-1")


@pytest.fixture(scope="module")
def wheel(cache: Path) -> cross_build.Built:
    march = "armv8.2-a+dotprod"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEFT_HOME", str(cache / "home"))
        return cross_build.cached(march) or cross_build.build(march)


@pytest.fixture(scope="module")
def answers(bundle: Path) -> list[str]:
    """What this machine says, greedily."""
    return [_said([sys.executable, "-m", "edgeft", "run", bundle, question]) for question in QUESTIONS]


@pytest.fixture(scope="module")
def bundle(cache: Path, wheel: cross_build.Built, smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Base and adapter for a Raspberry Pi 5, with the wheel that `edgeft package` finds in the cache."""
    folder = tmp_path_factory.mktemp("pi5")
    adapter = folder / "smart-home.gguf"
    export = [sys.executable, "-m", "edgeft", "export", RUN, "--to", "gguf-lora-f16", "--no-verify", "--out", adapter]
    subprocess.run(export, check=True)
    request = build.Request(
        smollm2_gguf, target_of("rpi5"), "smart-home", "1.0", adapters=(adapter,), question=QUESTIONS[0]
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEFT_HOME", str(cache / "home"))
        build.build(request, folder / "bundle")
    return folder / "bundle"


def _said(command: list[object], **options: object) -> str:
    done = subprocess.run(
        [*map(str, command), "--temperature", "0", "--max-tokens", "64", "--json"],
        capture_output=True, text=True, check=True, **options,
    )  # type: ignore[call-overload]  # fmt: skip
    return str(json.loads(done.stdout.splitlines()[-1])["text"])


def inside(debian: Path, *command: object, cpu: str = "cortex-a76") -> subprocess.CompletedProcess[str]:
    """Run as an ordinary user of the arm64 system, in a network namespace with nothing but a loopback that is down."""
    words = ["unshare", "--net", "chroot", f"--userspec={_USER}:{_USER}", debian]
    environment = {"PATH": "/usr/bin:/usr/sbin", "HOME": "/home/pi", "QEMU_CPU": cpu, "LANG": "C.UTF-8"}
    return subprocess.run(
        [*map(str, words), *map(str, command)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )


@pytest.fixture(scope="module")
def installed(debian: Path, emulated: None, bundle: Path) -> Iterator[Path]:
    """The bundle, copied onto the device and installed by its own script."""
    home = debian / "home" / "pi"
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True)
    (debian / "tmp").chmod(0o1777)
    shutil.copytree(bundle, home / "bundle")
    for path in (home, *home.rglob("*")):
        os.chown(path, _USER, _USER, follow_symlinks=False)
    done = inside(debian, "sh", "/home/pi/bundle/install.sh", "--json")
    assert done.returncode == 0, done.stderr
    yield home
    shutil.rmtree(home)


def test_the_kernels_are_in_the_bundle(bundle: Path, wheel: cross_build.Built) -> None:
    shipped = bundle / "wheels" / wheel.wheel.name
    found = kernels.scan(shipped)
    assert found["sdot"] > 1000
    assert found == wheel.kernels
    assert not list(bundle.glob("wheels/xllamacpp*"))


def test_it_is_another_processor_without_a_network(debian: Path, emulated: None) -> None:
    assert inside(debian, "uname", "-m").stdout.strip() == "aarch64"
    # An address that belongs to nobody (RFC 5737): where there is a network, the attempt ends by the clock instead.
    reach = "import socket; socket.create_connection(('192.0.2.1', 80), 5)"
    assert "Network is unreachable" in inside(debian, "python3", "-c", reach).stderr


def test_the_device_gives_the_answers_of_this_machine(debian: Path, installed: Path, answers: list[str]) -> None:
    command = ["/usr/bin/python3", "-s", "-m", "edgeft", "run", "/home/pi/.local/share/edgeft/apps/smart-home/current"]
    site = "/home/pi/.local/share/edgeft/apps/smart-home/current/.site"
    found = []
    for question in QUESTIONS:
        options = ["--temperature", "0", "--max-tokens", "64", "--json"]
        done = inside(debian, "env", f"PYTHONPATH={site}", *command, question, *options)
        assert done.returncode == 0, done.stderr
        value = json.loads(done.stdout.splitlines()[-1])
        assert value["runtime"] == "llama-cpp-python"
        found.append(value["text"])
    assert found == answers
    assert json.loads(found[0]) == {"device": "light", "action": "off", "value": None, "room": "kitchen", "time": None}


def test_the_installed_command_answers(debian: Path, installed: Path, answers: list[str]) -> None:
    done = inside(debian, "/home/pi/.local/bin/smart-home", QUESTIONS[0])
    assert done.stdout.strip() == answers[0], done.stderr


def test_an_older_processor_would_not_run_these_kernels(debian: Path, installed: Path) -> None:
    """A Raspberry Pi 4 has no dot products: what the scan counts is what runs, and it is that which ends the program.

    Everything else must work there, or any error would do: the same bundle, asked for its help, runs no kernel.
    """
    program = "/home/pi/.local/bin/smart-home"
    assert inside(debian, program, "--help", cpu="cortex-a72").returncode == 0
    done = inside(debian, program, QUESTIONS[0], cpu="cortex-a72")
    assert done.returncode in ILLEGAL, done.stderr
    assert done.stdout == ""
