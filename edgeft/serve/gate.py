"""Who may ask, and how often."""

from __future__ import annotations

import hmac
import ipaddress
import math
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from edgeft.errors import UsageError
from edgeft.serve.work import Failed

KEYS_VARIABLE = "EDGEFT_SERVE_KEYS"
_SHORTEST_KEY = 16
_CLIENTS = 10_000
"""Clients whose rate is remembered; the one that was longest away is forgotten first."""


def parse_keys(text: str | None) -> tuple[str, ...]:
    """Keys between commas. Raises: UsageError for one that could be guessed."""
    keys = tuple(key.strip() for key in (text or "").split(",") if key.strip())
    if any(len(key) < _SHORTEST_KEY for key in keys):
        raise UsageError(
            f"a key in {KEYS_VARIABLE} is shorter than {_SHORTEST_KEY} characters",
            "Make one: python3 -c 'import secrets; print(secrets.token_urlsafe(32))'",
        )
    return keys


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def check_binding(host: str, keys: Sequence[str]) -> None:
    """Raises: UsageError when others could reach a server that asks for no key."""
    if not keys and not is_loopback(host):
        raise UsageError(
            f"{host} can be reached by others, and there is no key",
            f"Set {KEYS_VARIABLE} to one or more keys, or leave --host at 127.0.0.1.",
        )


@dataclass
class _Bucket:
    tokens: float
    at: float


class Gate:
    """Checks keys, and counts requests per key (per address when there are no keys)."""

    def __init__(self, keys: Sequence[str], per_minute: int | None) -> None:
        self._keys = [key.encode() for key in keys]
        self._per_minute = per_minute
        self._buckets: OrderedDict[str, _Bucket] = OrderedDict()

    def client(self, authorization: str | None, host: str | None, address: str) -> str:
        """A name for who asks: "key-1", or an address.

        Raises:
            Failed: 401 for a wrong key; 403, without keys, for a `Host` that is not this machine: a page in a browser
                can make its own name point here.
        """
        if not self._keys:
            if host is not None and not is_loopback(_without_port(host)):
                raise Failed(403, "this server answers under loopback names only", "permission_error", "wrong_host")
            return address
        scheme, _, given = (authorization or "").partition(" ")
        sent = given.strip().encode("utf-8", "replace") if scheme.lower() == "bearer" else b""
        # All are compared, each in constant time: how long it takes says nothing about any.
        matches = [hmac.compare_digest(sent, key) for key in self._keys]
        if not any(matches):
            raise Failed(401, "a valid key is needed: Authorization: Bearer KEY", "authentication_error", "invalid_key")
        return f"key-{matches.index(True) + 1}"

    def admit(self, client: str, now: float | None = None) -> None:
        """Count one request. Raises: Failed with status 429 past the rate; bursts up to a minute's worth pass."""
        if self._per_minute is None:
            return
        now = time.monotonic() if now is None else now
        bucket = self._buckets.pop(client, None) or _Bucket(self._per_minute, now)
        bucket.tokens = min(self._per_minute, bucket.tokens + (now - bucket.at) * self._per_minute / 60)
        bucket.at = now
        self._buckets[client] = bucket
        if len(self._buckets) > _CLIENTS:
            self._buckets.popitem(last=False)
        if bucket.tokens < 1:
            wait = math.ceil((1 - bucket.tokens) * 60 / self._per_minute)
            message = f"more than {self._per_minute} requests a minute"
            raise Failed(429, message, "rate_limit_error", "rate_limited", retry_after=wait)
        bucket.tokens -= 1


def _without_port(host: str) -> str:
    if host.startswith("["):
        return host.partition("]")[0] + "]"
    return host.partition(":")[0]
