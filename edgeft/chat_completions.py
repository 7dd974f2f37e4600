"""A client for chat completions: any endpoint that speaks OpenAI's protocol, streamed, and stopped at any moment.

llama-server, Ollama, vLLM and the large providers speak it (platform.openai.com/docs/api-reference/chat).
The key comes from an environment variable, goes into one header, and into nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
import tomllib
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from email.utils import parsedate_to_datetime
from pathlib import Path
from queue import SimpleQueue
from typing import Any
from urllib.parse import urlsplit

from edgeft.chat import Cancel
from edgeft.errors import ConfigError, ModelError, Unreachable, UsageError, require
from edgeft.paths import parse_json

SUFFIX = ".endpoint.toml"
KEY_VARIABLE = "EDGEFT_ENDPOINT_KEY"
"""Where the key of an endpoint is that names no variable of its own. Not OPENAI_API_KEY: that one belongs to a host."""
_MAX_LINE = 4 << 20
"""Bytes of one event: a stranger's server shall not fill the memory."""


@dataclass(frozen=True)
class Endpoint:
    """A server that answers; as a URL `http://host:port/v1#model`, or as a file `*.endpoint.toml` with these keys."""

    url: str
    """Up to where `/chat/completions` follows, mostly ending in /v1."""
    model: str = ""
    """"": the only one, or the first, that the server lists."""
    key_env: str = KEY_VARIABLE
    """Environment variable that has the key; without one, none is sent."""
    context: int = 8192
    """Tokens that prompt and answer may have together; the server has the last word."""
    max_tokens_field: str = "max_tokens"
    """Newer models of OpenAI want max_completion_tokens."""
    connect_s: float = 10.0
    first_token_s: float = 120.0
    """From the request to the first event; the prompt phase of a small machine is in it."""
    idle_s: float = 60.0
    """Between two events."""

    secret: str = field(default="", repr=False)
    """A key that was found elsewhere, such as in the system's keyring; never in a file."""
    total_s: float = float("inf")
    """From the request to its last event."""

    def key(self) -> str | None:
        return self.secret or os.environ.get(self.key_env) or None

    @property
    def local(self) -> bool:
        return urlsplit(self.url).hostname in ("localhost", "127.0.0.1", "::1")


def parse_endpoint(text: str) -> Endpoint:
    """An endpoint from `http://host/v1#model`. Raises: UsageError."""
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UsageError(f"{text} is not the URL of an endpoint", "It looks like http://127.0.0.1:8080/v1#model.")
    if "@" in parts.netloc:
        raise UsageError(
            f"the URL of {parts.hostname} has credentials in it, where logs and process lists show them",
            f"Put the key into the environment variable {KEY_VARIABLE}.",
        )
    url = parts._replace(fragment="", query="").geturl().rstrip("/")
    field = "max_completion_tokens" if parts.hostname == "api.openai.com" else "max_tokens"
    return Endpoint(url, parts.fragment, max_tokens_field=field)


