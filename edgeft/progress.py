"""How long work reports where it is, without knowing who is watching."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Told about work as it happens; must be cheap and must not raise."""

    def start(self, label: str, total: float | None, unit: str = "") -> None:
        """A new stage begins; `total` in `unit`, or None when it is not known."""

    def advance(self, amount: float, note: str = "", /) -> None:
        """`amount` more units are done."""

    def finish(self) -> None:
        """The stage is over."""


class Silent:
    """Progress for nobody."""

    def start(self, label: str, total: float | None, unit: str = "") -> None:
        pass

    def advance(self, amount: float, note: str = "", /) -> None:
        pass

    def finish(self) -> None:
        pass
