"""`llama-server`: llama.cpp's own server, as a child process on this machine or one that already runs.

A child is started for a GGUF from the program that `EDGEFT_LLAMA_SERVER` names, or `llama-server` on PATH; it listens
on loopback, wants a key that only this process knows, and ends with the session. A URL names a running server:
`--runtime llama-server http://127.0.0.1:8080`.
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from edgeft.artifact import Artifact
from edgeft.errors import EdgeftError, MissingDependency, ModelError, Unreachable, UsageError
from edgeft.plugins import LOADING, AdapterScale, KvType, LoadOptions, Session, Support

from .cores import available_cores, physical_cores
from .llama_load import uses_flash_attention
from .llama_runtime import _is_gguf
from .llama_server_session import LlamaServerSession
from .openai_client import ChatClient, Endpoint, parse_endpoint

VARIABLE = "EDGEFT_LLAMA_SERVER"
_INSTALL = f"Install llama.cpp, or set {VARIABLE} to its llama-server program."
_START_S = 300.0
"""A large model read from a slow card takes minutes; a server that fails ends at once."""
DEFAULT_CONTEXT = 4096


def find_program() -> Path | None:
    """The server's program; None when there is none."""
    named = os.environ.get(VARIABLE)
    found = shutil.which(named or "llama-server")
    return Path(found) if found else None


@dataclass(frozen=True)
class LlamaServerRuntime:
    name: str = "llama-server"
    kv_types: Sequence[KvType] = ("f16", "q8_0")
    loading: Sequence[str] = LOADING
    lacks: Mapping[str, str] = field(
        default_factory=lambda: {
            "tokens": "the server sends characters of several tokens as one",
            "scores": "the server gives probabilities of its own answers only",
            "memory": "the model is in another process",
        }
    )

    def supports(self, artifact: Artifact) -> Support:
        if artifact.address:
            return Support(True)
        if not artifact.path.is_file() or not _is_gguf(artifact.path):
            return Support(False, f"{artifact.path.name} is not a GGUF file")
        return self.ready()

    def ready(self) -> Support:
        if find_program() is None:
            return Support(False, "there is no llama-server program", _INSTALL)
        return Support(True)

    def load(self, artifact: Artifact, options: LoadOptions) -> Session:
        if artifact.address:
            asked = (options.kv_type, options.mmap, options.repack, options.flash_attention)
            if any(one is not None for one in asked):
                raise UsageError(
                    "a server that runs has loaded its model already",
                    "Leave out --kv-type, --mmap, --repack and --flash-attention.",
                )
            endpoint = parse_endpoint(artifact.address.removesuffix("/v1"))
            return LlamaServerSession(ChatClient(endpoint), artifact.path, parallel=options.parallel)
        program = find_program()
        if program is None:
            raise MissingDependency("there is no llama-server program", _INSTALL)
        uses_flash_attention(options, default=True)  # refuses what contradicts itself, before anything is started
        child = Child(program, artifact.path, options)
        try:
            child.start()
            return LlamaServerSession(child.client(), artifact.path, child, options.parallel)
        except BaseException:
            child.stop()
            raise


@dataclass(frozen=True)
class OwnEndpoint(Endpoint):
    """A server of our own: its key was made up here."""

    secret: str = field(default="", repr=False)

    def key(self) -> str:
        return self.secret


class Child:
    """A llama-server process for one file."""

    def __init__(self, program: Path, model: Path, options: LoadOptions) -> None:
        self._program, self._model, self._options = program, model, options
        self._process: subprocess.Popen[bytes] | None = None
        self._said: IO[bytes] | None = None
        self._key = secrets.token_urlsafe(24)
        self._port = 0

    def start(self, adapters: Sequence[AdapterScale] = ()) -> None:
        """Raises: ModelError when the program ends or does not answer."""
        self._port = _free_port()
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        command = [str(self._program), *self._arguments(adapters)]
        environment = {**os.environ, "LLAMA_API_KEY": self._key}  # not on the command line, which everybody can read
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=self._said, stderr=self._said, env=environment
        )
        try:
            self._wait()
        except BaseException:
            self.stop()
            raise

    def _arguments(self, adapters: Sequence[AdapterScale]) -> list[str]:
        how = self._options
        values = {
            "--model": self._model,
            "--host": "127.0.0.1",
            "--port": self._port,
            "--ctx-size": (how.context or DEFAULT_CONTEXT) * how.parallel,
            "--threads": how.threads or physical_cores(),
            "--threads-batch": how.threads_batch or available_cores(),
            "--batch-size": how.batch,
            "--ubatch-size": how.batch,
            "--parallel": how.parallel,
        }
        words = [str(word) for pair in values.items() for word in pair]
        words += ["--no-mmap"] if how.mmap is False else []
        words += ["--no-repack"] if how.repack is False else []
        if how.flash_attention is not None:
            words += ["--flash-attn", "on" if how.flash_attention else "off"]
        words += ["--cache-type-k", how.kv_type, "--cache-type-v", how.kv_type] if how.kv_type else []
        return words + [word for one in adapters for word in ("--lora-scaled", f"{one.path}:{one.scale}")]

    def _wait(self) -> None:
        assert self._process is not None
        client, end = self.client(), time.monotonic() + _START_S
        try:
            while self._process.poll() is None and time.monotonic() < end:
                try:
                    client.get("/props")  # behind the key: another's server on this port would refuse it
                    return
                except Unreachable:
                    time.sleep(0.05)
        finally:
            client.close()
        raise ModelError(
            f"llama-server cannot load {self._model}: {self._last_words()}", "Try another context or file."
        )

    def _last_words(self) -> str:
        assert self._said is not None
        self._said.seek(0)
        lines = self._said.read().decode("utf-8", "replace").strip().splitlines()
        told = [line for line in lines if "error" in line.lower() or "fail" in line.lower()] or lines[-1:]
        return "; ".join(told[:2]) or "no reason given"

    def client(self) -> ChatClient:
        return ChatClient(OwnEndpoint(f"http://127.0.0.1:{self._port}", first_token_s=_START_S, secret=self._key))

    def stop(self) -> None:
        """End the process, and wait until it has given back its memory."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(5)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None
        if self._said is not None:
            self._said.close()
            self._said = None

    def restart(self, adapters: Sequence[AdapterScale]) -> ChatClient:
        """The same model with other adapters; without any, when those cannot be loaded.

        Raises: ModelError.
        """
        self.stop()
        try:
            self.start(adapters)
        except EdgeftError:
            self.start()
            raise
        return self.client()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


runtime = LlamaServerRuntime()
