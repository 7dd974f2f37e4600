"""Pictures of a terminal as SVG: a still, or the frames of a session one after another.

Lines and blocks are drawn as shapes, because fonts differ in how they join them; everything else is text in whatever
monospaced font the reader has, each run placed by its column. A row that several frames share is stored once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

from rich.ansi import AnsiDecoder
from rich.cells import cell_len
from rich.console import Console
from rich.segment import Segment
from rich.style import Style
from rich.terminal_theme import DEFAULT_TERMINAL_THEME
from rich.text import Text

WIDTH, HEIGHT, SIZE = 8.4, 18.0, 14.0
"""Of a cell and of its letters, in pixels."""
FOREGROUND, BACKGROUND = "#e0e0e0", "#121212"
FONTS = "ui-monospace, 'Cascadia Mono', 'SF Mono', Menlo, Consolas, 'DejaVu Sans Mono', 'Liberation Mono', monospace"
THEME = DEFAULT_TERMINAL_THEME

_CORNERS = dict(
    zip(
        "┌╭┐╮└╰┘╯├┤┬┴┼",
        ("es", "es", "sw", "sw", "ne", "ne", "nw", "nw", "nes", "nsw", "esw", "new", "nesw"),
        strict=True,
    )
)
_LINES = {
    **dict.fromkeys("─━╌╴╶╸╺", "ew"),
    **dict.fromkeys("│┃╎", "ns"),
    **_CORNERS,
    "╴": "w",
    "╸": "w",
    "╶": "e",
    "╺": "e",
}
"""Sides of the cell that a line goes to from the middle."""
_BLOCKS = {
    "█": (0, 0, 8, 8),
    "▀": (0, 0, 8, 4),
    "▔": (0, 0, 8, 1),
    "▐": (4, 0, 8, 8),
    "▕": (7, 0, 8, 8),
    **{chr(0x2580 + eighths): (0, 8 - eighths, 8, 8) for eighths in range(1, 8)},
    **{chr(0x2590 - eighths): (0, 0, eighths, 8) for eighths in range(1, 8)},
}
"""Left, top, right and bottom in eighths of the cell."""


@dataclass(frozen=True)
class Frame:
    """What a terminal showed: lines with escape sequences, as `tmux capture-pane -e` writes them, and for how long."""

    lines: tuple[str, ...]
    seconds: float = 1.0


def svg(frames: Sequence[Frame], columns: int, rows: int, title: str) -> str:
    """One frame is a still; several play in a loop. Where nothing plays, the last one is seen."""
    width, height = columns * WIDTH + 20, rows * HEIGHT + 20
    shared: dict[str, int] = {}
    bodies = ["".join(_uses(frame, rows, shared)) for frame in frames]
    total = sum(frame.seconds for frame in frames)
    defs = "".join(f'<g id="r{number}">{row}</g>' for row, number in shared.items() if row)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" role="img">'
        f"<title>{escape(title)}</title><style>{_style(frames, total)}</style><defs>{defs}</defs>"
        f'<rect width="100%" height="100%" rx="6" fill="{BACKGROUND}"/><g transform="translate(10 10)">'
        + "".join(f'<g class="f f{number}">{body}</g>' for number, body in enumerate(bodies))
        + "</g></svg>\n"
    )


def _style(frames: Sequence[Frame], total: float) -> str:
    rules = [f"text{{font:{SIZE}px {FONTS};white-space:pre}}.b{{font-weight:bold}}.i{{font-style:italic}}"]
    rules.append(f".f{{visibility:hidden}}.f{len(frames) - 1}{{visibility:visible}}")
    if len(frames) == 1:
        return rules[0]
    begin = 0.0
    for number, frame in enumerate(frames):
        first, last = 100 * begin / total, 100 * (begin + frame.seconds) / total
        before = "0%{visibility:hidden}" if number else ""
        after = f"{last:.3f}%,100%{{visibility:hidden}}" if number < len(frames) - 1 else ""
        rules.append(f"@keyframes k{number}{{{before}{first:.3f}%{{visibility:visible}}{after}}}")
        rules.append(f".f{number}{{animation:k{number} {total:g}s step-end infinite}}")
        begin += frame.seconds
    return "".join(rules)


def _uses(frame: Frame, rows: int, shared: dict[str, int]) -> Iterator[str]:
    # tmux says a colour once, also for the lines that follow.
    for at, line in enumerate(AnsiDecoder().decode("\n".join(frame.lines[:rows]))):
        drawn = "".join(_row(line))
        number = shared.setdefault(drawn, len(shared))
        if drawn:
            yield f'<use href="#r{number}" y="{at * HEIGHT:g}"/>'


def _row(line: Text) -> Iterator[str]:
    column = 0
    for text, style in _runs(line):
        width = cell_len(text)
        front, back = _colours(style)
        if back != BACKGROUND:
            yield _rectangle(column * WIDTH, 0, width * WIDTH, HEIGHT, back)
        yield from _letters(text, column, front, style)
        column += width


def _runs(line: Text) -> Iterator[tuple[str, Style]]:
    segments = line.render(Console(color_system="truecolor"))
    for segment in Segment.simplify(segments):
        yield segment.text, segment.style or Style()


def _letters(text: str, column: int, front: str, style: Style) -> Iterator[str]:
    """Shapes one by one, words as they are: a font that is a little wider or narrower cannot shift the next word."""
    word, begin = "", column
    for character in f"{text} ":
        if character not in _LINES and character not in _BLOCKS and character != " ":
            word, begin = word + character, begin if word else column
        elif word:
            yield _word(word, begin, front, style)
            word = ""
        if character in _LINES:
            yield _line(character, column * WIDTH, front)
        elif character in _BLOCKS:
            left, top, right, bottom = (eighths / 8 for eighths in _BLOCKS[character])
            at = (column + left) * WIDTH, top * HEIGHT
            yield _rectangle(*at, (right - left) * WIDTH, (bottom - top) * HEIGHT, front)
        column += cell_len(character)


def _word(word: str, column: int, front: str, style: Style) -> str:
    classes = " ".join(name for name, on in (("b", style.bold), ("i", style.italic)) if on)
    more = (f' class="{classes}"' if classes else "") + (' text-decoration="underline"' if style.underline else "")
    # The width is said as well: a reader's font may be wider than a cell.
    length = f' textLength="{cell_len(word) * WIDTH:.1f}" lengthAdjust="spacingAndGlyphs"'
    return f'<text x="{column * WIDTH:.1f}" y="{HEIGHT * 0.75:g}" fill="{front}"{more}{length}>{escape(word)}</text>'


def _line(character: str, x: float, front: str) -> str:
    ends = {"n": (0.5, 0.0), "s": (0.5, 1.0), "e": (1.0, 0.5), "w": (0.0, 0.5)}
    parts = (
        f"M{x + WIDTH / 2:.1f} {HEIGHT / 2:g}L{x + WIDTH * a:.1f} {HEIGHT * b:g}"
        for a, b in map(ends.get, _LINES[character])
    )  # type: ignore[misc]
    width = 2 if character in "━╸╺┃" else 1
    return f'<path d="{"".join(parts)}" stroke="{front}" stroke-width="{width}"/>'


def _rectangle(x: float, y: float, width: float, height: float, colour: str) -> str:
    # A hair wider and higher: neighbours leave no seam.
    return f'<rect x="{x:.1f}" y="{y:g}" width="{width + 0.3:.1f}" height="{height + 0.3:.1f}" fill="{colour}"/>'


def _colours(style: Style) -> tuple[str, str]:
    front = style.color.get_truecolor(THEME).hex if style.color and not style.color.is_default else FOREGROUND
    back = (
        style.bgcolor.get_truecolor(THEME, False).hex if style.bgcolor and not style.bgcolor.is_default else BACKGROUND
    )
    return (back, front) if style.reverse else (front, back)
