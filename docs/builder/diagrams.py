"""Diagrams: boxes, lines and arrows drawn with characters, as SVG that follows the page's theme.

Input: the text of a `{diagram}` block: boxes of `+`, `-` and `|`, arrows that end in `<`, `>`, `^` or `v`, words
anywhere. Output: one `<svg>` to be set into a page; its colours are CSS classes (`static/book.css`). Errors:
`ValueError` for a tab, and for a drawing without anything in it. Pure: the same text gives the same bytes.

A cell of the drawing is one character: `CELL_X` by `CELL_Y` pixels. In a box, text that has a row for itself is
centred; the first row of several is bold.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

CELL_X, CELL_Y = 8.4, 19.0
MARGIN = 6.0
HEAD = 7.0  # length of an arrow's head
BASELINE = 4.5  # from a cell's middle down to its text's base line
RUN = re.compile(r"[<+|]?-[-+]*[>+|]?")  # what may be a horizontal line, ends included
TEXT = re.compile(r"\S+(?: \S+)*")  # words with one blank between them


@dataclass(frozen=True)
class Box:
    """A closed rectangle, by the cells of its corners, both inclusive."""

    top: int
    left: int
    bottom: int
    right: int

    @property
    def area(self) -> int:
        return (self.bottom - self.top) * (self.right - self.left)

    def holds(self, row: int, column: int) -> bool:
        return self.top < row < self.bottom and self.left < column < self.right


class Drawing:
    """The characters of a drawing, padded to a rectangle, and which of them are lines."""

    def __init__(self, text: str) -> None:
        if "\t" in text:
            raise ValueError("a diagram has a tab in it; draw with blanks")
        lines = [line.rstrip() for line in text.splitlines()]
        while lines and not lines[0]:
            lines.pop(0)
        while lines and not lines[-1]:
            lines.pop()
        if not lines:
            raise ValueError("a diagram is empty; draw boxes of +, - and |, and arrows")
        self.width = max(map(len, lines))
        self.rows = [line.ljust(self.width) for line in lines]
        self.height = len(lines)
        self.across = list(self._across())
        self.level = {(row, column) for row, start, end in self.across for column in range(start, end)}
        self.upright = set(self._upright())

    def at(self, row: int, column: int) -> str:
        return self.rows[row][column] if 0 <= row < self.height and 0 <= column < self.width else " "

    def _across(self) -> Iterator[tuple[int, int, int]]:
        """Horizontal lines: row, first column, column behind the last."""
        for row, line in enumerate(self.rows):
            for match in RUN.finditer(line):
                beside = line[max(0, match.start() - 1) : match.start()] + line[match.end() : match.end() + 1]
                dashes = match[0].count("-")
                if not re.search(r"[\w-]", beside) and (dashes > 2 or match[0][0] in "<+|" or match[0][-1] in ">+|"):
                    yield row, match.start(), match.end()

    def _upright(self) -> Iterator[tuple[int, int]]:
        """Cells of vertical lines, arrow heads included."""
        for row in range(self.height):
            for column in range(self.width):
                char, above, below = (self.at(at, column) for at in (row, row - 1, row + 1))
                word = re.search(r"\w", self.at(row, column - 1) + self.at(row, column + 1))
                on_line = (row - 1, column) in self.level or (row + 1, column) in self.level
                if (
                    (char == "|" and (above in "|+^" or below in "|+v" or on_line))
                    or (char == "+" and (above in "|^" or below in "|v"))
                    or (char == "v" and above in "|+" and not word)
                    or (char == "^" and below in "|+" and not word)
                ):
                    yield row, column

    def boxes(self) -> list[Box]:
        """All closed rectangles that hold no smaller one at the same corner, the largest first."""
        found = [box for row in range(self.height) for column in range(self.width) for box in self._box_at(row, column)]
        return sorted(found, key=lambda box: -box.area)

    def _box_at(self, top: int, left: int) -> Iterator[Box]:
        if self.at(top, left) != "+":
            return
        for bottom in self._ends(top, left, down=True):
            for right in self._ends(top, left, down=False):
                closed = bottom in self._ends(top, right, down=True) and right in self._ends(bottom, left, down=False)
                if closed:
                    if bottom - top > 1 and right - left > 1:  # else there is no inside: two boxes, one below the other
                        yield Box(top, left, bottom, right)
                    return

    def _ends(self, row: int, column: int, *, down: bool) -> list[int]:
        """Where an edge that begins at this corner may end: each `+` on an unbroken line."""
        found = []
        while True:
            row, column = (row + 1, column) if down else (row, column + 1)
            char = self.at(row, column)
            if char == " " or char not in ("|+<>-" if down else "-+^v|"):
                return found
            if char == "+":
                found.append(row if down else column)


def svg_of(text: str, title: str, accents: Sequence[str] = ()) -> str:
    """Returns the drawing as one SVG element.

    Args:
        text: the drawing.
        title: what it shows, for readers who cannot see it.
        accents: beginnings of boxes' first words; the boxes take the theme's accents 1, 2, 3 ... in this order.

    Raises:
        ValueError: the drawing has a tab, is empty, or none of its boxes begins as an accent does.
    """
    drawing = Drawing(text)
    boxes = drawing.boxes()
    labels = list(_labels(drawing, boxes))
    width, height = drawing.width * CELL_X + 2 * MARGIN, drawing.height * CELL_Y + 2 * MARGIN
    parts = [
        f'<svg class="diagram" role="img" viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}" '
        f'xmlns="http://www.w3.org/2000/svg"><title>{escape(title)}</title>'
    ]
    parts += _rectangles(boxes, labels, accents)
    parts += _lines(drawing, boxes)
    parts += [label.svg() for label in labels]
    return "\n".join([*parts, "</svg>"])


@dataclass(frozen=True)
class Label:
    row: int
    column: float  # of its middle if it is centred, else of its start
    text: str
    box: Box | None
    is_centred: bool
    is_title: bool

    def svg(self) -> str:
        anchor = ' text-anchor="middle"' if self.is_centred else ""
        style = "title" if self.is_title else "text"
        x = _x(self.column) if self.is_centred else _x(self.column) - CELL_X / 2
        return f'<text class="{style}" x="{x:.1f}" y="{_y(self.row) + BASELINE:.1f}"{anchor}>{escape(self.text)}</text>'


def _labels(drawing: Drawing, boxes: Sequence[Box]) -> Iterator[Label]:
    found = []
    for row, line in enumerate(drawing.rows):
        used = drawing.level | drawing.upright
        words = "".join(" " if (row, column) in used else char for column, char in enumerate(line))
        for match in TEXT.finditer(words):
            inside = [box for box in boxes if box.holds(row, match.start()) and box.holds(row, match.end() - 1)]
            found.append((row, match.start(), match[0], min(inside, key=lambda box: box.area, default=None)))
    rows_of = {box: [row for row, _, _, own in found if own == box] for box in boxes}
    for row, start, text, box in found:
        alone = box is not None and rows_of[box].count(row) == 1
        is_title = alone and row == rows_of[box][0] and len(rows_of[box]) > 1
        middle = (box.left + box.right) / 2 if box is not None and alone else start + (len(text) - 1) / 2
        is_centred = box is not None
        yield Label(row, middle if is_centred else start, text, box, is_centred, bool(is_title))


def _rectangles(boxes: Sequence[Box], labels: Sequence[Label], accents: Sequence[str]) -> Iterator[str]:
    first = {}
    for label in labels:
        first.setdefault(label.box, label.text)
    missing = [accent for accent in accents if not any(text.startswith(accent) for text in first.values())]
    if missing:
        raise ValueError(f"no box of the diagram begins with {missing[0]!r}, which :accent: names")
    for box in boxes:
        number = next((at for at, accent in enumerate(accents, 1) if first.get(box, "").startswith(accent)), 0)
        style = f"box accent-{number}" if number else "box"
        x, y = _x(box.left), _y(box.top)
        yield (
            f'<rect class="{style}" x="{x:.1f}" y="{y:.1f}" width="{_x(box.right) - x:.1f}" '
            f'height="{_y(box.bottom) - y:.1f}" rx="4"/>'
        )


def _lines(drawing: Drawing, boxes: Sequence[Box]) -> Iterator[str]:
    """Lines that are no box's edge, and all heads of arrows."""
    edges = {(row, at) for box in boxes for row in (box.top, box.bottom) for at in range(box.left, box.right)}
    for row, start, end in drawing.across:
        for first, last in _runs([at for at in range(start, end - 1) if (row, at) not in edges]):
            yield _line(row, first, row, last + 1)
        for at, head in ((start, "<"), (end - 1, ">")):
            if drawing.at(row, at) == head:
                step = 1 if head == ">" else -1
                yield _head(row, at, head, touches=drawing.at(row, at + step) in "|+")
    sides = {(at, column) for box in boxes for column in (box.left, box.right) for at in range(box.top, box.bottom)}
    for column in range(drawing.width):
        cells = [row for row in range(drawing.height) if (row, column) in drawing.upright]
        joined = set(cells) | {row for row in range(drawing.height) if (row, column) in drawing.level}
        bars = {
            row for row in cells if drawing.at(row, column) in "|^v"
        }  # two corners, one above the other, do not join
        pairs = {row for row in bars if row + 1 in joined} | {row - 1 for row in bars if row - 1 in joined}
        free = sorted(row for row in pairs if (row, column) not in sides)
        for first, last in _runs(free):
            yield _line(first, column, last + 1, column)
        for row in cells:
            if (head := drawing.at(row, column)) in "^v":
                yield _head(row, column, head, touches=drawing.at(row + (1 if head == "v" else -1), column) in "-+")


