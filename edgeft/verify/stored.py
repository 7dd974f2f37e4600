"""What `edgeft verify` wrote into a manifest, as rows of a table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class StoredStep:
    """A step of a stored ledger; see edgeft.verify.ledger.Row."""

    title: str
    nll: str
    kl: str
    same_top: str
    exact: str
    megabytes: str
    lost: str
    worst: bool
    """Whether most is lost here."""

    @property
    def cells(self) -> tuple[str, ...]:
        mark = "▶" if self.worst else ""
        return mark, self.title, self.lost, self.nll, self.kl, self.same_top, self.exact, self.megabytes


COLUMNS = ("", "step", "lost here", "NLL", "KL", "same top", "exact", "MB")


def stored_steps(verification: Mapping[str, Any]) -> list[StoredStep]:
    """The steps in their order; the one that loses most is marked, as `Ledger.loses_most` finds it."""
    steps = list(verification.get("steps", ()))
    lost = [_value(step.get("kl_from_step_before")) for step in steps]
    most = max((value for value in lost if value is not None), default=None)
    return [_row(step, value, most is not None and value == most) for step, value in zip(steps, lost, strict=True)]


def _row(step: Mapping[str, Any], lost: float | None, worst: bool) -> StoredStep:
    size = step.get("bytes")
    return StoredStep(
        title=str(step.get("title", step.get("step", ""))),
        nll=_shown(step.get("nll"), ".4f"),
        kl=_shown(step.get("kl"), ".2g"),
        same_top=_shown(step.get("same_top"), ".2%"),
        exact=_shown(step.get("exact_match"), ".1%"),
        megabytes="" if size is None else f"{size / 1e6:.1f}",
        lost="" if lost is None else f"{lost:.2g}",
        worst=worst,
    )


def _value(interval: Mapping[str, Any] | None) -> float | None:
    return None if interval is None else interval.get("value")


def _shown(interval: Mapping[str, Any] | None, form: str) -> str:
    value = _value(interval)
    return "" if value is None else f"{value:{form}}"
