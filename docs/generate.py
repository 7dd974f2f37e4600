"""Write docs/cli.md from the commands themselves, or check that it is up to date.

python docs/generate.py [--check]
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import click

from edgeft.cli.main import cli

PAGE = Path(__file__).parent / "cli.md"
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


def main() -> int:
    page = HEAD + "".join(commands(cli, ("edgeft",), None))
    if "--check" not in sys.argv:
        PAGE.write_text(page, encoding="utf-8")
        return 0
    if PAGE.read_text(encoding="utf-8") == page:
        return 0
    print(f"{PAGE} is out of date: run `make docs`", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
