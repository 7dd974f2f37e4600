"""Write cli.md from the commands and gguf-models.md from the tests, or check that they are up to date.

python docs/generate.py [--check]
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import click

from edgeft.cli.main import cli

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import tiny_families
from edgeft.converters.families import FAMILIES
from edgeft.converters.families.family import Family
from reference import FILE_TYPES

PAGE = Path(__file__).parent / "cli.md"
MODELS = Path(__file__).parent / "gguf-models.md"
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


def main() -> int:
    pages = {PAGE: HEAD + "".join(commands(cli, ("edgeft",), None)), MODELS: "".join(models())}
    if "--check" not in sys.argv:
        for file, text in pages.items():
            file.write_text(text, encoding="utf-8")
        return 0
    stale = [file for file, text in pages.items() if file.read_text(encoding="utf-8") != text]
    for file in stale:
        print(f"{file} is out of date: run `make docs`", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
