"""Toolchains: exporters whose pinned requirements exclude each other live in virtual environments of their own.

`edgeft toolchain install NAME` makes one; a converter then runs its worker, a script that reads one request as JSON and
writes events as lines of JSON. The main environment stays on current releases, and nothing of a toolchain is imported.
"""

from edgeft.toolchain.environments import (
    TOOLCHAINS,
    Status,
    Toolchain,
    find_toolchain,
    install,
    python_of,
    remove,
    status,
    toolchains_dir,
)
from edgeft.toolchain.worker import WORKERS, call

__all__ = [
    "TOOLCHAINS",
    "WORKERS",
    "Status",
    "Toolchain",
    "call",
    "find_toolchain",
    "install",
    "python_of",
    "remove",
    "status",
    "toolchains_dir",
]
