"""Joules that the processor's packages took, where the kernel counts them (Linux' powercap, RAPL).

All that runs on the machine is in the count, and memory is only where the processor counts it as part of a package.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/sys/class/powercap")


@dataclass(frozen=True)
class Zone:
    counter: Path
    range_uj: int
    """Microjoules at which the counter begins again."""


class Meter:
    """Reads the counters of all packages."""

    def __init__(self, root: Path = ROOT) -> None:
        self.zones, self.why_not = _zones(root)
        self._last = self._read()

    def _read(self) -> list[int]:
        return [int(zone.counter.read_text()) for zone in self.zones]

    def joules(self) -> float | None:
        """Since the last call; None where nothing is counted."""
        if not self.zones:
            return None
        before, self._last = self._last, self._read()
        pairs = zip(self.zones, before, self._last, strict=True)
        return sum((now - then) % zone.range_uj for zone, then, now in pairs) / 1e6


def _zones(root: Path) -> tuple[list[Zone], str | None]:
    """Packages only: cores and memory (`intel-rapl:0:1`) are parts of them."""
    folders = [folder for folder in sorted(root.glob("*rapl:*")) if folder.name.count(":") == 1]
    packages = [folder for folder in folders if _text(folder / "name").startswith("package")]
    if not packages:
        return [], f"the kernel counts no energy here ({root} has no package)"
    if any(not _text(folder / "energy_uj") for folder in packages):
        return [], f"{packages[0]}/energy_uj may be read by root only"
    return [Zone(folder / "energy_uj", int(_text(folder / "max_energy_range_uj"))) for folder in packages], None


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8").strip()
    except OSError:
        return ""
