"""A cascade judged beside what it must beat: chance, confidence alone, a middle-size model, and what is possible."""

from __future__ import annotations

import html
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeft.cascade.answers import Case
from edgeft.cascade.calibration import Calibration
from edgeft.cascade.metrics import SHARES, Curve, curve, interval, resampled
from edgeft.cascade.settings import PolicySettings
from edgeft.cascade.tune import outcome, policy_for, risks
from edgeft.errors import DataError, require
from edgeft.paths import atomic_write, write_text

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

CONFIDENCE = "confidence only"


def report(
    cases: Sequence[Case], settings: PolicySettings, calibration: Calibration | None, middle: tuple[float, float] | None
) -> dict[str, Any]:
    """Figures of every policy that needs no further answers, of the tuned one, and of the baselines.

    Args:
        middle: quality and mean cost of one middle-size model for everything.

    Raises:
        DataError: too few cases.
    """
    import numpy as np

    if len(cases) < 10:
        raise DataError(f"{len(cases)} answered examples are too few for a report")
    local = np.array([case.local_right for case in cases], dtype=np.float64)
    cloud = np.array([case.cloud_right for case in cases], dtype=np.float64)
    cost = np.array([case.cost for case in cases])
    rows = _risks(cases, settings, calibration, cloud - local)
    again = resampled(rows, local, cloud, cost)
    curves = {name: curve(risk, local, cloud, cost) for name, risk in rows.items()}
    tuned = calibration.policy if calibration else settings.kind
    return {
        "examples": len(cases),
        "local_quality": float(local.mean()),
        "cloud_quality": float(cloud.mean()),
        "cloud_cost": float(cost.mean()),
        "tuned": tuned,
        "policies": {name: _figures(curves[name], again[name], again[CONFIDENCE]) for name in rows},
        "at_threshold": outcome(rows[tuned].tolist(), cases, calibration.threshold)
        if calibration and tuned in rows
        else None,
        "middle": {"quality": middle[0], "cost": middle[1]} if middle else None,
    }


def _risks(
    cases: Sequence[Case], settings: PolicySettings, calibration: Calibration | None, gain: Floats
) -> dict[str, Floats]:
    import numpy as np

    names = ["quantile", "margin", "entropy", *(["learned"] if calibration and calibration.weights else [])]
    found = {name: np.array(risks(policy_for(settings, name, calibration), cases)) for name in names}
    confidence = np.array([-case.features["logprob_mean"] for case in cases])
    # One risk for all is a straight line: what deferring at random gives on average.
    return {**found, CONFIDENCE: confidence, "random": np.zeros(len(cases)), "oracle": gain}


def _figures(one: Curve, again: Sequence[float], confidence: Sequence[float]) -> dict[str, Any]:
    differences = [mine - other for mine, other in zip(again, confidence, strict=True)]
    reached = {f"{share:.0%}": one.reaching(share) for share in SHARES}
    return {
        "apgr": one.apgr,
        "apgr_interval": interval(again),
        "above_confidence": interval(differences),
        "area": one.area,
        "deferred_at": {name: value[0] for name, value in reached.items()},
        "cost_at": {name: value[1] for name, value in reached.items()},
        "curve": [[round(float(x), 4), round(float(y), 4)] for x, y in zip(one.share, one.quality, strict=True)],
    }


def rows_of(figures: dict[str, Any]) -> list[tuple[str, str, str, str, str, str]]:
    """Name, APGR with interval, and the deferred share at each share of the gap."""
    rows = []
    for name, each in sorted(figures["policies"].items(), key=lambda item: -_number(item[1]["apgr"])):
        low, high = each["apgr_interval"]
        shares = [f"{value:.1%}" for value in each["deferred_at"].values()]
        rows.append((name, f"{each['apgr']:.3f} [{low:.3f}, {high:.3f}]", *shares))
    return rows


def _number(value: float) -> float:
    return value if value == value else -9.0


def plot(figures: dict[str, Any], width: int = 60, height: int = 14) -> str:
    """The curves of the tuned policy (*), confidence (o) and chance (.) for a terminal."""
    low, high = sorted((figures["local_quality"], figures["cloud_quality"]))
    names = {"random": ".", CONFIDENCE: "o", figures["tuned"]: "*"}
    every = [y for name in names if name in figures["policies"] for _, y in figures["policies"][name]["curve"]]
    low, high = min([low, *every]), max([high, *every, low + 1e-9])
    grid = [[" "] * width for _ in range(height)]
    for name, mark in names.items():
        points = figures["policies"].get(name, {}).get("curve", [])
        for column in range(width if points else 0):
            quality = _at(points, column / (width - 1))
            grid[height - 1 - round((quality - low) / (high - low) * (height - 1))][column] = mark
    lines = [f"{'':>6} {''.join(row)}" for row in grid]
    lines[0], lines[-1] = f"{high:6.3f}" + lines[0][6:], f"{low:6.3f}" + lines[-1][6:]
    legend = ", ".join(f"{mark} {name}" for name, mark in names.items() if name in figures["policies"])
    return "\n".join([*lines, f"{'':7}0 % deferred{'100 %':>{width - 12}}", f"{'':7}{legend}"])


def _at(points: Sequence[Sequence[float]], share: float) -> float:
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if x0 <= share <= x1:
            return y0 + (y1 - y0) * (share - x0) / (x1 - x0) if x1 > x0 else y1
    return points[-1][1]


def write_png(figures: dict[str, Any], path: Path) -> None:
    """Raises: MissingDependency, WriteError."""
    require("matplotlib", "bench")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5))
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name, each in figures["policies"].items():
        xs, ys = zip(*each["curve"], strict=True)
        axes.plot(xs, ys, label=f"{name} (APGR {each['apgr']:.3f})", linestyle=":" if name == "random" else "-")
    axes.set_xlabel("share of answers from the cloud")
    axes.set_ylabel("share of right answers")
    axes.legend()
    with atomic_write(path) as stream:
        figure.savefig(stream, format="png", dpi=120)


def write_html(figures: dict[str, Any], path: Path) -> None:
    """One page without anything from elsewhere. Raises: WriteError."""
    head = "".join(f"<th>{name}</th>" for name in ("policy", "APGR", *(f"{share:.0%}" for share in SHARES)))
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows_of(figures)
    )
    data = html.escape(json.dumps(figures, indent=1))
    write_text(
        path,
        "<!doctype html><meta charset=utf-8><title>Cascade</title>"
        "<style>body{font:16px sans-serif;margin:2em}td,th{padding:.2em 1em;text-align:left}</style>"
        f"<h1>Cascade on {figures['examples']} examples</h1>"
        f"<p>Device {figures['local_quality']:.1%}, cloud {figures['cloud_quality']:.1%}.</p>"
        f"<table><tr>{head}</tr>{body}</table><pre>{html.escape(plot(figures))}</pre>"
        f"<details><summary>All figures</summary><pre>{data}</pre></details>\n",
    )
