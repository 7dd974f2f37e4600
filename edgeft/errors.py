"""Every error edgeft raises on purpose, and the exit code each one ends a command with.

    EdgeftError                   1  the work failed
    ├── UsageError                2  a flag, argument or combination that cannot work
    │   └── ConfigError           2  a configuration file or key
    ├── MissingDependency         3  a package extra or an outside tool is not installed
    ├── Unreachable               4  a network peer did not answer; trying again can help
    ├── CheckFailed               5  a check, tolerance or budget was not met
    ├── DataError                 1  a data set, with file and line
    ├── ModelError                1  a base model, adapter or artifact
    │   └── UnsupportedModel      1  an architecture, shape or format edgeft cannot handle
    ├── PluginError               1  a plug-in is unknown, broken or declared twice
    └── WriteError                1  an output could not be written (disk full, read-only)

The codes are an interface: scripts may rely on them. 130 means interrupted (Ctrl-C).
"""

from __future__ import annotations

import enum
import errno
import importlib
from types import ModuleType


class ExitCode(enum.IntEnum):
    OK = 0
    FAILED = 1
    USAGE = 2
    MISSING = 3
    UNREACHABLE = 4
    CHECK_FAILED = 5
    INTERRUPTED = 130


EXIT_CODE_HELP = {
    ExitCode.OK: "ok",
    ExitCode.FAILED: "failed",
    ExitCode.USAGE: "usage or configuration",
    ExitCode.MISSING: "missing extra or tool",
    ExitCode.UNREACHABLE: "unreachable, retryable",
    ExitCode.CHECK_FAILED: "check or budget not met",
    ExitCode.INTERRUPTED: "interrupted",
}


class EdgeftError(Exception):
    """Base of all expected errors.

    Args:
        message: what happened, and where (file and line, tensor, flag).
        hint: what to do next; one or two sentences or a command to type.
    """

    exit_code = ExitCode.FAILED

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(EdgeftError):
    exit_code = ExitCode.USAGE


class ConfigError(UsageError):
    pass


class MissingDependency(EdgeftError):
    exit_code = ExitCode.MISSING


class Unreachable(EdgeftError):
    exit_code = ExitCode.UNREACHABLE


class CheckFailed(EdgeftError):
    exit_code = ExitCode.CHECK_FAILED


class DataError(EdgeftError):
    pass


class ModelError(EdgeftError):
    pass


class UnsupportedModel(ModelError):
    pass


class PluginError(EdgeftError):
    pass


class WriteError(EdgeftError):
    """An output could not be written; nothing that looks finished was left behind."""

    @classmethod
    def from_os_error(cls, error: OSError, path: object) -> WriteError:
        if error.errno == errno.ENOSPC:
            return cls(f"no space left on the disk while writing {path}", "Free some space or choose another --out.")
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            return cls(f"cannot write {path}: {error.strerror}", "Choose a folder you may write to with --out.")
        return cls(f"cannot write {path}: {error.strerror or error}")


def require(module: str, extra: str) -> ModuleType:
    """Import `module`, or say which extra brings it.

    Raises:
        MissingDependency: when the module is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        # A missing module *inside* an installed package is a different fault: do not hide its name.
        missing = error.name or module
        raise MissingDependency(f"{missing} is not installed", f"pip install 'edgeft[{extra}]'") from error
