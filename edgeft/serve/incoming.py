"""Reading a request's body: not too long, not too slow, and JSON."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from starlette.requests import ClientDisconnect, Request

from edgeft.paths import parse_json
from edgeft.serve.work import Failed


async def json_body(request: Request, most: int, seconds: float) -> Any:
    """Raises: Failed with status 408, 413, 415 or 400."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        # Also what keeps other sites' pages out: a browser asks before it sends this type across.
        raise Failed(415, "the body must have Content-Type: application/json", code="unsupported_media_type")
    try:
        async with asyncio.timeout(seconds):
            body = await _body(request, most)
    except TimeoutError:
        raise Failed(408, f"the request was not complete after {seconds:g} s", code="request_timeout") from None
    except ClientDisconnect:
        raise Failed(400, "the client went away") from None
    try:
        value = parse_json(body)
        if b"\\u" in body:
            json.dumps(value, ensure_ascii=False).encode()  # escapes can carry what is no character
    except ValueError as error:
        raise Failed(400, f"the body is not JSON: {error}", code="invalid_json") from None
    return value


async def _body(request: Request, most: int) -> bytes:
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > most:
        raise _too_long(most)
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > most:
            raise _too_long(most)
    return bytes(body)


def _too_long(most: int) -> Failed:
    return Failed(413, f"the body is longer than {most} bytes", code="body_too_long")
