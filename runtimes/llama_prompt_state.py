"""When a session reads and writes the state of its system prompt."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgeft.chat import TokenIds
from edgeft.plugins import AdapterScale

from .llama_api import Library
from .llama_state import SHORTEST, StateFolder, fingerprint, restore, save


class PromptState:
    """The states of one model in one context. Off when there is no folder."""

    def __init__(self, folder: Path | None, about: Mapping[str, Any]) -> None:
        """
        Args:
            about: what else keys and values depend on: model, template, library, how attention is computed.
        """
        self._folder = StateFolder(folder) if folder else None
        self._about = dict(about)
        self._adapters: list[tuple[str, float]] = []
        self._prefix: TokenIds = []
        self._unwritten: tuple[dict[str, Any], bytes] | None = None
        self.notes: list[str] = []

    @property
    def on(self) -> bool:
        return self._folder is not None

    def use_adapters(self, adapters: Sequence[AdapterScale]) -> None:
        if self.on:
            self._adapters = [(fingerprint(adapter.path), adapter.scale) for adapter in adapters]

    def expect(self, prefix: TokenIds) -> None:
        """The next prompt may begin with these tokens, a system prompt and what the template writes around it."""
        self._prefix = prefix if len(prefix) >= SHORTEST else []

    def prefix_of(self, prompt: TokenIds) -> TokenIds:
        """What of the prompt is kept on disk; nothing when it is not the one expected."""
        fits = len(self._prefix) < len(prompt) and prompt[: len(self._prefix)] == self._prefix
        return self._prefix if self.on and fits else []

    def read(self, prefix: TokenIds, library: Library, context: int) -> bool:
        """Whether the context has the prefix now. When not, it may have anything."""
        assert self._folder is not None
        found = self._folder.find(self._identity(prefix))
        if found.note:
            self.notes.append(found.note)
        if found.data is None:
            return False
        if restore(library, context, found.data):
            return True
        self.notes.append(f"{self._folder.file(self._identity(prefix))} is refused by llama.cpp: not used")
        return False

    def take(self, prefix: TokenIds, library: Library, context: int) -> None:
        """Copy what the context has; `write` puts it on the disk when the answer no longer waits for it."""
        self._unwritten = (self._identity(prefix), save(library, context))

    def write(self) -> None:
        if self._folder is not None and self._unwritten is not None:
            if problem := self._folder.keep(*self._unwritten):
                self.notes.append(problem)
            self._unwritten = None

    def _identity(self, prefix: TokenIds) -> dict[str, Any]:
        tokens = hashlib.sha256(" ".join(map(str, prefix)).encode()).hexdigest()
        return {**self._about, "adapters": self._adapters, "tokens": tokens}
