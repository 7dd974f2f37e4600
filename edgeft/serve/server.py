"""Running the application: models are loaded first, and at the end answers may finish."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import uvicorn

from edgeft.chat import Sampling
from edgeft.errors import EdgeftError, UsageError
from edgeft.request_log import RequestLog
from edgeft.serve.app import Limits, Server, make_app
from edgeft.serve.catalogue import Catalogue, Served, Split
from edgeft.serve.engine import Engine, Spec
from edgeft.serve.gate import Gate, check_binding
from edgeft.serve.metrics import Metrics
from edgeft.serve.recorder import Exporter, Recorder
from edgeft.serve.work import Failed, Loaded

_LAST_WORDS_S = 2
"""After the grace time, for the error event that ends a stream to reach its reader."""
_KEEP_ALIVE_S = 15
_STOPPING = Failed(503, "the server is shutting down", "server_error", "shutting_down", retry_after=5)


@dataclass(frozen=True)
class Settings:
    """All that `edgeft serve` can be told."""

    models: tuple[tuple[str, Spec], ...]
    """Name and what to load."""
    splits: tuple[Split, ...] = ()
    host: str = "127.0.0.1"
    port: int = 8000
    keys: tuple[str, ...] = ()
    per_minute: int | None = None
    queue: int = 64
    grace_s: float = 30.0
    defaults: Sampling = field(default_factory=Sampling)
    limits: Limits = field(default_factory=Limits)
    log: Path | None = None
    log_prompts: bool = False
    confidence: bool = False
    exporter: Exporter | None = None


def serve(settings: Settings, ready: Callable[[str], None]) -> None:
    """Serve until a signal ends it.

    Args:
        ready: called with the URL when requests can be answered.

    Raises:
        KeyboardInterrupt: it was stopped by Ctrl-C; answers had their time to finish then, too.
        UsageError: the address is taken, or can be reached by others while there is no key.
        ModelError: a model cannot be loaded.
    """
    check_binding(settings.host, settings.keys)
    sock = _listen(settings.host, settings.port)
    try:
        interrupted = asyncio.run(_run(settings, sock, ready))
    finally:
        sock.close()
    if interrupted:
        raise KeyboardInterrupt


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
    except OSError as error:
        raise UsageError(f"cannot listen at {host}:{port}: {error.strerror}", "Choose another --port.") from error
    return sock


async def _run(settings: Settings, sock: socket.socket, ready: Callable[[str], None]) -> bool:
    """Whether it was Ctrl-C that ended it."""
    log = RequestLog(settings.log) if settings.log else None
    engines = [Engine(name, spec, settings.queue) for name, spec in settings.models]
    try:
        for engine in engines:
            _say("model", name=engine.name, **_about(await engine.start()))
    except EdgeftError:
        for engine in engines:
            await engine.close()
        raise
    app = make_app(_server(settings, engines, log))
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="on",
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=round(settings.grace_s) + _LAST_WORDS_S,
    )
    host, port = sock.getsockname()[:2]
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    server = _Uvicorn(config, engines, settings.grace_s, lambda: ready(url))
    await server.serve([sock])
    return server.interrupted


class _Uvicorn(uvicorn.Server):
    """Says when it is up; ends streams that outlast the grace time with an error, not with a cut."""

    def __init__(
        self, config: uvicorn.Config, engines: Sequence[Engine], grace_s: float, ready: Callable[[], None]
    ) -> None:
        super().__init__(config)
        self._engines, self._grace_s, self._ready = engines, grace_s, ready
        self.interrupted = False

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """uvicorn's own would send itself the signal again at the end, and being told to stop is no failure."""
        loop, numbers = asyncio.get_running_loop(), (signal.SIGINT, signal.SIGTERM)
        for number in numbers:
            loop.add_signal_handler(number, self._signalled, number)
        try:
            yield
        finally:
            for number in numbers:
                loop.remove_signal_handler(number)

    def _signalled(self, number: signal.Signals) -> None:
        self.interrupted |= number == signal.SIGINT
        self.handle_exit(number, None)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if not self.should_exit:
            self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        _say("shutdown", grace_s=self._grace_s)
        timers = [
            asyncio.get_running_loop().call_later(self._grace_s, engine.fail_all, _STOPPING) for engine in self._engines
        ]
        try:
            await super().shutdown(sockets)
        finally:
            for timer in timers:
                timer.cancel()


def _server(settings: Settings, engines: Sequence[Engine], log: RequestLog | None) -> Server:
    metrics = Metrics()
    return Server(
        catalogue_of(engines, settings.splits),
        Gate(settings.keys, settings.per_minute),
        Recorder(metrics, log, prompts=settings.log_prompts, exporter=settings.exporter),
        metrics,
        tuple(engines),
        settings.defaults,
        settings.limits,
        settings.confidence,
    )


def catalogue_of(engines: Sequence[Engine], splits: Sequence[Split]) -> Catalogue:
    """Every model under its name, and under `name:adapter` with each of its adapters."""
    models: dict[str, Served] = {}
    for engine in engines:
        system = engine.loaded.system if engine.loaded else {}
        models[engine.name] = plain = Served(engine.name, engine, system=system.get(""))
        for adapter in engine.spec.adapters:
            name = f"{engine.name}:{adapter}"
            models[name] = replace(plain, name=name, adapter=adapter, system=system.get(adapter))
    return Catalogue(models, {split.name: split for split in splits})


def _about(loaded: Loaded) -> dict[str, object]:
    cache = {"cache_mb": round(loaded.cache_bytes / 1e6, 1)} if loaded.cache_bytes else {}
    names = ("path", "runtime", "context", "parallel")
    return {**{name: getattr(loaded, name) for name in names}, **cache}


def _say(event: str, **values: object) -> None:
    print(json.dumps({"event": event, **values}, ensure_ascii=False), file=sys.stderr, flush=True)
