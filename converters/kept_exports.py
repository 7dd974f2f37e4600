"""What toolchains made in minutes, kept for the next export of the same weights with the same settings."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgeft import toolchain
from edgeft.models.references import weights_digest
from edgeft.paths import sha256_file
from edgeft.plugins import Plan, Support
from edgeft.toolchain import Toolchain

from .adapter import WEIGHTS

MOST = 2
"""Kept per toolchain: the newest. A float graph is twice as large as the 16-bit model."""


def toolchain_support(name: str) -> Support:
    """Whether a converter's or runtime's toolchain is there."""
    found = toolchain.status(toolchain.find_toolchain(name))
    if found.state == "installed":
        return Support(True)
    what = "out of date" if found.state == "stale" else "not installed"
    return Support(False, f"the toolchain {name} is {what}", f"edgeft toolchain install {name}")


def key(plan: Plan, used: Toolchain, config: Path, settings: Mapping[str, Any]) -> str:
    """Hex SHA-256 over everything the toolchain's result depends on.

    Raises: ModelError when the base's weights cannot be read.
    """
    source = plan.source
    parts = {
        "weights": weights_digest(source.base),
        "adapter": sha256_file(source.adapter / WEIGHTS) if source.adapter else None,
        "adapter_config": sha256_file(source.adapter / "adapter_config.json") if source.adapter else None,
        "nf4": source.nf4,
        "round": plan.options.round,
        "config": sha256_file(config),
        "settings": dict(settings),
        "toolchain": used.digest,
        "worker": sha256_file(toolchain.WORKERS / used.worker),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def find(used: Toolchain, key: str) -> Path | None:
    """A kept file or folder, which is then the one used last."""
    found = _folder(used) / key
    try:
        os.utime(found)
    except OSError:
        return None
    return found


def keep(used: Toolchain, key: str, made: Path) -> Path:
    """Move a file or folder among those that are kept; the ones used longest ago go. Raises: OSError."""
    folder = _folder(used)
    folder.mkdir(exist_ok=True)
    place, temporary = folder / key, folder / f".{key}.{os.getpid()}.tmp"
    try:
        shutil.move(made, temporary)
        if not place.exists():  # another export may have been faster
            temporary.replace(place)
    finally:
        _remove(temporary)
    kept = sorted((one for one in folder.iterdir() if one.name[0] != "."), key=lambda one: one.stat().st_mtime)
    for old in kept[:-MOST]:
        _remove(old)
    return place


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _folder(used: Toolchain) -> Path:
    """Inside the environment: whoever removes or renews that has no use for what an older one made."""
    return toolchain.status(used).folder / "kept"