def read_endpoint(path: Path) -> Endpoint:
    """Raises: ConfigError when the file cannot be read or says something unknown."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
        if "secret" in values:
            raise ConfigError(f"{path} has a key in it", "Put it into the environment: key_env names the variable.")
        return replace(parse_endpoint(str(values.pop("url"))), **values)
    except KeyError:
        raise ConfigError(f"{path} has no url", 'Write url = "http://127.0.0.1:8080/v1" into it.') from None
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{path} is not an endpoint: {error}") from error


def check_encrypted(endpoint: Endpoint) -> None:
    """Raises: UsageError when a key would go over the network in the clear."""
    if endpoint.key() and not endpoint.local and urlsplit(endpoint.url).scheme == "http":
        raise UsageError(f"{endpoint.url} is not encrypted, and {endpoint.key_env} would be readable", "Use https.")


class NotConnected(Unreachable):
    """There is no connection: no network, no name, or nobody listens."""


class Refused(Unreachable):
    """A server that answers, but not now.

    Args:
        status: the HTTP status.
        retry_after_s: how long the server asked to be left alone.
    """

    def __init__(self, message: str, hint: str | None, status: int, retry_after_s: float | None) -> None:
        super().__init__(message, hint)
        self.status, self.retry_after_s = status, retry_after_s


class ChatClient:
    """Requests to one endpoint, over connections that are kept. Used by one thread at a time.

    The connection is read by a thread of its own, so that a switch ends even a wait for the server's first byte.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        """Raises: MissingDependency; UsageError when the key would go over the network in the clear."""
        self.endpoint = endpoint
        self._httpx = require("httpx2", "cloud")
        check_encrypted(endpoint)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="edgeft-endpoint", daemon=True)
        self._thread.start()
        self._client = self._httpx.AsyncClient(
            timeout=self._httpx.Timeout(endpoint.connect_s, read=None),
            trust_env=not endpoint.local,  # no proxy stands between a machine and itself
            follow_redirects=False,
        )
        self._model = endpoint.model

    def close(self) -> None:
        if self._loop.is_closed():
            return
        self._call(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _end(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self._client.aclose()

    # --- Requests -------------------------------------------------------------

    def model(self) -> str:
        """The model's name, asked for once when the endpoint does not give it. Raises: Unreachable, ModelError."""
        if not self._model:
            listed = self.get("/models").get("data") or []
            if not listed:
                raise ModelError(f"{self.endpoint.url} lists no model", "Name one: URL#MODEL.")
            self._model = str(listed[0]["id"])
        return self._model

    def get(self, path: str) -> Mapping[str, Any]:
        """Raises: Unreachable, ModelError, ConfigError."""
        found: Mapping[str, Any] = self._json("GET", path, None)
        return found

    def post(self, path: str, body: Any) -> Mapping[str, Any]:
        """Raises: Unreachable, ModelError, ConfigError."""
        found: Mapping[str, Any] = self._json("POST", path, body)
        return found

    def _json(self, method: str, path: str, body: Any) -> Any:
        async def ask() -> Any:
            async with asyncio.timeout(self.endpoint.first_token_s):
                response = await self._client.request(method, self._url(path), json=body, headers=self._headers())
            await self._check(response)
            return parse_json(response.text)

        return self._call(self._translated(ask()))

    def stream(self, path: str, body: Mapping[str, Any], cancel: Cancel) -> Iterator[Mapping[str, Any]]:
        """The answer's events as they come; ends early, without an error, when the switch is thrown.

        Raises: Unreachable, ModelError, ConfigError.
        """
        queue: SimpleQueue[Mapping[str, Any] | BaseException | None] = SimpleQueue()

        async def read() -> None:
            try:
                limit = self.endpoint.total_s if self.endpoint.total_s < float("inf") else None
                async with asyncio.timeout(limit), contextlib.aclosing(self._events(path, body)) as events:
                    async for event in events:
                        queue.put(event)
                queue.put(None)
            except asyncio.CancelledError:
                queue.put(None)
            except Exception as error:  # whatever it is belongs to the thread that asked
                queue.put(error)

        task = asyncio.run_coroutine_threadsafe(read(), self._loop)

        def stop() -> None:
            task.cancel()
            queue.put(None)

        try:
            with cancel.calls(stop):
                while not cancel and (item := queue.get()) is not None:
                    if isinstance(item, BaseException):
                        raise self._meaning(item)
                    yield item
        finally:
            task.cancel()  # closes the connection, which tells the server to stop

    async def _events(self, path: str, body: Mapping[str, Any]) -> AsyncGenerator[Mapping[str, Any], None]:
        wait = self.endpoint.first_token_s
        request = self._client.build_request("POST", self._url(path), json=body, headers=self._headers())
        async with asyncio.timeout(wait):
            response = await self._client.send(request, stream=True)
        try:
            await self._check(response)
            if "event-stream" not in response.headers.get("content-type", ""):
                yield parse_json((await response.aread()).decode())  # a server that does not stream
                return
            # Closed in order: generators left to the collector are closed by tasks that get in each other's way.
            async with (
                contextlib.aclosing(response.aiter_bytes()) as pieces,
                contextlib.aclosing(_lines(pieces)) as lines,
            ):
                while True:
                    async with asyncio.timeout(wait):
                        line = await anext(lines, None)
                    if line is None or line == "data: [DONE]":
                        return
                    if line.startswith("data:"):
                        wait = self.endpoint.idle_s
                        yield self._event(parse_json(line.removeprefix("data:")))
        finally:
            await response.aclose()

    def _event(self, event: Any) -> Mapping[str, Any]:
        if not isinstance(event, dict):
            raise ModelError(f"{self.endpoint.url} sent what is no event")
        if event.get("error"):
            raise ModelError(f"{self.endpoint.url}: {self._clean(_said(event))}")
        return event

    def _url(self, path: str) -> str:
        return self.endpoint.url + path

    def _headers(self) -> dict[str, str]:
        key = self.endpoint.key()
        return {"Authorization": f"Bearer {key}"} if key else {}

    def _call(self, work: Awaitable[Any]) -> Any:
        async def run() -> Any:
            return await work

        return asyncio.run_coroutine_threadsafe(run(), self._loop).result()

    # --- What went wrong --------------------------------------------------------

    async def _translated(self, work: Awaitable[Any]) -> Any:
        try:
            return await work
        except Exception as error:
            raise self._meaning(error) from None  # the original's text may hold what a server echoed

    def _meaning(self, error: BaseException) -> BaseException:
        url, httpx = self.endpoint.url, self._httpx
        if isinstance(error, (httpx.ConnectError, httpx.ConnectTimeout)):
            return NotConnected(f"no server answers at {url}", "Is it running, and is there a network?")
        if isinstance(error, (TimeoutError, httpx.TimeoutException)):
            return Unreachable(f"{url} did not answer in time", "Try again; an endpoint file can set longer times.")
        if isinstance(error, httpx.HTTPError):
            return Unreachable(f"the connection to {url} broke: {type(error).__name__}", "Try again.")
        if isinstance(error, (ValueError, KeyError, IndexError)):
            return ModelError(f"{url} sent what cannot be read: {self._clean(str(error))[:200]}")
        return error

    async def _check(self, response: Any) -> None:
        """Raises: what a status other than success means."""
        if response.is_success:
            return
        said, status, url = self._clean(_said(await _body(response))), response.status_code, self.endpoint.url
        if status in (401, 403):
            raise ConfigError(f"{url} refuses the key ({status}): {said}", f"Is {self.endpoint.key_env} set and right?")
        if status in (408, 409, 425, 429) or status >= 500:
            after = response.headers.get("retry-after")
            hint = f"Try again in {after} s." if after else "Try again."
            raise Refused(f"{url} cannot answer now ({status}): {said}", hint, status, _seconds(after))
        raise ModelError(f"{url} refused the request ({status}): {said}")

    def _clean(self, text: str) -> str:
        """A server's words without the key, which some repeat."""
        key = self.endpoint.key()
        return text.replace(key, "[key]") if key else text


def _seconds(after: str | None) -> float | None:
    """Seconds in a Retry-After header, which has a number or a date (RFC 9110, 10.2.3)."""
    if after is None:
        return None
    try:
        return max(float(after), 0.0)
    except ValueError:
        pass
    try:
        return max(parsedate_to_datetime(after).timestamp() - time.time(), 0.0)
    except (ValueError, TypeError):
        return None


async def _lines(pieces: AsyncIterator[bytes]) -> AsyncGenerator[str, None]:
    """Lines of a stream of bytes. Raises: ValueError when one is too long."""
    held = b""
    async for piece in pieces:
        *whole, held = (held + piece).split(b"\n")
        for line in whole:
            yield line.decode("utf-8", "replace").rstrip("\r")
        if len(held) > _MAX_LINE:
            raise ValueError(f"a line of more than {_MAX_LINE} bytes")
    if held:
        yield held.decode("utf-8", "replace")


async def _body(response: Any) -> Any:
    text = (await response.aread())[:10_000].decode("utf-8", "replace")
    try:
        return parse_json(text)
    except ValueError:
        return {"error": text}


def _said(body: Any) -> str:
    """A server's own words, in the shapes in which servers put them."""
    error = body.get("error", body.get("detail", body)) if isinstance(body, dict) else body
    message = error.get("message", error) if isinstance(error, dict) else error
    return str(message)[:500] or "no reason given"
