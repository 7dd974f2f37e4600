"""Checkpoints: everything the next step depends on, as safetensors and JSON (no pickle), complete or not there.

checkpoints/step-00000120/
  weights.safetensors      what is trained, by parameter name
  optimizer.safetensors    Adam's moments, as `<parameter>|exp_avg`
  random.safetensors       states of torch's generators
  state.json               step, learning-rate schedule, progress; SHA-256 of the other files
  trainer_state.json       transformers' own bookkeeping
checkpoints/best/          weights.safetensors and state.json of the best validation

A folder is written under a name that starts with a dot, synced and renamed. One whose digests do not match (a disk
that lost power) is passed over for the one before.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgeft.errors import ModelError, WriteError
from edgeft.paths import parse_json, sha256_file, sync_directory

BEST = "best"
SCHEMA = 1


def write(folder: Path, name: str, tensors: Mapping[str, Mapping[str, Any]], state: dict[str, Any]) -> Path:
    """Write one checkpoint atomically; an existing one of that name is replaced.

    Args:
        folder: the run's checkpoints.
        tensors: file name -> tensor name -> torch tensor.
        state: JSON values; `files` with the digests is added, `trainer` goes into trainer_state.json.

    Raises:
        WriteError: nothing that looks complete was left behind.
    """
    from safetensors.torch import save

    temporary, final = folder / f".{name}.tmp", folder / name
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        digests = {}
        for file, named in tensors.items():
            contiguous = {key: tensor.detach().cpu().contiguous() for key, tensor in named.items()}
            _write_synced(temporary / file, save(contiguous))
            digests[file] = sha256_file(temporary / file)
        content = dict(state)
        if "trainer" in content:
            _write_synced(temporary / "trainer_state.json", json.dumps(content.pop("trainer")).encode())
        _write_synced(temporary / "state.json", json.dumps({"schema": SCHEMA, **content, "files": digests}).encode())
        _replace(temporary, final)
    except OSError as error:
        raise WriteError.from_os_error(error, final) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return final


def _write_synced(file: Path, content: bytes) -> None:
    with file.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def _replace(temporary: Path, final: Path) -> None:
    """Rename a folder over another. Folders cannot be swapped in one call everywhere: the old one steps aside."""
    sync_directory(temporary)
    old = final.with_name(f".{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    temporary.rename(final)
    sync_directory(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Tidy up after a kill: finish a replacement that was cut between its two renames, remove partial folders."""
    for old in folder.glob(".*.old"):
        final = folder / old.name[1:-4]
        if final.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.rename(final)
    for temporary in folder.glob(".*.tmp"):
        shutil.rmtree(temporary, ignore_errors=True)


def latest(folder: Path) -> Path | None:
    """The newest checkpoint whose files are all intact."""
    return next((path for path in reversed(steps(folder)) if is_intact(path)), None)


def steps(folder: Path) -> list[Path]:
    """Checkpoints, oldest first."""
    return sorted(folder.glob("step-*"))


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def is_intact(path: Path) -> bool:
    try:
        state = read_state(path)
        return all(sha256_file(path / file) == digest for file, digest in state["files"].items())
    except (ModelError, OSError):
        return False


def read_state(path: Path) -> dict[str, Any]:
    """Raises: ModelError when state.json is missing or from another version."""
    file = path / "state.json"
    try:
        state: dict[str, Any] = parse_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} cannot be read: {error}") from error
    if state.get("schema") != SCHEMA or "files" not in state:
        raise ModelError(f"{file} has schema {state.get('schema')}; this edgeft reads schema {SCHEMA}")
    return state


def read_tensors(path: Path, file: str) -> dict[str, Any]:
    from safetensors.torch import load_file

    tensors: dict[str, Any] = load_file(path / file)
    return tensors


def prune(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints; the best weights stay."""
    for path in steps(folder)[:-keep]:
        shutil.rmtree(path, ignore_errors=True)
