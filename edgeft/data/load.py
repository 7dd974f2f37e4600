"""Data sets by reference: the built-in one, a prepared directory, or one file in any supported format."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from hashlib import sha256
from pathlib import Path

from edgeft.chat import Message
from edgeft.data.example import Example, Preference
from edgeft.data.formats import Format, as_record
from edgeft.data.readers import SUFFIXES, BadLine, Record, read_records
from edgeft.errors import DataError
from edgeft.paths import sha256_file

SPLITS = ("train", "valid", "test")
ALIASES = {"validation": "valid", "val": "valid", "dev": "valid", "eval": "valid"}
"""Other names that a split's file may have."""
BUILT_IN = ("smart-home",)
MANIFEST = "data.json"
SHARES = {"valid": 0.05, "test": 0.05}
"""Of a single file, by content digest; the rest is the training split."""

Report = Callable[[BadLine], None]


class DataWarning(UserWarning):
    """Lines of a data set could not be used."""


def resolve_dataset(reference: str | Path) -> Path:
    """The folder or file that a reference names. A built-in name wins; write ./smart-home for a folder of that name.

    Raises:
        DataError: when there is nothing of that name.
    """
    if str(reference) in BUILT_IN:
        return Path(__file__).parent / str(reference).replace("-", "_")
    path = Path(reference).expanduser()
    if not path.exists():
        raise DataError(
            f"no data set at {path}", f"Give a file, a prepared folder, or a built-in name: {', '.join(BUILT_IN)}."
        )
    return path


def split_files(folder: Path) -> dict[str, Path]:
    """Split name -> file in a folder, in the order train, valid, test; only the splits that are there.

    Raises:
        DataError: when two files claim one split.
    """
    found: dict[str, Path] = {}
    for file in sorted(folder.iterdir()):
        split = ALIASES.get(file.stem, file.stem)
        if split not in SPLITS or file.suffix.lower() not in SUFFIXES:
            continue
        if split in found:
            raise DataError(f"{folder} has two {split} splits: {found[split].name} and {file.name}", "Remove one.")
        found[split] = file
    return {split: found[split] for split in SPLITS if split in found}


def dataset_digest(reference: str | Path) -> str:
    """Hex SHA-256 over the data as it is now, whatever a manifest says.

    A file: of its bytes. A folder: of one line "split sha256" per split, in the order train, valid, test.

    Raises:
        DataError: when there is no such data set.
    """
    path = resolve_dataset(reference)
    if path.is_file():
        return sha256_file(path)
    files = _files_of(path)
    listed = "".join(f"{split} {sha256_file(files[split])}\n" for split in SPLITS if split in files)
    return sha256(listed.encode()).hexdigest()


def load_split(
    reference: str | Path, split: str, *, as_format: Format | None = None, on_bad: Report | None = None
) -> list[Example]:
    """The examples of one split, in file order.

    Args:
        split: train, valid or test. A single file is split by content digest (90/5/5 percent), which adding lines
            does not change.
        on_bad: told about each line that cannot be used; without it they are listed in a `DataWarning`.

    Raises:
        DataError: unknown data set, missing or empty split, or preference pairs instead of examples.
    """
    examples = []
    for record in load_records(reference, split, as_format=as_format, on_bad=on_bad):
        if isinstance(record.item, Preference):
            raise DataError(
                f"{record.file}:{record.line}: a preference pair, not an example",
                "edgeft data prepare --preferences chosen keeps the preferred answers as examples.",
            )
        examples.append(record.item)
    return examples


def load_records(
    reference: str | Path, split: str, *, as_format: Format | None = None, on_bad: Report | None = None
) -> list[Record]:
    """As `load_split`, with each example's (or preference pair's) file and line."""
    if split not in SPLITS:
        raise DataError(f"no split named {split!r}", f"There are: {', '.join(SPLITS)}.")
    path = resolve_dataset(reference)
    bad: list[BadLine] = []
    report = bad.append if on_bad is None else on_bad
    if path.is_file():
        records = [item for item in _good(path, as_format, report) if split_of(item.item) == split]
        where = f"{path} has no example for the {split} split"
        hint = "A single file is split by content, and this one is small: edgeft data split makes exact splits."
    else:
        files = _files_of(path)
        if split not in files:
            raise DataError(f"{path} has no {split} split, only {', '.join(files)}", "edgeft data split makes one.")
        records = list(_good(files[split], as_format, report))
        where, hint = f"{files[split]} holds no usable example", "edgeft data check says why."
    if bad:
        warnings.warn(summary(bad), DataWarning, stacklevel=3)
    if not records and bad and path.is_file():
        raise DataError(f"{path} holds no usable example: {bad[0]}", "edgeft data check lists what is wrong.")
    if not records:
        raise DataError(where, hint)
    return records


def _files_of(folder: Path) -> dict[str, Path]:
    files = split_files(folder)
    if not files:
        raise DataError(
            f"{folder} holds no train, valid or test file ({', '.join(SUFFIXES)})", "edgeft data prepare makes them."
        )
    return files


def _good(file: Path, as_format: Format | None, report: Report) -> Iterator[Record]:
    for item in read_records(file, as_format):
        if isinstance(item, BadLine):
            report(item)
        else:
            yield item


def summary(bad: Sequence[BadLine], shown: int = 5) -> str:
    """Bad lines in a few words: the first places, and how many more."""
    more = f"\n… and {len(bad) - shown} more" if len(bad) > shown else ""
    return f"{len(bad)} lines left out:\n" + "\n".join(map(str, bad[:shown])) + more


def content_digest(item: Example | Preference) -> str:
    """Hex SHA-256 of the canonical JSON of an example."""
    return sha256(canonical_json(item).encode()).hexdigest()


def canonical_json(item: Example | Preference) -> str:
    return json.dumps(as_record(item), ensure_ascii=False, sort_keys=True, separators=(",", ":"))


def split_of(item: Example | Preference, shares: dict[str, float] | None = None) -> str:
    """The split an example belongs to, by its *prompt's* digest: answers to one question never part."""
    fraction = int(sha256(prompt_key(item).encode()).hexdigest()[:16], 16) / 2**64
    start = 0.0
    for split, share in (SHARES if shares is None else shares).items():
        start += share
        if fraction < start:
            return split
    return "train"


def prompt_key(item: Example | Preference) -> str:
    """What an example asks, lower-cased and with single spaces; of plain text all of it."""
    if isinstance(item, Preference):
        messages: Sequence[Message] = item.prompt
    elif item.text is not None:
        return _normal(item.text)
    else:
        messages = [message for message in item.messages if message["role"] != "assistant"]
    return _normal("\n".join(f"{message['role']}: {message.get('content') or ''}" for message in messages))


def spoken_text(item: Example | Preference) -> str:
    """What is said in an example, normalised; without system prompts, which many examples share."""
    if isinstance(item, Preference):
        messages: Sequence[Message] = (*item.prompt, *item.chosen, *item.rejected)
    elif item.text is not None:
        return _normal(item.text)
    else:
        messages = item.messages
    return _normal("\n".join(str(message.get("content") or "") for message in messages if message["role"] != "system"))


def _normal(text: str) -> str:
    return " ".join(text.casefold().split())
