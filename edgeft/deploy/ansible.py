"""A bundle as a playbook and role that ansible-core runs, with nothing but its built-in modules.

deploy.yml                      canary first, then in parallel, until too many fail
inventory.ini
roles/edgeft_bundle/tasks/      what the device lacks is asked, copied by digest, installed, and the command is asked
roles/edgeft_bundle/files/      agent.py, the requests, and every file of the bundle under its digest
"""

from __future__ import annotations

import importlib.resources
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgeft import paths
from edgeft.errors import UsageError, WriteError
from edgeft.package import wheels

from .fleet import Rollout
from .link import Device
from .parcel import Parcel

ROLE = Path("roles", "edgeft_bundle")


def write(parcel: Parcel, devices: Sequence[Device], rollout: Rollout, out: Path) -> list[str]:
    """Write everything below `out`, atomically; returns the files' names.

    Raises:
        UsageError: `out` exists. WriteError.
    """
    if out.exists():
        raise UsageError(f"{out} exists", "Remove it, or choose another --out.")
    try:
        with wheels.temporary_folder(out) as temporary:
            folder = Path(temporary) / "playbook"
            for name, text in _texts(parcel, devices, rollout).items():
                paths.write_text(folder / name, text)
            blobs = folder / ROLE / "files" / "blobs"
            blobs.mkdir()
            for digest, entry in parcel.files().items():
                shutil.copyfile(parcel.folder / entry.path, blobs / digest)
            folder.replace(out)
    except OSError as error:
        raise WriteError.from_os_error(error, out) from error
    return sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())


def _texts(parcel: Parcel, devices: Sequence[Device], rollout: Rollout) -> dict[str, str]:
    bundle = parcel.bundle
    agent = importlib.resources.files("edgeft.deploy").joinpath("agent.py").read_text(encoding="utf-8")
    wanted = [
        {"sha256": entry.sha256, "bytes": entry.bytes, "executable": entry.executable}
        for entry in parcel.files().values()
    ]
    task = {"manifest": parcel.manifest, "signature": parcel.signature, "question": bundle.question}
    install = {**task, "do": "install", "name": bundle.name, "expected": bundle.expected}
    values = {
        "BUNDLE_NAME": bundle.name,
        "BUNDLE_VERSION": bundle.version,
        "BUNDLE_ID": bundle.id,
        "BATCHES": f"{rollout.canary}\n    - {rollout.parallel}" if rollout.canary else str(rollout.parallel),
        "FAILURES": str(rollout.failures),
        "PARALLEL": str(rollout.parallel),
        "PERCENT": str(100 * rollout.failures // rollout.parallel),
    }
    return {
        "deploy.yml": _template("deploy.yml", values),
        "inventory.ini": "[edgeft]\n" + "".join(f"{_line(device)}\n" for device in devices),
        f"{ROLE}/defaults/main.yml": _template("defaults.yml", values),
        f"{ROLE}/tasks/main.yml": _template("tasks.yml", values),
        f"{ROLE}/files/agent.py": agent,
        f"{ROLE}/files/missing.json": _json({"do": "missing", "name": bundle.name, "files": wanted}),
        f"{ROLE}/files/install.json": _json(install),
    }


def _template(name: str, values: Mapping[str, str]) -> str:
    """YAML is full of braces, so that what is filled in is written in capitals."""
    text = importlib.resources.files("edgeft.deploy").joinpath("templates", name).read_text(encoding="utf-8")
    for key, value in values.items():
        text = text.replace(key, value)
    return text


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=1) + "\n"


def _line(device: Device) -> str:
    """A host of an INI inventory; values in JSON's quotes, which Ansible reads as strings."""
    known = {
        "ansible_host": device.host,
        "ansible_user": device.user,
        "ansible_port": device.port,
        "ansible_ssh_private_key_file": str(device.identity[0]) if device.identity else None,
        "ansible_python_interpreter": device.python,
        "edgeft_root": device.root,
        "edgeft_bin": device.bin,
        "ansible_ssh_common_args": f"-o UserKnownHostsFile={device.known_hosts}" if device.known_hosts else None,
    }
    return " ".join([device.label, *(f"{key}={json.dumps(value)}" for key, value in known.items() if value)])
