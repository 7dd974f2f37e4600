"""The profiles that come with edgeft: `profiles/NAME.toml`."""

from __future__ import annotations

from importlib.resources import files

from edgeft.device import DeviceProfile, parse_profile


class Catalogue:
    def names(self) -> list[str]:
        folder = files(__package__) / "profiles"
        return sorted(file.name.removesuffix(".toml") for file in folder.iterdir() if file.name.endswith(".toml"))

    def load(self, name: str) -> DeviceProfile:
        """Raises: ConfigError."""
        file = files(__package__) / "profiles" / f"{name}.toml"
        return parse_profile(file.read_text(encoding="utf-8"), f"devices/profiles/{name}.toml")


source = Catalogue()
