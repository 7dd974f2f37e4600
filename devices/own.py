"""The user's own profiles: files in edgeft's home, `local` among them once this machine was measured."""

from __future__ import annotations

from pathlib import Path

from edgeft.device import DeviceProfile, read_profile
from edgeft.paths import home


def folder() -> Path:
    return home() / "devices"


class Own:
    def names(self) -> list[str]:
        return sorted(file.stem for file in folder().glob("*.toml"))

    def load(self, name: str) -> DeviceProfile:
        """Raises: ConfigError."""
        return read_profile(folder() / f"{name}.toml")


source = Own()
