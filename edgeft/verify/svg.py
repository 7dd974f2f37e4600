"""Small plots as SVG text: no library, no script, no network."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from edgeft.verify.bootstrap import Interval

_LEFT, _RIGHT, _ROW = 210, 90, 34

COLOURS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#a463f2", "#97bbf5")


def dots(names: Sequence[str], values: Sequence[Interval], *, form: str = ".4f", width: int = 720) -> str:
    """One row per name: a dot for the value and a line for its interval."""
    ends = [end for v in values for end in (v.low, v.high, v.value) if end is not None]
    low, high = min(ends), max(ends)
    margin = (high - low or abs(high) or 1.0) * 0.05
    low, high = low - margin, high + margin

    def x(value: float) -> float:
        return _LEFT + (value - low) / (high - low) * (width - _LEFT - _RIGHT)

    height = _ROW * len(names) + 30
    parts = [_axis(low, high, x, height, width)]
    for at, (name, value) in enumerate(zip(names, values, strict=True)):
        y = _ROW * at + _ROW / 2
        parts.append(_text(_LEFT - 12, y + 4, name, "end"))
        if value.low is not None and value.high is not None:
            parts.append(f'<line x1="{x(value.low):.1f}" x2="{x(value.high):.1f}" y1="{y}" y2="{y}" class="range"/>')
        parts.append(f'<circle cx="{x(value.value):.1f}" cy="{y}" r="5" class="dot"/>')
        parts.append(_text(width - _RIGHT + 12, y + 4, f"{value.value:{form}}"))
    return _svg(parts, width, height)


def _axis(low: float, high: float, x: object, height: int, width: int) -> str:
    assert callable(x)
    found = []
    for value in _ticks(low, high):
        found.append(f'<line x1="{x(value):.1f}" x2="{x(value):.1f}" y1="4" y2="{height - 24}" class="grid"/>')
        found.append(_text(x(value), height - 8, f"{value:g}", "middle"))
    return "".join(found)


def _ticks(low: float, high: float) -> list[float]:
    """Four to eight round numbers in a range."""
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= 8)
    first = math.ceil(low / step)
    return [round(at * step, 12) for at in range(first, math.floor(high / step) + 1)]


def lines(
    names: Sequence[str], points: Sequence[Sequence[tuple[float, float]]], labels: Sequence[str], *, width: int = 720
) -> str:
    """One line per name over evenly spaced labels, on a logarithmic axis; values of zero lie on its lower end."""
    positive = [y for line in points for _, y in line if y > 0] or [1e-6]
    low, high = math.floor(math.log10(max(min(positive), 1e-8))), math.ceil(math.log10(max(positive)))
    high = max(high, low + 1)
    height, right = 300, 240

    def x(at: float) -> float:
        return 70 + at * (width - 70 - right) / max(1, len(labels) - 1)

    def y(value: float) -> float:
        share = (math.log10(max(value, 10.0**low)) - low) / (high - low)
        return height - 40 - share * (height - 60)

    parts = [
        f'<line x1="70" x2="{width - right}" y1="{y(10.0**power):.1f}" y2="{y(10.0**power):.1f}" class="grid"/>'
        + _text(62, y(10.0**power) + 4, f"{10.0**power:g}", "end")
        for power in range(low, high + 1)
    ]
    parts += [_text(x(at), height - 16, label, "middle") for at, label in enumerate(labels)]
    for number, (name, line) in enumerate(zip(names, points, strict=True)):
        colour = COLOURS[number % len(COLOURS)]
        path = " ".join(f"{x(at):.1f},{y(value):.1f}" for at, value in line)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x(a):.1f}" cy="{y(v):.1f}" r="3" fill="{colour}"/>' for a, v in line]
        parts.append(f'<rect x="{width - right + 18}" y="{20 + 22 * number}" width="12" height="12" fill="{colour}"/>')
        parts.append(_text(width - right + 36, 31 + 22 * number, name))
    return _svg(parts, width, height)


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(parts: Sequence[str], width: int, height: int) -> str:
    return f'<svg viewBox="0 0 {width} {height}" role="img">{"".join(parts)}</svg>'
