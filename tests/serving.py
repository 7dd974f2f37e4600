"""A real `edgeft serve` in a process of its own, for tests and benchmarks."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit


@dataclass
class Serving:
    url: str
    """Without /v1."""
    process: subprocess.Popen[bytes]
    errors: Path
    """What the server wrote on stderr."""

    def ask(
        self, path: str, body: Any = None, headers: Mapping[str, str] | None = None, timeout: float = 30
    ) -> tuple[int, Any, Mapping[str, str]]:
        """One request: GET without a body. Status, JSON or text, headers."""
        connection = http.client.HTTPConnection(urlsplit(self.url).netloc, timeout=timeout)
        with contextlib.closing(connection):
            data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
            kind = {"Content-Type": "application/json"} if body is not None else {}
            connection.request("GET" if body is None else "POST", path, data, {**kind, **(headers or {})})
            response = connection.getresponse()
            text = response.read().decode()
            found = {name.lower(): value for name, value in response.getheaders()}
            return response.status, json.loads(text) if "json" in found.get("content-type", "") else text, found

    def chat(self, text: str, model: str = "echo", **more: Any) -> tuple[int, Any, Mapping[str, str]]:
        body = {"model": model, "messages": [{"role": "user", "content": text}], **more}
        return self.ask("/v1/chat/completions", body)

    @contextlib.contextmanager
    def stream(self, text: str, model: str = "echo", **more: Any) -> Iterator[Iterator[dict[str, Any]]]:
        """Events of a streamed answer; leaving early closes the connection."""
        connection = http.client.HTTPConnection(urlsplit(self.url).netloc, timeout=60)
        body = {"model": model, "messages": [{"role": "user", "content": text}], "stream": True, **more}
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        assert response.status == 200, response.read()
        try:
            yield _events(response)
        finally:
            response.close()
            connection.close()

    def events(self) -> list[dict[str, Any]]:
        """The lines of the log so far."""
        return [json.loads(line) for line in self.errors.read_text().splitlines() if line.startswith("{")]

    def worker(self) -> int:
        """Process id of the model."""
        found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(self.process.pid)], capture_output=True, text=True)
        return int(found.stdout.split()[0])

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(30)


def _events(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    for line in response:
        if line.startswith(b"data: ") and line.strip() != b"data: [DONE]":
            yield json.loads(line[6:])


def text_of(events: Iterator[dict[str, Any]]) -> str:
    return "".join(event["choices"][0]["delta"].get("content") or "" for event in events if event.get("choices"))


@contextlib.contextmanager
def serving(folder: Path, *arguments: str, **environment: str) -> Iterator[Serving]:
    """Run `edgeft serve` with these arguments on a free port, until it is left."""
    errors = folder / "stderr.txt"
    command = [sys.executable, "-m", "edgeft", "serve", *arguments, "--port", "0", "--log", str(folder / "log.sqlite")]
    with errors.open("wb") as stderr:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=stderr, env={**os.environ, **environment}, cwd=folder
        )
    assert process.stdout is not None
    line = process.stdout.readline().decode().strip()
    if not line:
        process.wait()
        process.stdout.close()
        raise RuntimeError(errors.read_text())
    try:
        yield Serving(line.removesuffix("/v1"), process, errors)
    finally:
        if process.poll() is None:
            process.terminate()
        try:
            process.wait(40)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()
