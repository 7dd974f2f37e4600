"""Token-for-token parity between a model's own tokenizer and the one in the exported file."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from edgeft.chat import TokenIds
from edgeft.verify.report import Finding

Tokenize = Callable[[str], TokenIds]
"""Text to ids; special tokens in the text are recognised, none is added."""


@dataclass(frozen=True)
class Mismatch:
    group: str
    text: str
    reference: TokenIds
    file: TokenIds

    @property
    def position(self) -> int:
        """Index of the first token that differs."""
        pairs = zip(self.reference, self.file, strict=False)
        return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(self.reference), len(self.file)))

    def __str__(self) -> str:
        start = max(0, self.position - 1)
        return (
            f"{self.group}: {self.text[:60]!r} parts at token {self.position}: "
            f"{self.reference[start : start + 4]} in the model, {self.file[start : start + 4]} in the file"
        )


def mismatches(reference: Tokenize, file: Tokenize, texts: Iterable[tuple[str, str]]) -> tuple[int, list[Mismatch]]:
    """How many (group, text) pairs were compared, and those on which the two part."""
    found, count = [], 0
    for group, text in texts:
        count += 1
        expected, got = reference(text), file(text)
        if expected != got:
            found.append(Mismatch(group, text, expected, got))
    return count, found


def check_tokenizer(reference: Tokenize, file: Tokenize, texts: Iterable[tuple[str, str]]) -> Finding:
    """Every text must give the same ids: one wrong split and the file reads another prompt than was trained."""
    count, found = mismatches(reference, file, texts)
    if not found:
        return Finding("tokenizer", True, f"{count} texts give the same tokens", 0, 0)
    shown = "; ".join(map(str, found[:3]))
    return Finding("tokenizer", False, f"{len(found)} of {count} texts give other tokens: {shown}", len(found), 0)
