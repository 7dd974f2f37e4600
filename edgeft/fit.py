"""From a size to an export: the importance matrix where there is none yet, and the plan with the types it decides."""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edgeft import export
from edgeft.device import DeviceProfile, load_profile, names
from edgeft.errors import UsageError
from edgeft.export import Export, Origin
from edgeft.forecast.find import find_facts
from edgeft.forecast.fit import LEAST_BITS, exported, file_budget, forecast, refuse
from edgeft.progress import Progress, Silent

TARGET = "gguf"
"""Of files whose types are chosen for a size."""

_UNITS = {"": 1, "B": 1}
_UNITS |= {f"{letter}{end}": 1000**at for at, letter in enumerate("KMG", 1) for end in ("", "B")}
_UNITS |= {f"{letter}IB": 1024**at for at, letter in enumerate("KMG", 1)}
_LEAST = 1000
"""Bytes below which a size is a slip."""


def parse_size(text: str) -> int:
    """ "90MB" or "85.8MiB" -> bytes. Raises: UsageError."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([KMG]?I?B?)", text.strip().upper())
    if found is None or found[2] not in _UNITS or (size := int(float(found[1]) * _UNITS[found[2]])) < _LEAST:
        raise UsageError(f"{text!r} is not the size of a model", "Write 90MB, 85.8MiB or 1.2GB.")
    return size


def device_budget(origin: Origin, device: str, context: int | None = None) -> int:
    """Bytes of the largest file that leaves a device room for `context` tokens and all else; at most 8.5 bits per
    weight, which lose nothing that can be seen.

    Raises:
        CheckFailed: no file of this model is so small; the hint has the nearest thing that fits.
        UsageError, ConfigError: no such device, or its profile is wrong.
    """
    profile = load_profile(device)
    facts = find_facts(str(origin.source.gguf or origin.source.base))
    budget = file_budget(facts, profile, context)
    if 8 * budget < LEAST_BITS * facts.parameters:
        smallest = exported(facts, "gguf-q2_k")
        raise refuse(forecast(smallest, profile, context), smallest, _all_devices())
    return min(budget, exported(facts, "gguf-q8_0").bytes)


def _all_devices() -> list[DeviceProfile]:
    return [load_profile(name) for name in names()]


def plan_for(
    model: str,
    budget: int,
    *,
    adapter: Path | None = None,
    out: Path | None = None,
    imatrix: Path | None = None,
    data: str | None = None,
    progress: Progress | None = None,
    **extra: Any,
) -> Export:
    """The export with the least expected loss of a file of at most `budget` bytes; nothing is written.

    Args:
        imatrix: file of `edgeft imatrix`; None: it is measured for this plan, on `data` or the run's own.
        extra: what else the converter knows; see its `ConvertOptions.extra`.

    Raises:
        CheckFailed: no file of this model is so small; the message has the smallest size.
        UsageError, ModelError, DataError, MissingDependency
    """
    progress = progress or Silent()
    with contextlib.ExitStack() as stack:
        if imatrix is None:
            origin = export.find(model, adapter, progress)
            imatrix = stack.enter_context(measured(origin, data, progress))
        settings = {**extra, "bytes": budget, "imatrix": imatrix}
        return export.prepare(model, TARGET, adapter=adapter, out=out, extra=settings, progress=progress)


@contextlib.contextmanager
def measured(origin: Origin, data: str | None, progress: Progress) -> Iterator[Path]:
    """An importance matrix that is gone afterwards; a plan has read all it needs of it."""
    with tempfile.TemporaryDirectory(prefix="edgeft-") as folder:
        yield export.calibrate(origin, data, Path(folder) / "imatrix.gguf", progress=progress)
