"""A cascade where a session is expected, so that `run` and `chat` need not know the difference."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from edgeft.cascade.engine import Cascade
from edgeft.cascade.types import LOCAL, By, CascadeDelta, Record
from edgeft.chat import Cancel, Delta, FinishReason, Message, Sampling, TokenIds, Usage
from edgeft.errors import UsageError
from edgeft.paths import parse_json
from edgeft.plugins import AdapterScale
from edgeft.progress import Progress
from edgeft.sessions import Opened

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Heard = Callable[[str, str], None]
"""Called with author and reason when the cloud writes, and when the author changes."""


class CascadeSession:
    """Prompts are conversations, as bytes of their JSON; the device's own tokens are not at hand."""

    def __init__(self, cascade: Cascade, heard: Heard) -> None:
        self.cascade, self._heard = cascade, heard
        self.context = cascade.opened.session.context
        self.vocabulary = 256
        self.record: Record | None = None
        """Of the last answer."""
        self.by: By = "policy"
        """Who is to write the next answers."""

    def __enter__(self) -> CascadeSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self.cascade.close()

    def render(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None) -> TokenIds:
        return list(json.dumps([list(messages), list(tools or ())], ensure_ascii=False).encode())

    def tokenize(self, text: str, *, special: bool = False, bos: bool = False) -> TokenIds:
        raise UsageError("a cascade takes conversations, not plain text", "Leave out --raw.")

    def detokenize(self, tokens: Sequence[int]) -> str:
        return ""

    def generate(self, prompt: TokenIds, sampling: Sampling, cancel: Cancel | None = None) -> Iterator[Delta]:
        messages, tools = parse_json(bytes(prompt))
        author = LOCAL
        pieces = self.cascade.answer(messages, sampling, cancel, tools or None, self.by)
        with contextlib.closing(_closable(pieces)) as answer:
            for delta in answer:
                if delta.record is not None:
                    self.record = delta.record
                    yield Delta("", usage=usage_of(delta.record))
                    return
                if delta.reason and (delta.author != author or author != LOCAL or not delta.text):
                    self._heard(delta.author, delta.reason)
                author = delta.author
                yield Delta("\n\n" + delta.text if delta.restart else delta.text)

    def score(self, tokens: TokenIds, start: int = 0) -> NDArray[np.float32]:
        raise UsageError("a cascade does not score text", "Use its local model.")

    def set_adapters(self, adapters: Sequence[AdapterScale]) -> None:
        if adapters:
            raise UsageError("a cascade has the model that its settings name")


def usage_of(record: Record) -> Usage:
    """A record's figures as those of a runtime."""
    reason: FinishReason = (
        "length" if record.finish == "length" else "cancel" if record.finish in ("cancel", "broken") else "stop"
    )
    first = (record.ttft_ms if record.ttft_ms is not None else record.total_ms) / 1000
    return Usage(
        record.prompt_tokens, 0, record.completion_tokens, first, max(record.total_ms / 1000 - first, 0.0), reason
    )


def open_cascade(path: Path, adapters: Sequence[AdapterScale], progress: Progress | None, heard: Heard) -> Opened:
    """A cascade by its settings, as an opened model. Raises: UsageError; what `Cascade.open` raises."""
    if adapters:
        raise UsageError("a cascade has the model that its settings name", "Leave out --adapter.")
    return opened_cascade(Cascade.open(path, progress), heard)


def opened_cascade(cascade: Cascade, heard: Heard) -> Opened:
    """A cascade as an opened model."""
    return dataclasses.replace(cascade.opened, session=CascadeSession(cascade, heard), runtime="cascade", adapters=())


def _closable(deltas: Iterator[CascadeDelta]) -> Any:
    return deltas
