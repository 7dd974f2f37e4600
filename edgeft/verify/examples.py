"""Which held-out examples a file is compared on."""

from __future__ import annotations

from pathlib import Path

from edgeft.data.example import Example
from edgeft.data.load import dataset_digest, load_split, resolve_dataset, split_files
from edgeft.errors import UsageError
from edgeft.run import Run


def held_out(run: Run | None, data: str | None = None, split: str | None = None) -> tuple[list[Example], list[str]]:
    """The examples asked for, or the run's test split (without one, its validation split), and notes for the user.

    Raises:
        UsageError: neither a run nor a data set is given.
        DataError: the data set cannot be read or has no such split.
    """
    notes: list[str] = []
    reference = data
    if reference is None:
        if run is None:
            raise UsageError("what to compare on is not known", "Give a data set with --data.")
        recorded = run.manifest().data
        reference = str(recorded["path"] if Path(recorded["path"]).exists() else recorded["reference"])
        split = split or recorded.get("held_out")
        if dataset_digest(reference) != recorded["digest"]:
            notes.append(f"{reference} has changed since the run was trained on it")
    if split is None:
        path = resolve_dataset(reference)
        split = "valid" if path.is_dir() and "test" not in split_files(path) else "test"
    return load_split(reference, split), notes
