"""What the benchmarks of quantization-aware training train on and judge by."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MODEL = "smollm2-135m"
TRAIN = {"text": 300, "demo": 1900}
"""Examples: about 160 and 170 steps."""
TEST = {"text": 57, "demo": 200}
VALIDATION = {"text": 24, "demo": 150}
"""Examples that settings are chosen on: neither trained on nor tested on."""
MORE, MORE_SEED = 1000, 1
"""More held-out commands, made of the words and templates of the test split with another seed."""
PIECE = 800
"""Characters of a piece of general text, about 200 tokens."""


def prepare_data(work: Path) -> None:
    """Validation lies beside the folders of the tasks: training would stop early by it, or keep other weights."""
    if not (work / "demo" / "test.jsonl").is_file():
        prepare_text(work)
        prepare_demo(work)
    if not (work / "demo-more" / "test.jsonl").is_file():
        write_lines(work / "demo-more", "test", more_commands())


def prepare_text(work: Path) -> None:
    pieces = iter(text_pieces())
    for folder, split, count in (
        ("text-validation", "valid", VALIDATION["text"]),
        ("text", "train", TRAIN["text"]),
        ("text", "test", TEST["text"]),
    ):
        write_lines(work / folder, split, [json.dumps({"text": piece}) for piece in itertools.islice(pieces, count)])


def prepare_demo(work: Path) -> None:
    from edgeft.data.load import resolve_dataset

    demo = Path(resolve_dataset("smart-home"))
    for folder, split, count in (
        ("demo-validation", "valid", VALIDATION["demo"]),
        ("demo", "train", TRAIN["demo"]),
        ("demo", "test", TEST["demo"]),
    ):
        write_lines(work / folder, split, (demo / f"{split}.jsonl").read_text().splitlines()[:count])


def more_commands() -> list[str]:
    """None of them is in the data set."""
    from edgeft.data.smart_home.generate import commands, lines
    from edgeft.data.smart_home.vocabulary import SPLITS

    known = {command.core for split in SPLITS for command in commands(split)}
    return lines(commands("test", MORE, MORE_SEED, known)).splitlines()


def text_pieces() -> list[str]:
    """The Python language reference in pieces, shuffled."""
    from pydoc_data.topics import topics

    pieces = []
    for name in sorted(topics):
        piece = ""
        for paragraph in topics[name].split("\n\n"):
            piece += paragraph + "\n\n"
            if len(piece) >= PIECE:
                pieces.append(piece[: 2 * PIECE].strip())
                piece = ""
    # Topics share paragraphs: without this, two of the held-out pieces were trained on.
    pieces = list(dict.fromkeys(pieces))
    random.Random(0).shuffle(pieces)
    return pieces


def write_lines(folder: Path, split: str, lines: Sequence[str]) -> None:
    folder.mkdir(exist_ok=True)
    (folder / f"{split}.jsonl").write_text("".join(line + "\n" for line in lines))


def encoded(folder: Path, split: str = "test") -> list[Any]:
    from edgeft.data.encode import encode_all
    from edgeft.data.load import load_split
    from edgeft.models import resolve
    from edgeft.models.text import load_text_side

    text = load_text_side(resolve(MODEL, want="hf").path)
    return encode_all(load_split(folder, split), text.need_template(), text.tokenize, text.eos_tokens).encoded
