"""What the wheels of a bundle must be made for."""

from __future__ import annotations

import platform
import sys

from edgeft.bundle import Target
from edgeft.errors import UsageError

LOCAL = "local"


def target_of(
    device: str, architecture: str | None = None, python: str | None = None, glibc: str | None = None
) -> Target:
    """A device by its name, and what is known of it; of the machine at hand everything is.

    Raises:
        UsageError: something is not known of another device.
    """
    if device == LOCAL:
        return Target(LOCAL, architecture or platform.machine(), python or _this_python(), glibc or _this_glibc())
    if architecture is None or python is None or glibc is None:
        raise UsageError(
            f"what {device} runs is not known",
            "Say it: --architecture (uname -m), --python (python3 --version), --glibc (ldd --version).",
        )
    return Target(device, architecture, python, glibc)


def _this_python() -> str:
    return f"{sys.version_info.major}.{sys.version_info.minor}"


def _this_glibc() -> str:
    name, version = platform.libc_ver()
    return version if name == "glibc" else "2.17"
