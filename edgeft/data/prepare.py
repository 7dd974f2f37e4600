"""From files in any format to a prepared folder: train, valid and test.jsonl in canonical form, and data.json."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

from edgeft.data.check import leakage, read_all
from edgeft.data.duplicates import near_duplicates
from edgeft.data.example import Preference
from edgeft.data.formats import Format, as_record, chosen_answer
from edgeft.data.load import (
    MANIFEST,
    SHARES,
    SPLITS,
    content_digest,
    dataset_digest,
    resolve_dataset,
    split_files,
    split_of,
    spoken_text,
)
from edgeft.data.pii import Scrubber
from edgeft.data.readers import BadLine, Record
from edgeft.errors import DataError, UsageError, WriteError
from edgeft.paths import sync_directory, write_json, write_text
from edgeft.progress import Progress, Silent

SCHEMA = 1


@dataclass(frozen=True)
class Options:
    as_format: Format | None = None
    shares: Mapping[str, float] = field(default_factory=lambda: dict(SHARES))
    """Share of each held-out split, for a source that is one file."""
    exact: bool = True
    near: float | None = 0.9
    """Jaccard similarity from which two examples count as one; None keeps near-duplicates."""
    leaks: bool = True
    """Take out of the training split what a held-out split also has."""
    scrub_pii: bool = False
    preferences: Literal["keep", "chosen"] = "keep"
    name: str = ""
    licence: str | None = None


SPLIT_ONLY = Options(exact=False, near=None, leaks=False)


@dataclass
class Prepared:
    """What came of it; every line of the source is in a split, in `bad`, or counted in `removed`."""

    splits: dict[str, list[Record]]
    bad: list[BadLine]
    removed: Counter[str]
    """Reason -> examples taken out."""
    scrubbed: Counter[str]
    """Kind of personal data -> places replaced."""
    source_digest: str
    moved: int = 0
    """Examples that a tiny data set's hash would all have put into one split."""

    def counts(self) -> dict[str, int]:
        return {name: len(records) for name, records in self.splits.items()}


def prepare(reference: str | Path, options: Options, progress: Progress | None = None) -> Prepared:
    """Everything but the writing.

    Raises:
        DataError: nothing usable, or examples and preference pairs in one data set.
        MissingDependency: numpy, or datafog for `scrub_pii`.
    """
    watcher = progress or Silent()
    splits, bad = _read(resolve_dataset(reference), options, watcher)
    scrubber = Scrubber() if options.scrub_pii else None
    splits = {name: [_converted(record, options, scrubber) for record in records] for name, records in splits.items()}
    removed: Counter[str] = Counter()
    _dedupe(splits, options, removed, watcher)
    moved = 0
    if "all" in splits:
        splits, moved = assign(splits["all"], options.shares)
    elif options.leaks:
        _remove_leaks(splits, removed)
    _refuse_unusable(splits, reference)
    scrubbed = scrubber.found if scrubber else Counter[str]()
    return Prepared(splits, bad, removed, scrubbed, dataset_digest(reference), moved)


def _read(path: Path, options: Options, progress: Progress) -> tuple[dict[str, list[Record]], list[BadLine]]:
    files = {"all": path} if path.is_file() else split_files(path)
    splits: dict[str, list[Record]] = {}
    bad: list[BadLine] = []
    for name, file in files.items():
        progress.start(f"reading {file.name}", None, "lines")
        splits[name], more = read_all(file, options.as_format, progress)
        progress.finish()
        bad += more
    if not any(splits.values()):
        first = f": {bad[0]}" if bad else ""
        raise DataError(f"{path} holds no usable example{first}", "edgeft data check lists what is wrong.")
    return splits, bad


def _converted(record: Record, options: Options, scrubber: Scrubber | None) -> Record:
    item = record.item
    if options.preferences == "chosen" and isinstance(item, Preference):
        item = chosen_answer(item)
    return replace(record, item=scrubber.item(item) if scrubber else item)


def _dedupe(splits: dict[str, list[Record]], options: Options, removed: Counter[str], progress: Progress) -> None:
    """Within each split; across splits it is leakage."""
    for name, records in splits.items():
        kept = records
        if options.exact:
            first: dict[str, Record] = {}
            for record in records:
                first.setdefault(content_digest(record.item), record)
            kept = list(first.values())
            removed["duplicate"] += len(records) - len(kept)
        if options.near is not None:
            progress.start("near-duplicates", len(kept), "examples")
            texts = map(_counting(progress), kept)
            found = near_duplicates(texts, options.near)
            progress.finish()
            removed["near-duplicate"] += sum(place is not None for place in found)
            kept = [record for record, place in zip(kept, found, strict=True) if place is None]
        splits[name] = kept


def _counting(progress: Progress) -> Callable[[Record], str]:
    def text(record: Record) -> str:
        progress.advance(1)
        return spoken_text(record.item)

    return text


