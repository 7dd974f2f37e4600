"""Runs beside each other: what was asked of them, how far they came, and their curves."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from edgeft.run import Run
from edgeft.train.config import read_config

SERIES = ("loss", "val_loss", "lr", "grad_norm", "tokens_per_s", "memory_peak_bytes", "left_s")
"""The metrics that make a curve."""


@dataclass(frozen=True)
class Summary:
    """How far a run is. None: not measured (yet)."""

    run: str
    finished: bool
    step: int
    loss: float | None
    """Of the newest step, nats per learned token."""
    val_loss: float | None
    """The best."""
    val_step: int | None
    held_out: float | None
    """Loss on the held-out split, of a finished run."""
    tokens: int | None
    tokens_per_s: float | None
    """Over the whole run."""
    memory_bytes: int | None
    seconds: float | None
    left_s: float | None

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def summary(run: Run) -> Summary:
    """Raises: ModelError when a finished run's manifest is damaged."""
    lines = list(run.metrics())
    last: dict[str, Any] = {}
    for line in lines:
        last.update(line)
    validated = [(line["val_loss"], line["step"]) for line in lines if _number(line.get("val_loss"))]
    best = min(validated, default=(None, None))
    tokens, seconds = last.get("tokens"), last.get("elapsed_s")
    return Summary(
        run=str(run.path),
        finished=run.finished,
        step=int(last.get("step", 0)),
        loss=last.get("loss"),
        val_loss=best[0],
        val_step=best[1],
        held_out=run.manifest().evaluation.get("nll_training_graph") if run.finished else None,
        tokens=tokens,
        tokens_per_s=tokens / seconds if tokens and seconds else None,
        memory_bytes=last.get("memory_peak_bytes"),
        seconds=seconds,
        left_s=None if run.finished else last.get("left_s"),
    )


def curves(run: Run) -> dict[str, list[tuple[int, float]]]:
    """Metric -> (step, value), in order; what could not be measured is left out."""
    found: dict[str, list[tuple[int, float]]] = {key: [] for key in SERIES}
    for line in run.metrics():
        for key in SERIES:
            if _number(line.get(key)) and isinstance(line.get("step"), int):
                found[key].append((line["step"], float(line[key])))
    return found


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and value == value


def one_line(text: str) -> str:
    """A sample for a list."""
    return " ⏎ ".join(text.splitlines())


def differences(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Settings that are not the same in all runs -> the value in each.

    Raises:
        ConfigError: a folder is no run.
    """
    settings = [dataclasses.asdict(read_config(run.path)) for run in runs]
    return {
        key: [each[key] for each in settings]
        for key in settings[0]
        if key != "out" and any(each[key] != settings[0][key] for each in settings)
    }
