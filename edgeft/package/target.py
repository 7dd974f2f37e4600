"""What the wheels of a bundle must be made for."""

from __future__ import annotations

import platform
import re
import sys

from edgeft.bundle import Target
from edgeft.device import DeviceProfile, load_profile, names
from edgeft.errors import UsageError

LOCAL = "local"


def target_of(
    device: str, architecture: str | None = None, python: str | None = None, glibc: str | None = None
) -> Target:
    """What a device runs, by its profile; what is given goes before.

    Raises:
        UsageError: there is no such profile and not everything is given, or the device runs no Python.
    """
    if device == LOCAL:
        return Target(LOCAL, architecture or platform.machine(), python or _this_python(), glibc or _this_glibc())
    if architecture and python and glibc:
        return Target(device, architecture, python, glibc)
    profile = profile_of(device)
    found = Target(device, architecture or profile.architecture, python or profile.python, glibc or profile.glibc)
    if not found.python or not found.glibc:
        raise UsageError(
            f"{profile.title} runs no Python that wheels are made for",
            "Use --format assets, or say what it has: --python, --glibc.",
        )
    return found


def profile_of(device: str) -> DeviceProfile:
    """A device's profile; `rpi5` is any of rpi5-4g, rpi5-8g and so on, which differ in memory alone.

    Raises:
        UsageError: there is none, or those of that name have different processors or systems.
    """
    sizes = [load_profile(name) for name in names() if re.fullmatch(rf"{re.escape(device)}-\d+g", name)]
    if not sizes or len({(one.isa, one.architecture, one.python, one.glibc) for one in sizes}) > 1:
        return load_profile(device)
    return sizes[0]


def _this_python() -> str:
    return f"{sys.version_info.major}.{sys.version_info.minor}"


def _this_glibc() -> str:
    name, version = platform.libc_ver()
    return version if name == "glibc" else "2.17"
