"""A bench as a picture."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from edgeft.bench.suite import Measured, Spread
from edgeft.errors import require
from edgeft.paths import atomic_write

_PANELS = (
    ("decode, tokens/s", "decode_tps"),
    ("decode after the prompt, tokens/s", "decode_full_tps"),
    ("prompt, tokens/s", "prefill_tps"),
)


def label(found: Measured) -> str:
    threads = f", {found.threads} thr" if found.threads else ""
    return f"{found.runtime}{threads}, ctx {found.context}"


def write_png(results: Sequence[Measured], title: str, path: Path) -> None:
    """Bars of every setting with the spread of the repeats. Raises: MissingDependency, WriteError."""
    require("matplotlib", "bench")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 1.6 + 0.45 * len(results) * 2), layout="constrained")
    figure.suptitle(title)
    for axes, (name, field) in zip(figure.subplots(2, 2).flat, (*_PANELS, ("peak memory, MB", "")), strict=True):
        values = [_values(found, field) for found in results]
        middle = [value.median for value in values]
        spread = [[value.median - value.low for value in values], [value.high - value.median for value in values]]
        bars = axes.barh([label(found) for found in results], middle, xerr=spread if field else None, color="#4477aa")
        axes.bar_label(bars, fmt="%.4g", padding=3)
        axes.margins(x=0.18)
        axes.invert_yaxis()
        axes.set_title(name, fontsize="medium")
    picture = io.BytesIO()
    FigureCanvasAgg(figure).print_png(picture)
    with atomic_write(path) as stream:
        stream.write(picture.getvalue())


def _values(found: Measured, field: str) -> Spread:
    value = getattr(found, field) if field else (found.peak_bytes or 0) / 1e6
    return value if isinstance(value, Spread) else Spread(value, value, value, 1)


def bars(results: Sequence[Measured], width: int = 40) -> list[str]:
    """Decode speed as lines of text."""
    most = max(found.decode_full_tps.median for found in results)
    names = [label(found) for found in results]
    longest = max(map(len, names))
    return [
        f"{name:<{longest}}  {'█' * max(1, round(width * found.decode_full_tps.median / most))} "
        f"{found.decode_full_tps.median:.1f}"
        for name, found in zip(names, results, strict=True)
    ]
