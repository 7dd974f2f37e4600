"""A cloud on a real socket that fails in every way a cloud can, and remembers each word it was sent."""

from __future__ import annotations

import contextlib
import json
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "sk-seeded-9f8e7d6c5b4a"
FAULTS = (
    "good",
    "good",
    "good",
    "slow-headers",
    "slow-tokens",
    "cut",
    "cut-early",
    "malformed",
    "wrong-json",
    "wrong-types",
    "empty",
    "huge",
    "401",
    "429",
    "429-long",
    "500",
    "503",
    "reset",
    "not-sse",
    "echo-key",
)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: FaultyCloud

    def log_message(self, *_: Any) -> None:
        pass

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers["Content-Length"]))
        with self.server.lock:
            self.server.wire.append(raw.decode())
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._fail(self.server.choose(), json.loads(raw))
        self.close_connection = True

    def _fail(self, fault: str, asked: dict[str, Any]) -> None:
        if fault in ("401", "429", "429-long", "500", "503", "echo-key"):
            after = {"429": "0.01", "429-long": "30"}.get(fault)
            status = 400 if fault == "echo-key" else int(fault.split("-")[0])
            return self._status(status, after)
        if fault == "reset":
            self.connection.shutdown(socket.SHUT_RDWR)
            return None
        if fault == "slow-headers":
            time.sleep(self.server.slow_s)
        if fault == "not-sse":
            return self._plain({"choices": [{"message": {"content": "whole"}, "finish_reason": "stop"}]})
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        return self._stream(fault, asked)

    def _stream(self, fault: str, asked: dict[str, Any]) -> None:
        odd = {
            "malformed": b"data: {not json\n\n",
            "wrong-json": b"data: [1, 2]\n\n",
            "wrong-types": b'data: {"choices": [{"delta": {"content": {"a": 1}}}]}\n\n',
        }
        if fault in odd:
            return self._raw(odd[fault])
        if fault == "cut-early":
            return None
        if fault == "empty":
            return self._end(0)
        pieces = self.server.answer(asked)
        for number, piece in enumerate(pieces):
            self._event({"choices": [{"delta": {"content": piece}}]})
            if fault == "slow-tokens":
                time.sleep(self.server.slow_s)
            if fault == "cut" and number == 1:
                return None
        if fault == "huge":
            with contextlib.suppress(OSError):
                while True:
                    self._event({"choices": [{"delta": {"content": "x" * 10_000}}]})
        return self._end(len(pieces))

    def _end(self, count: int) -> None:
        self._event({"choices": [{"delta": {}, "finish_reason": "stop"}]})
        self._event({"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": count}})
        self._raw(b"data: [DONE]\n\n")

    def _status(self, status: int, after: str | None) -> None:
        body = json.dumps({"error": {"message": f"no: {self.headers.get('Authorization')}"}}).encode()
        self.send_response(status)
        if after:
            self.send_header("Retry-After", after)
        self._body(body)

    def _plain(self, value: Any) -> None:
        self.send_response(200)
        self._body(json.dumps(value).encode())

    def _body(self, body: bytes) -> None:
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _event(self, value: Any) -> None:
        self._raw(f"data: {json.dumps(value)}\n\n".encode())

    def _raw(self, data: bytes) -> None:
        self.wfile.write(data)
        self.wfile.flush()


def four_words(asked: dict[str, Any]) -> list[str]:
    return ["the ", "cloud ", "says ", "so"]


class FaultyCloud(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, faults: tuple[str, ...], seed: int, slow_s: float) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.faults, self.random, self.slow_s = faults, random.Random(seed), slow_s
        self.lock = threading.Lock()
        self.wire: list[str] = []
        self.answer: Callable[[dict[str, Any]], list[str]] = four_words

    def choose(self) -> str:
        with self.lock:
            return self.random.choice(self.faults)

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


@contextlib.contextmanager
def faulty_cloud(*faults: str, seed: int = 0, slow_s: float = 0.6) -> Iterator[FaultyCloud]:
    server = FaultyCloud(faults or FAULTS, seed, slow_s)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
