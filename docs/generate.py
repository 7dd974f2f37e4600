"""Write cli.md from the commands, gguf-models.md and parity.md from the tests, forecast.md and other tables from
benchmarks' data, or check that they are up to date.

python docs/generate.py [--check]
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import click

from edgeft.cli.main import cli

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import parity_types
import published
import quantization_aware_tables
import tiny_families
from edgeft.converters.families import FAMILIES
from edgeft.converters.families.family import Family
from reference import FILE_TYPES

PAGE = Path(__file__).parent / "cli.md"
MODELS = Path(__file__).parent / "gguf-models.md"
PARITY = Path(__file__).parent / "parity.md"
FORECAST = Path(__file__).parent / "forecast.md"
HEAD = "# Command reference\n\nMade from the commands' own help by `make docs`; do not edit.\n"


def commands(command: click.Command, path: tuple[str, ...], parent: click.Context | None) -> Iterator[str]:
    """The help of a command and of everything below it, each as a Markdown section."""
    context = click.Context(command, info_name=path[-1], parent=parent, max_content_width=100, terminal_width=100)
    yield f"\n## {' '.join(path)}\n\n```text\n{command.get_help(context)}\n```\n"
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            child = command.get_command(context, name)
            if child is not None:
                yield from commands(child, (*path, name), context)


def models() -> Iterator[str]:
    """A table of the families that can be exported and what is tested of each."""
    yield MODELS_HEAD
    for family in FAMILIES:
        cases = [case for case in tiny_families.CONVERTED if case.family == _tested_as(family)]
        kinds = dict.fromkeys(TOKENIZERS[case.tokenizer] for case in cases)
        variants = dict.fromkeys(case.variant for case in tiny_families.COMPUTED if case.family == _tested_as(family))
        classes = ", ".join(f"`{name}`" for name in family.classes)
        rope = ", ".join(kind for kind in family.rope if kind not in ("default", "su")) or "none"
        also = ", ".join(name for name in variants if name) or "–"
        yield f"| `{family.name}` | {classes} | {', '.join(kinds)} | {rope} | {also} |\n"
    targets = ", ".join(f"`{target}`" for target in FILE_TYPES)
    yield f"\n{len(tiny_families.CONVERTED)} tiny models × {targets}: all tensors are the reference's, byte for byte.\n"


def _tested_as(family: Family) -> str:
    return family.model_types[0] if family.model_types[0] in tiny_families.CLASSES else family.name


MODELS_HEAD = """# Models that can be exported to GGUF

Made from `converters/families/` and the tests by `make docs`; do not edit. [Adding one](adding-an-architecture.md).

Every family is exported with every tokenizer and variant below, tied and untied where llama.cpp has both, and compared
with llama.cpp's converter and quantizer (`tests/test_export_parity.py`) and with transformers' logits
(`tests/test_families.py`).

| architecture | classes | tokenizers tested | rope scaling | variants tested |
|---|---|---|---|---|
"""
TOKENIZERS = {"bytes": "byte-level BPE", "pieces": "SentencePiece"}


def parity() -> Iterator[str]:
    """Type × architecture, with the kinds of tokenizers; bold: compared in every run."""
    covered, families = parity_types.covered(), list(tiny_families.CLASSES)
    tested = {(pair.case.family, pair.target) for pair in parity_types.TESTED}
    yield PARITY_HEAD.format(
        pairs=len(covered),
        files=len(parity_types.MATRIX),
        tested=len(parity_types.TESTED),
        wide=f"{parity_types.WIDE.hidden}",
        narrow=f"{parity_types.NARROW.hidden} and {parity_types.NARROW.ffn}",
    )
    yield f"| type | {' | '.join(families)} |\n|---|{'---|' * len(families)}\n"
    for target in parity_types.TARGETS:
        cells = []
        for family in families:
            letters = " ".join(LETTERS[kind] for kind in sorted(covered[family, target]))
            cells.append(f"**{letters}**" if (family, target) in tested else letters)
        yield f"| `{target.removeprefix('gguf-')}` | {' | '.join(cells)} |\n"


LETTERS = {"bytes": "B", "pieces": "S"}
PARITY_HEAD = """# Exports that are compared with llama.cpp's

Made from `tests/parity_types.py` by `make docs`; do not edit.

{pairs} pairs of a type and an architecture, {files} files: a tiny random model of every architecture, with each kind of
tokenizer that its models have (B: byte-level BPE, S: SentencePiece with byte fallback), once with rows of {wide}
weights, which fill the blocks of every type, and once with rows of {narrow}, which fill none of 256. Each is
converted by llama.cpp's converter and quantized by llama.cpp's quantizer, with an importance matrix where the type
needs one; every tensor of edgeft's file has the same name, shape, type and bytes, in the same order. `bf16` and `f32`
are compared with the converter's own file.

`make parity` compares them all. Bold: among the {tested} files that `make test-reference` compares in every run.
Metadata, published tokenizers, variants of architectures and adapters are compared as well, in Q4_0, Q8_0 and Q4_K_M:
[models](gguf-models.md), [metadata](gguf-metadata.md).

"""


def main() -> int:
    pages = {
        PAGE: HEAD + "".join(commands(cli, ("edgeft",), None)),
        MODELS: "".join(models()),
        PARITY: "".join(parity()),
        FORECAST: published.page(published.Published()),
        **quantization_aware_tables.pages(),
    }
    if "--check" not in sys.argv:
        for file, text in pages.items():
            file.write_text(text, encoding="utf-8")
        return 0
    stale = [file for file, text in pages.items() if not file.is_file() or file.read_text(encoding="utf-8") != text]
    for file in stale:
        print(f"{file} is out of date: run `make docs`", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
