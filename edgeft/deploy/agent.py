"""What runs on the device during a deployment: receives files, checks every chunk, installs, goes back.

The sender transmits this file as text and the device's Python runs it, so it needs the standard library alone. Requests
and answers are frames: four bytes of length (big endian), a JSON object, and as many bytes as its "bytes" key says.

    <root>/<name>/incoming/<sha256>.part    a file on its way; whole chunks only, checked again when it goes on
    <root>/<name>/incoming/<sha256>         a file that arrived
    <root>/<name>/incoming/bundle/          links to those files under their names: what the installer is given

It can also be called, as the Ansible role does: python3 agent.py REQUEST.json
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import IO, Any

IDLE_S = 120
"""A sender that is silent for so long is gone."""
BUSY_S = 90
"""How long to wait for another deployment, which may be this one's own broken connection."""
ANSWER_S = 300
_BLOCK = 1 << 20


class Refused(Exception):
    """What the sender is told: `kind` is one of its error types."""

    def __init__(self, kind: str, message: str, **more: Any) -> None:
        super().__init__(message)
        self.answer = dict(more, error=kind, message=message)


class Files:
    """The folders of one application on this device."""

    def __init__(self, root: str, name: str) -> None:
        if not name or name != os.path.basename(name) or name.startswith("."):
            raise Refused("usage", f"{name!r} is not a name")
        self.home = os.path.join(os.path.expanduser(root or default_root()), name)
        self.incoming = os.path.join(self.home, "incoming")
        self.name = name

    def blob(self, sha256: str) -> str:
        return os.path.join(self.home, "blobs", sha256)

    def arrived(self, sha256: str) -> str:
        return os.path.join(self.incoming, sha256)

    def source(self, sha256: str) -> str:
        """Where a file that is not missing lies."""
        return self.arrived(sha256) if os.path.isfile(self.arrived(sha256)) else self.blob(sha256)


def default_root() -> str:
    """Where `edgeft install` puts versions when it is not told."""
    home = os.environ.get("EDGEFT_HOME")
    if home:
        return os.path.join(os.path.expanduser(home), "apps")
    if sys.platform == "darwin":
        return os.path.expanduser("~/Library/Application Support/edgeft/apps")
    return os.path.join(os.environ.get("XDG_DATA_HOME") or os.path.expanduser("~/.local/share"), "edgeft", "apps")


# --- What is here -----------------------------------------------------------


def hello(request: dict[str, Any]) -> dict[str, Any]:
    """The machine, and the free space where bundles go, in bytes."""
    root = os.path.expanduser(request.get("root") or default_root())
    there = root
    while not os.path.isdir(there):
        there = os.path.dirname(there)
    return {
        "host": platform.node(),
        "architecture": platform.machine(),
        "python": f"{sys.version_info[0]}.{sys.version_info[1]}",
        "root": root,
        "free": shutil.disk_usage(there).free,
    }


def status(request: dict[str, Any]) -> dict[str, Any]:
    """What is installed, and what waits half transferred."""
    found = hello(request)
    names = sorted(os.listdir(found["root"])) if os.path.isdir(found["root"]) else []
    wanted = [name for name in names if request.get("name") in (None, name)]
    found["apps"] = [_app(Files(found["root"], name)) for name in wanted if not name.startswith(".")]
    return found


def _app(files: Files) -> dict[str, Any]:
    parts = os.listdir(files.incoming) if os.path.isdir(files.incoming) else []
    waiting = [os.path.join(files.incoming, name) for name in parts if not name.startswith(".")]
    return {
        "name": files.name,
        "current": current(files),
        "versions": _versions(files),
        "waiting": sum(os.path.getsize(path) for path in waiting if os.path.isfile(path)),
    }


def current(files: Files) -> str | None:
    """Id of the version in use."""
    link = os.path.join(files.home, "current")
    return os.path.basename(os.readlink(link)) if os.path.islink(link) else None


def _versions(files: Files) -> list[dict[str, Any]]:
    try:
        with open(os.path.join(files.home, "state.json"), encoding="utf-8") as stream:
            return list(json.load(stream)["versions"])
    except OSError:
        return []
    except (ValueError, KeyError) as error:
        raise Refused("model", f"state.json of {files.name} is damaged: {error}") from error


