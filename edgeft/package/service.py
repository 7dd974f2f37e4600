"""A model as a service of systemd that may do little else than compute and answer on this machine.

`systemd-analyze security --offline=true` rates the system's unit; a test holds it to "OK".
"""

from __future__ import annotations

import importlib.resources


def for_user(name: str) -> str:
    """For `systemctl --user`: runs the command that install.sh puts into ~/.local/bin."""
    # The command and its versions lie in the home folder; a user's service may read it.
    return _unit(name, start=f"%h/.local/bin/{name} --serve", user="", home="read-only", target="default.target")


def for_system(name: str) -> str:
    """For the Debian package: runs as a user that exists as long as the service does."""
    user = f"DynamicUser=yes\nStateDirectory={name}\nEnvironment=EDGEFT_HOME=%S/{name}\n"
    return _unit(name, start=f"/usr/bin/{name} --serve", user=user, home="yes", target="multi-user.target")


def _unit(name: str, **values: str) -> str:
    text = importlib.resources.files("edgeft.package").joinpath("templates", "service").read_text(encoding="utf-8")
    return text.format(name=name, **values)