def _runs(places: Sequence[int]) -> Iterator[tuple[int, int]]:
    """First and last of each unbroken run of ascending numbers."""
    for place in places:
        if place - 1 not in places:
            last = place
            while last + 1 in places:
                last += 1
            yield place, last


def _line(row: int, column: int, end_row: int, end_column: int) -> str:
    return f'<path class="line" d="M{_x(column):.1f} {_y(row):.1f}L{_x(end_column):.1f} {_y(end_row):.1f}"/>'


def _head(row: int, column: int, char: str, *, touches: bool) -> str:
    """An arrow's head, its point at the far side of the cell; touches: at the line in the next cell."""
    x, y, half, reach = _x(column), _y(row), HEAD / 2, 1.0 if touches else 0.5
    tip_x = x + {"<": -reach, ">": reach}.get(char, 0) * CELL_X
    tip_y = y + {"^": -reach, "v": reach}.get(char, 0) * CELL_Y
    if char in "<>":
        back_x, back_y = (tip_x - HEAD if char == ">" else tip_x + HEAD), y
        corners = f"{back_x:.1f},{y - half:.1f} {back_x:.1f},{y + half:.1f}"
    else:
        back_x, back_y = x, (tip_y - HEAD if char == "v" else tip_y + HEAD)
        corners = f"{x - half:.1f},{back_y:.1f} {x + half:.1f},{back_y:.1f}"
    stem = f'<path class="line" d="M{x:.1f} {y:.1f}L{back_x:.1f} {back_y:.1f}"/>'
    return f'{stem}<polygon class="head" points="{tip_x:.1f},{tip_y:.1f} {corners}"/>'


def _x(column: float) -> float:
    return MARGIN + (column + 0.5) * CELL_X


def _y(row: float) -> float:
    return MARGIN + (row + 0.5) * CELL_Y
