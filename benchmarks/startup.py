"""What the command line costs before it does anything: `edgeft --help` against `python -c "import click"`.

    python benchmarks/startup.py [--json]

The two alternate, so that noise on a shared machine hits both; the figure is a ratio of medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROUNDS = 25
EDGEFT = [str(Path(sys.executable).with_name("edgeft")), "--help"]
CLICK = [sys.executable, "-c", "import click"]


def seconds(command: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - started


def measure() -> dict[str, float]:
    """Medians in milliseconds, their ratio, and the interquartile range of the paired ratios."""
    pairs = [(seconds(EDGEFT), seconds(CLICK)) for _ in range(ROUNDS + 1)][1:]
    help_s, click_s = (statistics.median(column) for column in zip(*pairs, strict=True))
    low, _, high = statistics.quantiles([mine / rival for mine, rival in pairs], n=4)
    return {
        "help_ratio": round(help_s / click_s, 3),
        "help_ratio_q1": round(low, 3),
        "help_ratio_q3": round(high, 3),
        "help_ms": round(help_s * 1000, 1),
        "import_click_ms": round(click_s * 1000, 1),
        "rounds": ROUNDS,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    figures = measure()
    if parser.parse_args().json:
        print(json.dumps(figures))
        return
    print(
        f"edgeft --help {figures['help_ms']} ms, import click {figures['import_click_ms']} ms: "
        f"ratio {figures['help_ratio']} (quartiles {figures['help_ratio_q1']} to {figures['help_ratio_q3']})"
    )


if __name__ == "__main__":
    main()
