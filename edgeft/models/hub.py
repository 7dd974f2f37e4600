"""References to a model hub, through huggingface_hub: its cache resumes downloads and shares files."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeft import config
from edgeft.errors import ModelError, Unreachable, UsageError, require
from edgeft.models.store import hub_dir
from edgeft.progress import Progress, Silent

PREFIX = "hf:"
_PATTERN = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[^:]+))?(?::(?P<file>.+\.gguf))?")
_WANTED = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "LICENSE*", "README.md")
"""What training and export read; not the same weights in other formats."""


@dataclass(frozen=True)
class HubReference:
    """`hf:org/name[@revision][:file.gguf]`."""

    repo: str
    revision: str | None = None
    file: str | None = None


def parse(reference: str) -> HubReference:
    """Raises: UsageError when `reference` is not of the form hf:org/name[@revision][:file.gguf]."""
    match = _PATTERN.fullmatch(reference.removeprefix(PREFIX))
    if match is None:
        raise UsageError(f"{reference!r} is not a hub reference", "Write hf:org/name, hf:org/name@revision:file.gguf.")
    return HubReference(match["repo"], match["revision"], match["file"])


def fetch(reference: HubReference, progress: Progress | None = None, *, here_only: bool = False) -> Path:
    """The model's folder (or GGUF file) in the store, downloaded where it is missing; an interrupted one continues.

    Args:
        here_only: use what is in the store, fetch nothing.

    Raises:
        MissingDependency: huggingface_hub is not installed.
        Unreachable: no network, or the network is forbidden and the model is not here.
        ModelError: the hub has no such model, revision or file, or it needs an account.
    """
    hub = require("huggingface_hub", "train")
    errors = require("huggingface_hub.errors", "train")
    offline = bool(config.load()["models.offline"].value)
    progress = progress or Silent()
    progress.start(f"Fetching {reference.repo}", None)
    try:
        return Path(_fetch(hub, reference, offline or here_only))
    except errors.GatedRepoError as error:
        raise ModelError(f"{reference.repo} asks for an account and its licence accepted", "hf auth login") from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.RemoteEntryNotFoundError) as error:
        raise ModelError(f"the hub has no {_named(reference)}", "Check the name, the revision and the file.") from error
    except errors.HFValidationError as error:
        raise UsageError(f"{reference.repo!r} cannot be the name of a model: {error}") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, errors.HfHubHTTPError, OSError) as error:
        raise _unreachable(reference, offline, here_only, error) from error
    finally:
        progress.finish()


def _fetch(hub: Any, reference: HubReference, offline: bool) -> str:
    common = {"revision": reference.revision, "cache_dir": hub_dir(), "local_files_only": offline}
    if reference.file:
        return str(hub.hf_hub_download(reference.repo, reference.file, **common))
    return str(hub.snapshot_download(reference.repo, allow_patterns=list(_WANTED), **common))


def _named(reference: HubReference) -> str:
    revision = f" at {reference.revision}" if reference.revision else ""
    file = f" with a file {reference.file}" if reference.file else ""
    return f"{reference.repo}{revision}{file}"


def _unreachable(reference: HubReference, offline: bool, here_only: bool, error: Exception) -> Unreachable:
    forbidden = "models.offline" if offline else "HF_HUB_OFFLINE" if _hub_offline() else None
    if forbidden or here_only:
        why = f", and {forbidden} forbids fetching it" if forbidden else ""
        return Unreachable(
            f"{_named(reference)} is not on this machine{why}",
            "Fetch it where the network is allowed: edgeft models pull.",
        )
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return Unreachable(f"cannot fetch {_named(reference)}: {reason}", "Check the network and try again; it continues.")


def offline() -> bool:
    """Whether the network is forbidden for models of the hub."""
    return bool(config.load()["models.offline"].value) or _hub_offline()


def _hub_offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
