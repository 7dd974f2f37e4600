"""The loss curve, as text for a terminal and as a PNG."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

from edgeft.run import Run

# Bit of each dot in a braille cell of 2 x 4 dots, by (row, column); Unicode block U+2800.
_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))


def points(run: Run, key: str) -> list[tuple[int, float]]:
    """(step, value) of a metric, in order; steps that could not be measured are left out."""
    return [(line["step"], line[key]) for line in run.metrics() if isinstance(line.get(key), (int, float))]


def loss_range(runs: Sequence[Run]) -> tuple[float, float] | None:
    """The least and the largest smoothed training loss of all runs, for one scale; None when nothing was logged."""
    found = [loss for run in runs for loss in _smoothed([loss for _, loss in points(run, "loss")])]
    return (min(found), max(found)) if found else None


def terminal_curve(run: Run, width: int = 64, height: int = 10, span: tuple[float, float] | None = None) -> str:
    """Training loss (smoothed) drawn in braille dots, with the validation losses listed below.

    Empty when nothing was logged yet.

    Args:
        span: the losses at the lower and the upper end; default: the run's own.
    """
    losses = points(run, "loss")
    if not losses:
        return ""
    smooth = _smoothed([loss for _, loss in losses])
    low, high = span or (min(smooth), max(smooth))
    rows = _braille(smooth, low, high, width, height)
    labels = [f"{high:8.4f} ┤", *["         │"] * (height - 2), f"{low:8.4f} ┤"]
    body = [label + row for label, row in zip(labels, rows, strict=True)]
    body.append(f"         └{'─' * width}\n          step {losses[0][0]} to {losses[-1][0]}, training loss")
    validations = points(run, "val_loss")
    if validations:
        body.append("          validation: " + ", ".join(f"{loss:.4f} at {step}" for step, loss in validations[-6:]))
    return "\n".join(body)


def _braille(values: Sequence[float], low: float, high: float, width: int, height: int) -> list[str]:
    """`height` lines of `width` characters; each character holds 2 x 4 dots."""
    cells = [[0] * width for _ in range(height)]
    span = (high - low) or 1.0
    columns, rows = 2 * width, 4 * height
    previous: int | None = None
    for column in range(columns):
        value = values[min(len(values) - 1, column * len(values) // columns)]
        row = round((high - value) / span * (rows - 1))
        for between in range(min(row, previous if previous is not None else row), max(row, previous or row) + 1):
            cells[between // 4][column // 2] |= _DOTS[between % 4][column % 2]
        previous = row
    return ["".join(chr(0x2800 + cell) for cell in line) for line in cells]


def _smoothed(values: Sequence[float]) -> list[float]:
    """Mean of each value and its neighbours, over a twentieth of the run."""
    reach = max(1, len(values) // 40)
    windows = (values[max(0, i - reach) : i + reach + 1] for i in range(len(values)))
    return [math.fsum(window) / len(window) for window in windows]


def write_png(run: Run, file: Path) -> None:
    """Plot training and validation loss over steps into a PNG.

    Raises:
        MissingDependency: matplotlib is not installed.
        WriteError: the file cannot be written.
    """
    from edgeft.errors import require
    from edgeft.paths import atomic_write

    figure_module = require("matplotlib.figure", "train")
    # Figure without pyplot: no window system, no global state.
    figure = figure_module.Figure(figsize=(7, 4), dpi=120, layout="constrained")
    axes = figure.subplots()
    for key, label, style in (("loss", "training", "-"), ("val_loss", "validation", "o-")):
        series = points(run, key)
        if series:
            axes.plot(*zip(*series, strict=True), style, label=label, linewidth=1.2, markersize=4)
    axes.set(xlabel="step", ylabel="nats per learned token", title=os.fspath(run.path.name))
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic_write(file) as stream:
        figure.savefig(stream, format="png")
