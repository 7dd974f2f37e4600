"""The connection to a device: SSH with checked host keys, and requests to the agent that runs at its other end."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.resources
import json
import re
import shlex
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeft.errors import CheckFailed, EdgeftError, ModelError, Unreachable, UsageError, WriteError, require

_ADDRESS = re.compile(r"(?:(?P<user>[^@\s]+)@)?(?P<host>\[[^\]\s]+\]|[^:@\s]+)(?::(?P<port>\d{1,5}))?")
_KNOWN_HOSTS = ("~/.ssh/known_hosts", "~/.ssh/known_hosts2", "/etc/ssh/ssh_known_hosts")
_SILENT_S = 15
"""Seconds between signs of life; three without an answer end the connection."""


@dataclass(frozen=True)
class Device:
    """Where a device is and how to get in."""

    host: str
    user: str | None = None
    port: int | None = None
    identity: tuple[Path, ...] = ()
    """Private keys; without, the SSH agent's and those in ~/.ssh."""
    known_hosts: Path | None = None
    """Trusted host keys; default: where OpenSSH keeps them."""
    python: str | None = None
    """Interpreter on the device."""
    name: str = ""
    """What an inventory calls it."""
    root: str | None = None
    """Where versions go on it; default: edgeft's data folder."""
    bin: str | None = None
    timeout: float = 20.0
    """Seconds until a connection must stand."""

    @property
    def label(self) -> str:
        return self.name or self.host


def parse(text: str, **more: Any) -> Device:
    """`user@host`, `host`, `user@host:port`, `user@[2001:db8::1]:port`. Raises: UsageError."""
    found = _ADDRESS.fullmatch(text)
    if not found:
        raise UsageError(f"{text!r} is not the address of a device", "user@host, or user@host:port.")
    port = int(found["port"]) if found["port"] else None
    return Device(found["host"].strip("[]"), found["user"], port, **more)


