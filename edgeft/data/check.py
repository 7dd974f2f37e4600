"""What a data set holds, and what is wrong with it."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgeft.chat import ChatTemplate
from edgeft.data.duplicates import NearIndex, near_duplicates
from edgeft.data.encode import Tokenize, TooLong, encode
from edgeft.data.example import Example, Note, Preference
from edgeft.data.formats import Format
from edgeft.data.load import content_digest, dataset_digest, prompt_key, resolve_dataset, split_files, spoken_text
from edgeft.data.readers import BadLine, Record, read_records
from edgeft.errors import DataError, EdgeftError
from edgeft.progress import Progress, Silent

ONE_ANSWER_LIMIT = 20
"""From so many examples on, a single answer to all of them is a mistake rather than a small test."""


@dataclass(frozen=True)
class Reader:
    """How a model reads text; see `edgeft.models.text`."""

    template: ChatTemplate
    tokenize: Tokenize
    eos_tokens: Sequence[str]
    context: int


@dataclass(frozen=True)
class Place:
    file: Path
    line: int
    what: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.what}"


@dataclass
class TokenStatistics:
    context: int
    lengths: list[int] = field(default_factory=list)
    learned: int = 0
    too_long: list[Place] = field(default_factory=list)
    refused: list[Place] = field(default_factory=list)
    """Conversations that the chat template does not render."""
    control: list[Place] = field(default_factory=list)
    """Texts that hold an end-of-turn token: the model would learn to stop there."""
    notes: Counter[Note] = field(default_factory=Counter)

    def quantile(self, share: float) -> int:
        """Length in tokens that `share` of the examples do not exceed."""
        ordered = sorted(self.lengths)
        return ordered[min(int(share * len(ordered)), len(ordered) - 1)] if ordered else 0

    def histogram(self, bins: int = 8) -> list[tuple[int, int, int]]:
        """(from, to, examples) over equal widths, ends inclusive."""
        if not self.lengths:
            return []
        low, high = min(self.lengths), max(self.lengths)
        width = max(1, -(-(high - low + 1) // bins))
        counts = Counter((length - low) // width for length in self.lengths)
        return [(low + at * width, low + (at + 1) * width - 1, counts[at]) for at in range(max(counts) + 1)]


@dataclass
class SplitReport:
    """One file. Places of duplicates name the later copy."""

    name: str
    file: Path
    examples: int
    formats: Counter[Format]
    bad: list[BadLine]
    exact: list[Place]
    near: list[Place]
    roles: list[Place]
    one_answer: bool
    """Whether every example has the same answer."""
    tokens: TokenStatistics | None = None


@dataclass
class Report:
    path: Path
    digest: str
    splits: list[SplitReport]
    leaks: list[Place]
    """Examples of a held-out split whose prompt, or nearly whose text, is also in an earlier split."""

    def problems(self) -> list[str]:
        """What makes the data unusable; empty when it can be trained on."""
        found = []
        for split in self.splits:
            if split.examples == 0:
                found.append(f"{split.file} holds no usable example")
            elif split.one_answer and split.examples >= ONE_ANSWER_LIMIT:
                found.append(f"all {split.examples} examples of {split.file} have the same answer")
            if split.tokens is not None and split.examples and not split.tokens.lengths:
                found.append(f"no example of {split.file} fits into {split.tokens.context} tokens")
            if {"preference"} < set(split.formats):
                found.append(f"{split.file} mixes preference pairs with examples")
        return found


def check(
    reference: str | Path,
    *,
    as_format: Format | None = None,
    reader: Reader | None = None,
    progress: Progress | None = None,
) -> Report:
    """Read a whole data set and report on it; nothing is written.

    Raises:
        DataError: when there is no such data set or a file cannot be read as a whole.
        MissingDependency: numpy (near-duplicates), or pyarrow for Parquet.
    """
    path = resolve_dataset(reference)
    files = {"all": path} if path.is_file() else split_files(path)
    if not files:
        raise DataError(f"{path} holds no train, valid or test file", "Give a file, or a folder with these.")
    watcher = progress or Silent()
    contents = {}
    for name, file in files.items():
        watcher.start(f"reading {file.name}", None, "lines")
        contents[name] = read_all(file, as_format, watcher)
        watcher.finish()
    splits = [_split_report(name, files[name], *contents[name], reader, watcher) for name in contents]
    leaks = list(leakage({name: records for name, (records, _) in contents.items()}))
    return Report(path, dataset_digest(reference), splits, leaks)


def read_all(file: Path, as_format: Format | None, progress: Progress) -> tuple[list[Record], list[BadLine]]:
    """Good and bad lines of a file."""
    good: list[Record] = []
    bad: list[BadLine] = []
    for item in read_records(file, as_format):
        progress.advance(1)
        if isinstance(item, BadLine):
            bad.append(item)
        else:
            good.append(item)
    return good, bad


def _split_report(
    name: str, file: Path, records: list[Record], bad: list[BadLine], reader: Reader | None, progress: Progress
) -> SplitReport:
    exact, near = _duplicates(records)
    answers = {_answer(record.item) for record in records}
    return SplitReport(
        name,
        file,
        len(records),
        Counter(record.format for record in records),
        bad,
        exact,
        near,
        roles=[place for record in records for place in _role_problems(record)],
        one_answer=len(records) > 1 and len(answers) == 1,
        tokens=_token_statistics(records, reader, progress) if reader else None,
    )


def _answer(item: Example | Preference) -> object:
    if isinstance(item, Preference):
        return content_digest(item)
    return item.text if item.text is not None else str(item.messages[-1])


def _duplicates(records: Sequence[Record]) -> tuple[list[Place], list[Place]]:
    """Exact and near-duplicates among records."""
    first: dict[str, Record] = {}
    exact: list[Place] = []
    for record in records:
        original = first.setdefault(content_digest(record.item), record)
        if original is not record:
            exact.append(Place(record.file, record.line, f"the same as line {original.line}"))
    unique = list(first.values())
    near = [
        Place(record.file, record.line, f"nearly the same as line {unique[found].line}")
        for record, found in zip(unique, near_duplicates(spoken_text(record.item) for record in unique), strict=True)
        if found is not None
    ]
    return exact, near


def leakage(splits: dict[str, list[Record]], threshold: float = 0.9) -> Iterator[Place]:
    """Records whose prompt, or nearly whose text, an earlier split of the mapping has."""
    index = NearIndex(threshold)
    known: list[tuple[str, Record]] = []
    prompts: dict[str, tuple[str, Record]] = {}
    for number, (name, records) in enumerate(splits.items(), 1):
        for record in records if number > 1 else ():
            other = prompts.get(prompt_key(record.item))
            if other is None and (found := index.find(spoken_text(record.item))) is not None:
                other = known[found]
            if other is not None:
                yield Place(record.file, record.line, f"also in {other[0]}, line {other[1].line}")
        for record in records if number < len(splits) else ():
            prompts.setdefault(prompt_key(record.item), (name, record))
            index.add(spoken_text(record.item))
            known.append((name, record))


def _role_problems(record: Record) -> Iterator[Place]:
    """Turns that many chat templates refuse or misread."""
    item = record.item
    roles = [message["role"] for message in (item.prompt if isinstance(item, Preference) else item.messages)]
    spoken = [role for role in roles if role not in ("system", "developer")]
    if any(role == "system" and before != "system" for before, role in itertools.pairwise(roles)):
        yield Place(record.file, record.line, "a system turn after the conversation began")
    if spoken and spoken[0] == "assistant":
        yield Place(record.file, record.line, "the assistant speaks first")
    if any(one == other == "user" for one, other in itertools.pairwise(spoken)):
        yield Place(record.file, record.line, "two user turns in a row")
    if any(one == other == "assistant" for one, other in itertools.pairwise(spoken)):
        yield Place(record.file, record.line, "two assistant turns in a row")


def _token_statistics(records: Sequence[Record], reader: Reader, progress: Progress) -> TokenStatistics:
    result = TokenStatistics(reader.context)
    progress.start("counting tokens", len(records), "examples")
    for record in records:
        progress.advance(1)
        for example in _examples(record.item):
            if found := _control_token(example, reader):
                result.control.append(Place(record.file, record.line, f"{found} in the text"))
            try:
                encoded = encode(example, reader.template, reader.tokenize, reader.eos_tokens, reader.context)
            except TooLong as error:
                result.too_long.append(Place(record.file, record.line, f"needs {error.tokens} tokens"))
            except EdgeftError as error:
                result.refused.append(Place(record.file, record.line, error.message))
            else:
                result.lengths.append(len(encoded.tokens))
                result.learned += sum(encoded.learned)
                result.notes.update(encoded.notes)
    progress.finish()
    return result


def _control_token(example: Example, reader: Reader) -> str | None:
    texts = [example.text or "", *(str(message.get("content") or "") for message in example.messages)]
    return next((token for token in reader.eos_tokens if any(token in text for text in texts)), None)


def _examples(item: Example | Preference) -> list[Example]:
    if isinstance(item, Example):
        return [item]
    return [Example((*item.prompt, *item.chosen)), Example((*item.prompt, *item.rejected))]


def require_variety(examples: Sequence[Example], where: str) -> None:
    """Refuse data that can teach nothing but one answer.

    Raises:
        DataError: when 20 examples or more all have the same one.
    """
    if len(examples) >= ONE_ANSWER_LIMIT and len({_answer(example) for example in examples}) == 1:
        raise DataError(
            f"all {len(examples)} examples of {where} have the same answer",
            "A model trained on them gives that answer to everything.",
        )


def first_examples(file: Path, as_format: Format | None, count: int) -> Iterator[list[dict[str, str]]]:
    """The first examples of a file as turns of `role` and `content`; a plain text is one turn."""
    records = (item for item in read_records(file, as_format) if isinstance(item, Record))
    for record in itertools.islice(records, count):
        example = _examples(record.item)[0]
        turns = [{"role": str(turn["role"]), "content": str(turn.get("content") or "")} for turn in example.messages]
        yield turns or [{"role": "text", "content": example.text or ""}]


def as_dict(report: Report) -> dict[str, Any]:
    """The report as plain values for JSON."""

    def split(item: SplitReport) -> dict[str, Any]:
        return {
            "file": str(item.file),
            "examples": item.examples,
            "formats": dict(item.formats),
            "bad_lines": [{"line": bad.line, "reason": bad.reason} for bad in item.bad],
            "duplicates": len(item.exact),
            "near_duplicates": len(item.near),
            "role_problems": [str(place) for place in item.roles],
            "tokens": _tokens_dict(item.tokens) if item.tokens else None,
        }

    return {
        "path": str(report.path),
        "digest": report.digest,
        "usable": not report.problems(),
        "problems": report.problems(),
        "splits": {item.name: split(item) for item in report.splits},
        "leaks": [str(place) for place in report.leaks],
    }


def _tokens_dict(tokens: TokenStatistics) -> dict[str, Any]:
    return {
        "context": tokens.context,
        "total": sum(tokens.lengths),
        "learned": tokens.learned,
        "median": tokens.quantile(0.5),
        "p95": tokens.quantile(0.95),
        "max": max(tokens.lengths, default=0),
        "too_long": [str(place) for place in tokens.too_long],
        "refused": [str(place) for place in tokens.refused],
        "control_tokens": [str(place) for place in tokens.control],
        "notes": dict(tokens.notes),
        "histogram": [{"from": low, "to": high, "examples": count} for low, high, count in tokens.histogram()],
    }
