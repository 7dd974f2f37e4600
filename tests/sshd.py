"""A real OpenSSH server on loopback with its own keys and folders, and a cable that can be cut."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import select
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from edgeft.deploy.link import Device

SSHD = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
needs_sshd = pytest.mark.skipif(SSHD is None, reason="the OpenSSH server is not installed")


@dataclasses.dataclass(frozen=True)
class Server:
    """A device: what logs in gets `home` as its home and edgeft folder."""

    device: Device
    home: Path
    process: subprocess.Popen[bytes]

    @property
    def root(self) -> Path:
        return self.home / "edgeft" / "apps"

    def command(self, name: str, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([self.home / ".local/bin" / name, *words], capture_output=True, text=True, timeout=60)

    def through(self, port: int) -> Device:
        return dataclasses.replace(self.device, port=port)


@contextlib.contextmanager
def server(folder: Path, *, address: str = "127.0.0.1", inside: Sequence[str] = ()) -> Iterator[Server]:
    """Start sshd as the user who runs the tests; `inside` runs it elsewhere, such as `ip netns exec`."""
    assert SSHD is not None
    home = folder / "home"
    home.mkdir(parents=True)
    for name in ("host_key", "client_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    (folder / "authorized_keys").write_text((folder / "client_key.pub").read_text())
    (folder / "known_hosts").write_text(f"* {(folder / 'host_key.pub').read_text()}")
    port = free_port(address if not inside else "127.0.0.1")
    (folder / "sshd_config").write_text(
        f"ListenAddress {address}\nPort {port}\nHostKey {folder}/host_key\n"
        f"AuthorizedKeysFile {folder}/authorized_keys\nPidFile none\nStrictModes no\nUsePAM no\n"
        f"PasswordAuthentication no\nKbdInteractiveAuthentication no\nMaxStartups 100\n"
        f"SetEnv HOME={home} EDGEFT_HOME={home}/edgeft\n"
    )
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # where sshd started by root wants to be
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([*inside, SSHD, "-D", "-e", "-f", folder / "sshd_config"], stderr=log)
    try:
        device = Device(address, None, port, (folder / "client_key",), folder / "known_hosts", python=sys.executable)
        _wait_until_open(address, port, process, folder / "log")
        yield Server(device, home, process)
    finally:
        process.terminate()
        process.wait()


def free_port(address: str) -> int:
    with socket.socket() as probe:
        probe.bind((address, 0))
        return int(probe.getsockname()[1])


def _wait_until_open(address: str, port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(200):
        with contextlib.suppress(OSError), socket.create_connection((address, port), 1):
            return
        assert process.poll() is None, log.read_text()
        time.sleep(0.05)
    raise AssertionError(log.read_text())


class Cable:
    """Forwards to a port; cuts each connection after so many bytes towards the device, then forwards all."""

    def __init__(self, address: str, port: int, cuts: Sequence[int] = ()) -> None:
        self.target, self.cuts = (address, port), list(cuts)
        self.sent = 0
        self.connections = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                left = self.cuts.pop(0) if self.cuts else None
                self.connections += 1
                threading.Thread(target=self._forward, args=(near, left), daemon=True).start()

    def _forward(self, near: socket.socket, left: int | None) -> None:
        with contextlib.suppress(OSError), near, socket.create_connection(self.target) as far:
            while True:
                for end in select.select([near, far], [], [])[0]:
                    data = end.recv(16384)
                    if not data:
                        return
                    if end is far:
                        near.sendall(data)
                        continue
                    part = data if left is None else data[:left]
                    far.sendall(part)
                    self.sent += len(part)
                    left = None if left is None else left - len(part)
                    if left == 0:
                        return


@contextlib.contextmanager
def cable(to: Server, cuts: Sequence[int] = ()) -> Iterator[Cable]:
    assert to.device.port is not None
    made = Cable(to.device.host, to.device.port, cuts)
    try:
        yield made
    finally:
        made.close()


def random_cuts(count: int, least: int, most: int, seed: int = 7) -> list[int]:
    generator = random.Random(seed)
    return [generator.randint(least, most) for _ in range(count)]