def _remove_leaks(splits: dict[str, list[Record]], removed: Counter[str]) -> None:
    """The smaller, held-out splits stay whole: test first, then valid, then train gives way."""
    ordered = {name: splits[name] for name in reversed(SPLITS) if name in splits}
    leaks = {(place.file, place.line) for place in leakage(ordered)}
    for name, records in splits.items():
        kept = [record for record in records if (record.file, record.line) not in leaks]
        removed["leak"] += len(records) - len(kept)
        splits[name] = kept


def assign(records: list[Record], shares: Mapping[str, float]) -> tuple[dict[str, list[Record]], int]:
    """Split by content; a split that is wanted and would be empty gets the train example of the lowest digest.

    Returns:
        The splits, and how many examples had to be moved.
    """
    wanted = {name: share for name, share in shares.items() if share > 0}
    splits: dict[str, list[Record]] = {name: [] for name in SPLITS if name == "train" or name in wanted}
    for record in records:
        splits[split_of(record.item, wanted)].append(record)
    empty = [name for name in wanted if not splits[name]]
    ranked = sorted(splits["train"], key=lambda record: content_digest(record.item))
    moved = 0
    for name, record in zip(empty, ranked[: max(len(ranked) - 1, 0)], strict=False):
        splits["train"].remove(record)
        splits[name].append(record)
        moved += 1
    return splits, moved


def _refuse_unusable(splits: Mapping[str, list[Record]], reference: str | Path) -> None:
    for name, records in splits.items():
        if not records:
            raise DataError(
                f"the {name} split of {reference} is empty", "Add examples, or give --valid 0 or --test 0 for a file."
            )
    kinds = {isinstance(record.item, Preference) for records in splits.values() for record in records}
    if len(kinds) > 1:
        raise DataError(
            f"{reference} mixes preference pairs with examples", "--preferences chosen keeps the preferred answers."
        )


# --- Writing ----------------------------------------------------------------------------


def write_prepared(prepared: Prepared, out: Path, options: Options, *, force: bool = False) -> dict[str, Any]:
    """Write a prepared folder beside its final name, then rename it: it is there whole or not at all.

    Returns:
        What data.json holds.

    Raises:
        UsageError: when `out` exists and `force` is false, or is not a prepared folder.
        WriteError: when it cannot be written.
    """
    check_target(out, force=force)
    scratch = out.with_name(f".{out.name}.{secrets.token_hex(4)}.tmp")
    try:
        scratch.mkdir(parents=True)
        manifest = _write_files(prepared, scratch, out.name, options)
        _swap(scratch, out)
    except OSError as error:
        raise WriteError.from_os_error(error, out) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return manifest


def check_target(out: Path, *, force: bool) -> None:
    """Raises: UsageError when a prepared folder cannot go there."""
    if not out.exists():
        return
    if not force:
        raise UsageError(f"{out} exists", "Give another --out, or --force to replace it.")
    if not out.is_dir():
        raise UsageError(f"{out} is a file, not a prepared data set", "Give another --out.")
    strangers = {entry.name for entry in out.iterdir()} - {f"{name}.jsonl" for name in SPLITS} - {MANIFEST}
    if strangers:
        raise UsageError(f"{out} is not a prepared data set: it also holds {min(strangers)}", "Give another --out.")


def _write_files(prepared: Prepared, folder: Path, name: str, options: Options) -> dict[str, Any]:
    texts = {
        split: "".join(json.dumps(as_record(record.item), ensure_ascii=False) + "\n" for record in records)
        for split, records in prepared.splits.items()
    }
    for split, text in texts.items():
        write_text(folder / f"{split}.jsonl", text)
    manifest = {
        "schema": SCHEMA,
        "name": options.name or name,
        "format": _format(prepared),
        "licence": options.licence,
        "digest": dataset_digest(folder),
        "source_digest": prepared.source_digest,
        "splits": {
            split: {"examples": len(prepared.splits[split]), "sha256": sha256(text.encode()).hexdigest()}
            for split, text in texts.items()
        },
        "bad_lines": len(prepared.bad),
        "removed": dict(prepared.removed),
        "scrubbed": dict(prepared.scrubbed),
        "options": {key: value for key, value in asdict(options).items() if key not in ("name", "licence")},
    }
    write_json(folder / MANIFEST, manifest)
    return manifest


def _format(prepared: Prepared) -> str:
    items = [record.item for records in prepared.splits.values() for record in records]
    if isinstance(items[0], Preference):
        return "preference"
    kinds = {"messages" if not isinstance(item, Preference) and item.text is None else "text" for item in items}
    return kinds.pop() if len(kinds) == 1 else "mixed"


def _swap(scratch: Path, out: Path) -> None:
    """Put a folder in the place of another; renaming onto a folder with files in it is not possible."""
    old = scratch.with_name(scratch.name + ".old")
    if out.exists():
        os.rename(out, old)
    os.rename(scratch, out)
    sync_directory(out.parent)
    shutil.rmtree(old, ignore_errors=True)
