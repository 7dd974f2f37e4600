"""Headers of models on a server, read by HTTP range requests: a few megabytes instead of the file."""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import tempfile
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeft import config
from edgeft.errors import ModelError, Unreachable, UsageError
from edgeft.models import hub
from edgeft.models.gguf_header import GgufHeader, read_header
from edgeft.paths import parse_json

_FIRST = 1 << 20
"""Bytes of a GGUF that are asked for first; a vocabulary of 150,000 tokens takes six times as many."""
_MOST = 1 << 27
"""Bytes after which a header is no header."""
_TIMEOUT_S = 30.0


class NotThere(ModelError):
    """The server answers, but has no such file."""


@dataclass(frozen=True)
class Piece:
    data: bytes
    size: int
    """Bytes of the whole file."""


def is_url(reference: str) -> bool:
    return reference.startswith(("http://", "https://"))


def url_of(reference: str) -> str:
    """The address of a model's folder (ends in a slash) or GGUF: of a URL, or hf:org/name[@revision][:file.gguf].

    Raises: UsageError.
    """
    if is_url(reference):
        return reference if reference.endswith((".gguf", "/")) else reference + "/"
    found = hub.parse(reference)
    server = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    return f"{server}/{found.repo}/resolve/{found.revision or 'main'}/{found.file or ''}"


@contextlib.contextmanager
def gguf_header(url: str) -> Iterator[GgufHeader]:
    """The header of a GGUF; its long arrays can be read inside the block only.

    Raises:
        ModelError: damaged, no GGUF or not there.
        Unreachable
    """
    with tempfile.TemporaryDirectory(prefix="edgeft-") as folder:
        file = Path(folder) / (_name(url) or "model.gguf")
        yield _grown(url, file)


def _grown(url: str, file: Path) -> GgufHeader:
    """Fetch twice as much until the header is whole. What was not fetched is a hole, so the file is as long as the
    server's and the tensors' places can be checked."""
    have, wanted = 0, _FIRST
    while True:
        piece = read(url, have, wanted - have)
        have += len(piece.data)
        with file.open("ab" if have > len(piece.data) else "wb") as stream:
            stream.truncate(have - len(piece.data))
            stream.write(piece.data)
            stream.truncate(max(piece.size, have))
        whole = have >= piece.size or have >= _MOST or not piece.data
        try:
            header = read_header(file)
            if header.data_offset <= have or whole:
                return header
        except ModelError as error:
            if whole or not _looks_like_gguf(file):
                raise ModelError(error.message.replace(str(file), url), error.hint) from error
        wanted = have * 2


def _looks_like_gguf(file: Path) -> bool:
    with file.open("rb") as stream:
        return stream.read(4) == b"GGUF"


def _name(url: str) -> str:
    return urllib.parse.unquote(urllib.parse.urlsplit(url).path).rpartition("/")[2]


def read_json(url: str) -> dict[str, Any]:
    """Raises: NotThere, ModelError, Unreachable."""
    piece = read(url, 0, _MOST)
    try:
        value = parse_json(piece.data)
    except ValueError as error:
        raise ModelError(f"{url} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{url} holds no JSON object")
    return value


def read(url: str, start: int, length: int) -> Piece:
    """`length` bytes from `start`, fewer at the end of the file.

    Raises:
        NotThere: the server has no such file.
        ModelError: it asks for an account, or has fewer bytes.
        Unreachable: no answer, or the network is forbidden (models.offline, HF_HUB_OFFLINE for hf: models).
    """
    _check_allowed(url)
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-{start + length - 1}"})
    if token := _token(url):
        # Not to be sent on to the server that a redirection names.
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer:
            skip = start if answer.status == 200 else 0  # a server without ranges sends all
            while skip and (thrown := len(answer.read(min(skip, 1 << 20)))):
                skip -= thrown
            return Piece(answer.read(length), _size(answer))
    except urllib.error.HTTPError as error:
        raise _refused(url, error.code) from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise Unreachable(
            f"cannot read {url}: {reason}", "Check the address and the network, and try again."
        ) from error


def _size(answer: http.client.HTTPResponse) -> int:
    """Raises: ValueError."""
    said = re.fullmatch(r"bytes \d+-\d+/(\d+)", answer.headers.get("Content-Range", ""))
    return int(said[1] if said else answer.headers.get("Content-Length", ""))


def _refused(url: str, code: int) -> ModelError | Unreachable:
    if code == 404:
        return NotThere(f"there is no {url}", "Check the name; for a GGUF on the hub write hf:org/name:file.gguf.")
    if code in (401, 403):
        return ModelError(f"{url} asks for an account", "Set HF_TOKEN, and accept the model's licence on its page.")
    if code == 416:
        return ModelError(f"{url} is shorter than its header says")
    return Unreachable(f"{url} answers {code}", "Try again later.")


def _check_allowed(url: str) -> None:
    if config.load()["models.offline"].value:
        raise Unreachable(f"{url} may not be read: models.offline forbids it")
    if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
        raise UsageError(f"{url} is not an http(s) address")


def _token(url: str) -> str | None:
    server = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    same = urllib.parse.urlsplit(url).netloc == urllib.parse.urlsplit(server).netloc
    return os.environ.get("HF_TOKEN") if same else None