class Link:
    """A running agent."""

    def __init__(self, device: Device, process: Any) -> None:
        self.device = device
        self._process = process

    async def call(self, do: str, **request: Any) -> dict[str, Any]:
        """Ask and wait for the answer. Raises: what the agent's refusal stands for, Unreachable."""
        await self.write(do, **request)
        return checked(self.device, await self.read())

    async def write(self, do: str, payload: bytes = b"", **request: Any) -> None:
        header = json.dumps({**request, "do": do, "bytes": len(payload)}).encode()
        try:
            self._process.stdin.write(len(header).to_bytes(4, "big") + header + payload)
            await self._process.stdin.drain()
            await asyncio.sleep(0)  # drain alone does not let the loop notice that the connection is gone
        except OSError as error:  # asyncssh: the channel is closed
            raise _lost(self.device, error) from error

    async def read(self) -> dict[str, Any]:
        try:
            head = await self._process.stdout.readexactly(4)
            answer: dict[str, Any] = json.loads(await self._process.stdout.readexactly(int.from_bytes(head, "big")))
            return answer
        except asyncio.IncompleteReadError as error:
            raise await self._ended() from error
        except OSError as error:
            raise _lost(self.device, error) from error

    async def _ended(self) -> EdgeftError:
        """Why nothing more comes: the connection broke, or the agent did."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._process.wait_closed(), 5)
        if not self._process.exit_status:
            return _lost(self.device, "the connection broke")
        said = (await self._process.stderr.read()).decode(errors="replace").strip().splitlines()
        return EdgeftError(
            f"{self.device.label}: Python could not be run there: {(said or ['it said nothing'])[-1]}",
            "A device needs sh and Python; name another with --python.",
        )


@contextlib.asynccontextmanager
async def connected(device: Device, pythons: Sequence[str] = ("python3",)) -> AsyncIterator[Link]:
    """Log in and start the agent.

    Args:
        pythons: interpreters to look for, best first.

    Raises:
        CheckFailed: the host key is unknown or another one.
        Unreachable: no connection, or it was lost. EdgeftError: not let in. MissingDependency.
    """
    ssh: Any = require("asyncssh", "deploy")
    source = importlib.resources.files("edgeft.deploy").joinpath("agent.py").read_bytes()
    try:
        async with await _connect(ssh, device) as connection:
            command = _command([device.python] if device.python else pythons, len(source))
            process = await connection.create_process(command, encoding=None)
            process.stdin.write(source)
            yield Link(device, process)
    except ssh.HostKeyNotVerifiable as error:
        raise await _host_key_problem(ssh, device) from error
    except ssh.PermissionDenied as error:
        raise EdgeftError(
            f"{device.label} does not let {device.user or 'this user'} in: {error.reason}",
            "Put your public key into ~/.ssh/authorized_keys there; name the private one with --identity.",
        ) from error
    except ssh.KeyEncryptionError as error:
        raise UsageError(f"the key for {device.label} is locked with a passphrase", "Load it: ssh-add FILE.") from error
    except ssh.KeyImportError as error:
        raise UsageError(f"the key for {device.label} cannot be used: {error}") from error
    except (ssh.Error, OSError) as error:
        raise _lost(device, error) from error


def _command(pythons: Sequence[str], length: int) -> str:
    find = " || ".join(f"command -v {shlex.quote(python)}" for python in pythons)
    # Isolated: nothing of the user's environment or packages gets into the agent.
    run = f"import sys;exec(compile(sys.stdin.buffer.read({length}),'agent','exec'))"
    return "exec sh -c " + shlex.quote(f'python=$({find}) && exec "$python" -I -S -c {shlex.quote(run)}')


async def _connect(ssh: Any, device: Device) -> Any:
    options: dict[str, Any] = {}
    if device.user:
        options["username"] = device.user
    if device.port:
        options["port"] = device.port
    if device.identity:
        options |= {"client_keys": [str(path.expanduser()) for path in device.identity], "agent_path": None}
    return await ssh.connect(
        device.host,
        known_hosts=_known_hosts(device),
        preferred_auth="publickey",
        connect_timeout=device.timeout,
        keepalive_interval=_SILENT_S,
        **options,
    )


def _known_hosts(device: Device) -> Any:
    """Files, always given: without any, asyncssh may be told by ~/.ssh/config to accept whatever comes."""
    if device.known_hosts:
        if not device.known_hosts.expanduser().is_file():
            raise UsageError(f"{device.known_hosts} does not exist", "--known-hosts names a file as ssh writes it.")
        return [str(device.known_hosts.expanduser())]
    there = [path for path in (Path(name).expanduser() for name in _KNOWN_HOSTS) if path.is_file()]
    return [str(path) for path in there] or b""


async def _host_key_problem(ssh: Any, device: Device) -> CheckFailed:
    """Unknown, or not the one that is known."""
    with contextlib.suppress(ssh.Error, OSError, ValueError, TimeoutError):
        place = {"port": device.port} if device.port else {}
        key = await asyncio.wait_for(ssh.get_server_host_key(device.host, **place), device.timeout)
        known = ssh.match_known_hosts(_known_hosts(device), device.host, "", device.port)
        if known[0]:
            return CheckFailed(
                f"{device.label} shows another host key than the known one: {key.get_fingerprint()}",
                "If the device was set up anew, remove the old key: ssh-keygen -R. Else somebody is in between.",
            )
        return CheckFailed(
            f"the host key of {device.label} is not known: {key.get_fingerprint()}",
            "Compare it with the device's own (ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub there), then log in "
            "once with ssh, which stores it.",
        )
    return CheckFailed(f"the host key of {device.label} is not known", "Log in once with ssh and compare it.")


def _lost(device: Device, why: object) -> Unreachable:
    said = str(why) or type(why).__name__
    return Unreachable(f"{device.label} cannot be reached: {said}", "What was transferred is kept; run it again.")


_KINDS = {
    "usage": UsageError,
    "space": WriteError,
    "write": WriteError,
    "model": ModelError,
    "chunk": ModelError,
    "busy": Unreachable,
    "answer": CheckFailed,
}


def checked(device: Device, answer: dict[str, Any]) -> dict[str, Any]:
    """The answer, or the error that it is."""
    if "error" not in answer:
        return answer
    if answer["error"] == "install":
        raise _install_error(device, answer)
    message = f"{device.label}: {answer['message']}"
    if answer["error"] == "answer":
        back = f"back to {answer['current']}" if answer["rolled_back"] else "there was no version to go back to"
        raise CheckFailed(f"{message}; {back}", "Look at the model: edgeft verify.")
    raise _KINDS.get(answer["error"], EdgeftError)(message)


def _install_error(device: Device, answer: dict[str, Any]) -> EdgeftError:
    """The installer's last error line and hint, with the type its exit code stands for."""
    lines = [line for line in answer["said"].splitlines() if line.strip()] or ["error: it said nothing"]
    at = max((index for index, line in enumerate(lines) if line.startswith("error: ")), default=len(lines) - 1)
    kind = {2: UsageError, 5: CheckFailed}.get(answer["code"], EdgeftError)
    hint = lines[at + 1].strip() if at + 1 < len(lines) else None
    return kind(f"{device.label}: {lines[at].removeprefix('error: ')}", hint)
