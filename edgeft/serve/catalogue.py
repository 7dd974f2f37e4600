"""The names under which models are served: a model, a model with an adapter, or a split between two of them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

from edgeft.errors import UsageError
from edgeft.serve.work import Answerer, Failed


@dataclass(frozen=True)
class Served:
    """What answers: an answerer, and the adapter it is to use."""

    name: str
    answerer: Answerer
    adapter: str | None = None
    system: str | None = None
    """The system prompt of the training, for conversations that have none."""


@dataclass(frozen=True)
class Split:
    """Two models behind one name. A client keeps the one it was given: which one is a hash, not a memory."""

    name: str
    first: str
    second: str
    share: float
    """Part of the clients, 0 to 1, that get the second."""

    def choose(self, client: str) -> str:
        digest = hashlib.sha256(f"{self.name}\0{client}".encode("utf-8", "replace")).digest()
        return self.second if int.from_bytes(digest[:8]) < self.share * 2**64 else self.first


@dataclass(frozen=True)
class Catalogue:
    models: Mapping[str, Served]
    splits: Mapping[str, Split]

    def __post_init__(self) -> None:
        for split in self.splits.values():
            if split.name in self.models:
                raise UsageError(f"the name {split.name} is taken by a model", "Choose another for the split.")
            for name in (split.first, split.second):
                if name not in self.models:
                    raise UsageError(f"no model named {name} to split {split.name} between")

    def names(self) -> list[str]:
        return [*self.models, *self.splits]

    def find(self, name: str, client: str) -> Served:
        """Raises: Failed with status 404."""
        split = self.splits.get(name)
        served = self.models.get(split.choose(client) if split else name)
        if served is None:
            known = ", ".join(self.names())
            raise Failed(404, f"no model named {name[:200]!r}; there are: {known}", code="model_not_found")
        return served


def parse_split(text: str) -> Split:
    """`NAME=FIRST,SECOND` or `NAME=FIRST,SECOND,SHARE`. Raises: UsageError."""
    name, _, rest = text.partition("=")
    parts = rest.split(",")
    try:
        share = float(parts[2]) if len(parts) == 3 else 0.5
    except ValueError:
        share = -1.0
    if not name or len(parts) not in (2, 3) or not all(parts) or not 0 <= share <= 1:
        raise UsageError(
            f"not a split: {text}", "Write NAME=FIRST,SECOND or NAME=FIRST,SECOND,SHARE, SHARE from 0 to 1."
        )
    return Split(name, parts[0], parts[1], share)
