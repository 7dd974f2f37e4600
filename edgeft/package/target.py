"""From a device's name to what its wheels must be made for."""

from __future__ import annotations

import platform
import sys

from edgeft.bundle import Target

LOCAL = "local"


def target_of(device: str, python: str | None = None) -> Target:
    """Raises: UsageError when there is no such device profile."""
    if device == LOCAL:
        return Target(LOCAL, platform.machine(), python or _this_python(), _this_glibc())
    from edgeft.device import load_profile  # type: ignore[import-not-found,unused-ignore]

    profile = load_profile(device)
    return Target(profile.name, profile.architecture, python or profile.python, profile.glibc)


def _this_python() -> str:
    return f"{sys.version_info.major}.{sys.version_info.minor}"


def _this_glibc() -> str:
    name, version = platform.libc_ver()
    return version if name == "glibc" else "2.17"