# --- Receiving --------------------------------------------------------------


def missing(files: Files, wanted: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of the wanted files that are not here whole; partial ones that nobody wants any more are removed."""
    os.makedirs(files.incoming, exist_ok=True)
    names = {entry["sha256"] for entry in wanted}
    for name in os.listdir(files.incoming):
        path = os.path.join(files.incoming, name)
        if os.path.isfile(path) and not name.startswith(".") and name.partition(".")[0] not in names:
            os.unlink(path)
    lacking = [entry for entry in wanted if not _is_whole(files, entry)]
    return [dict(entry, held=_size(files.arrived(entry["sha256"]) + ".part")) for entry in lacking]


def _is_whole(files: Files, entry: dict[str, Any]) -> bool:
    """A file of an earlier version may have rotted on its card, so its digest is computed again."""
    for path in (files.arrived(entry["sha256"]), files.blob(entry["sha256"])):
        if _size(path) == entry["bytes"] and os.path.isfile(path) and _digest(path) == entry["sha256"]:
            return True
    with contextlib.suppress(FileNotFoundError):
        os.unlink(files.arrived(entry["sha256"]))
    return False


def _size(path: str) -> int:
    return os.path.getsize(path) if os.path.exists(path) else 0


def _digest(path: str) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        for block in iter(lambda: stream.read(_BLOCK), b""):
            digest.update(block)
    return digest.hexdigest()


class Receiver:
    """One file on its way. Only chunks whose digest is right are ever written."""

    def __init__(self, files: Files, request: dict[str, Any]) -> None:
        self.files, self.sha256 = files, str(request["sha256"])
        self.digests, self.chunk = list(request["digests"]), int(request["chunk"])
        self.executable = bool(request["executable"])
        self.path = files.arrived(self.sha256) + ".part"
        self.whole = hashlib.sha256()
        self.stream = open(self.path, "a+b")  # noqa: SIM115 - open as long as chunks come
        self.good = self._held()

    def _held(self) -> int:
        """How many chunks are here already; what comes behind the last good one is cut off."""
        self.stream.seek(0)
        for index, digest in enumerate(self.digests):
            block = self.stream.read(self.chunk)
            if hashlib.sha256(block).hexdigest() != digest:
                self.stream.truncate(index * self.chunk)
                return index
            self.whole.update(block)
        return len(self.digests)

    def take(self, index: int, payload: bytes) -> None:
        """Append a chunk. Raises: Refused when it is not the next one or not what was announced."""
        if index != self.good:
            raise Refused("chunk", f"chunk {index} of {self.sha256[:12]} came, {self.good} was next", next=self.good)
        if hashlib.sha256(payload).hexdigest() != self.digests[index]:
            raise Refused("chunk", f"chunk {index} of {self.sha256[:12]} is damaged", next=self.good)
        try:
            self.stream.write(payload)
            self.stream.flush()
        except OSError as error:
            self._give_up(error)
        self.whole.update(payload)
        self.good += 1

    def _give_up(self, error: OSError) -> None:
        if error.errno != errno.ENOSPC:
            raise error
        with contextlib.suppress(OSError):
            self.stream.close()
        os.unlink(self.path)
        raise Refused("space", f"no space left in {self.files.home}") from error

    def finish(self) -> None:
        """Raises: Refused when all chunks together are not the file of that digest."""
        os.fsync(self.stream.fileno())
        self.stream.close()
        if self.good != len(self.digests) or self.whole.hexdigest() != self.sha256:
            os.unlink(self.path)
            raise Refused("model", f"{self.sha256[:12]} is not the file that was announced")
        os.chmod(self.path, 0o555 if self.executable else 0o444)
        os.replace(self.path, self.files.arrived(self.sha256))


# --- Installing -------------------------------------------------------------


def install(files: Files, request: dict[str, Any]) -> dict[str, Any]:
    """Put the bundle together, run its installer, and ask the command the question once it is the one in use.

    The installer checks everything again, asks the question before it switches, and leaves the version in use alone
    when anything is wrong. If the command does not answer after the switch, this goes back.
    """
    before = current(files)
    folder = assemble(files, request)
    done = _run_installer(folder, files, request)
    if done["code"]:
        raise Refused("install", "the installer refused it", code=done["code"], said=done["said"], current=before)
    shutil.rmtree(files.incoming, ignore_errors=True)
    result = dict(json.loads(done["out"]), before=before)
    if request["ask"]:
        problem, answer = ask(str(result["launcher"]), request["question"], request["expected"])
        if problem:
            back = _undo(files, before)
            raise Refused("answer", problem, current=current(files), rolled_back=back)
        result["answer"] = answer
    return result


def assemble(files: Files, request: dict[str, Any]) -> str:
    """The bundle's folder, made of links: no second copy of anything."""
    folder = os.path.join(files.incoming, "bundle")
    shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(folder)
    os.makedirs(os.path.join(files.home, "blobs"), exist_ok=True)
    _write(os.path.join(folder, "bundle.json"), request["manifest"])
    if request["signature"]:
        _write(os.path.join(folder, "bundle.json.sig"), request["signature"])
    for entry in json.loads(request["manifest"])["files"]:
        place = os.path.normpath(os.path.join(folder, entry["path"]))
        if not place.startswith(folder + os.sep):
            raise Refused("model", f"{entry['path']!r} is not a path inside the bundle")
        os.makedirs(os.path.dirname(place), exist_ok=True)
        _link(files.source(entry["sha256"]), place)
        if not _is_blob(files, entry):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(files.blob(entry["sha256"]))
            _link(files.source(entry["sha256"]), files.blob(entry["sha256"]))
    return folder


def _is_blob(files: Files, entry: dict[str, Any]) -> bool:
    """What arrived goes before a blob of that name, which then was damaged."""
    return not os.path.isfile(files.arrived(entry["sha256"])) and os.path.isfile(files.blob(entry["sha256"]))


def _write(path: str, text: str) -> None:
    with open(path, "wb") as stream:
        stream.write(text.encode())


def _link(source: str, place: str) -> None:
    try:
        os.link(source, place)
    except OSError:  # FAT and some network disks have no links
        shutil.copy2(source, place)


def _run_installer(folder: str, files: Files, request: dict[str, Any]) -> dict[str, Any]:
    """In a session of its own: a connection that breaks now does not end it."""
    command = ["sh", os.path.join(folder, "install.sh"), "--json", "--root", os.path.dirname(files.home)]
    command += [str(word) for word in request["arguments"]]
    done = subprocess.run(
        command,
        env=dict(os.environ, PYTHON=sys.executable),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        start_new_session=True,
        check=False,
    )
    return {"code": done.returncode, "out": done.stdout.decode(), "said": done.stderr.decode(errors="replace")}


def ask(launcher: str, question: str, expected: str | None) -> tuple[str | None, str]:
    """Ask the installed command; returns what is wrong, if anything is, and the answer."""
    try:
        done = subprocess.run(
            [launcher, question],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=ANSWER_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{launcher} does not answer: {error}", ""
    answer = done.stdout.decode(errors="replace").strip()
    if done.returncode:
        said = (done.stderr.decode(errors="replace").strip().splitlines() or ["it said nothing"])[-1]
        return f"{launcher} does not answer: {said}", ""
    if not answer or (expected is not None and not answer.startswith(expected)):
        return f"asked {question!r}, {launcher} said {answer!r}" + (f", not {expected!r}" if expected else ""), answer
    return None, answer


def _undo(files: Files, before: str | None) -> bool:
    """Back to the version that was in use, as the installer switches: by replacing the link in one step."""
    if before is None or not os.path.isdir(os.path.join(files.home, "versions", before)):
        return False
    point(files, before)
    return True


def point(files: Files, identifier: str) -> None:
    with open(os.path.join(files.home, ".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        temporary = os.path.join(files.home, ".current.tmp")
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        os.symlink(os.path.join("versions", identifier), temporary)
        os.replace(temporary, os.path.join(files.home, "current"))


def rollback(files: Files) -> dict[str, Any]:
    """To the version installed before the one in use; works although that one may be broken."""
    now, ids = current(files), [version["id"] for version in _versions(files)]
    at = ids.index(now) if now in ids else 0
    if at == 0:
        raise Refused("usage", f"{files.name} has no version before {now}")
    point(files, ids[at - 1])
    return {"name": files.name, "current": ids[at - 1], "before": now}


# --- Requests ---------------------------------------------------------------


class Agent:
    """Answers one connection."""

    def __init__(self) -> None:
        self.files: Files | None = None
        self.receiver: Receiver | None = None
        self.lock: IO[str] | None = None

    def answer(self, request: dict[str, Any], payload: bytes) -> dict[str, Any]:
        """Raises: Refused, OSError."""
        do = request["do"]
        if do in ("hello", "status"):
            return hello(request) if do == "hello" else status(request)
        if do in ("missing", "rollback") or self.files is None:
            self.open(request)
        assert self.files is not None
        if do == "missing":
            lacking = missing(self.files, request["files"])
            return {"missing": lacking, "incoming": self.files.incoming, "current": current(self.files)}
        if do == "rollback":
            return rollback(self.files)
        if do == "install":
            return install(self.files, request)
        return self._receive(do, request, payload)

    def _receive(self, do: str, request: dict[str, Any], payload: bytes) -> dict[str, Any]:
        if do == "begin":
            assert self.files is not None
            self.receiver = Receiver(self.files, request)
            return {"next": self.receiver.good}
        assert self.receiver is not None
        if do == "chunk":
            self.receiver.take(request["index"], payload)
        elif do == "finish":
            self.receiver.finish()
        else:
            raise Refused("usage", f"unknown request {do!r}")
        return {}

    def open(self, request: dict[str, Any]) -> None:
        """Take the application for this connection. Raises: Refused when another one holds it."""
        self.files = Files(request.get("root") or "", request["name"])
        if request["do"] == "rollback" and not os.path.isdir(self.files.home):
            raise Refused("usage", f"no {self.files.name!r} is installed on {platform.node()}")
        os.makedirs(self.files.incoming, exist_ok=True)
        self.lock = open(os.path.join(self.files.home, ".deploy"), "w")  # noqa: SIM115 - held until the end
        for _ in range(BUSY_S * 10):
            try:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                time.sleep(0.1)
        raise Refused("busy", f"another deployment of {self.files.name} is running")


def serve(requests: IO[bytes], answers: IO[bytes]) -> None:
    """Until the sender hangs up."""
    agent = Agent()
    for request, payload in frames(requests):
        signal.alarm(0)
        try:
            value = agent.answer(request, payload)
        except Refused as error:
            value = error.answer
        except OSError as error:
            kind = "space" if error.errno == errno.ENOSPC else "write"
            value = {"error": kind, "message": f"{error.strerror}: {error.filename}"}
        header = json.dumps(value).encode()
        answers.write(len(header).to_bytes(4, "big") + header)
        answers.flush()


def frames(stream: IO[bytes]) -> Iterator[tuple[dict[str, Any], bytes]]:
    while True:
        head = _exactly(stream, 4)
        if head is None:
            return
        header = _exactly(stream, int.from_bytes(head, "big"))
        request = json.loads(header or b"{}")
        payload = _exactly(stream, request.get("bytes", 0)) if header else None
        if payload is None:
            return
        yield request, payload


def _exactly(stream: Any, count: int) -> bytes | None:
    """`count` bytes, or None at the end of the stream."""
    parts = []
    while count:
        signal.alarm(IDLE_S)
        part = stream.read1(count)
        if not part:
            return None
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def main(arguments: list[str]) -> int:
    """With files of requests: answer each, as JSON lines. Without: serve."""
    if not arguments:
        serve(sys.stdin.buffer, sys.stdout.buffer)
        return 0
    agent = Agent()
    for name in arguments:
        with open(name, encoding="utf-8") as stream:
            request = json.load(stream)
        try:
            print(json.dumps(agent.answer(request, b"")))
        except Refused as error:
            print(json.dumps(error.answer))
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
