"""One line of the inventory: a model, a run, a job or whatever else there is."""

from __future__ import annotations

from dataclasses import dataclass

KINDS = ("model", "run", "artifact", "adapter", "bundle", "job", "device")


@dataclass(frozen=True)
class Item:
    """One thing, as a list shows it."""

    kind: str
    """One of `KINDS`."""
    name: str
    """What commands take."""
    state: str
    detail: str
    next: tuple[str, ...]
    """Arguments of `edgeft`: what one would do next with it."""
