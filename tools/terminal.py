"""The console that tables are printed to: nothing that a name holds reaches the terminal, and no digit is cut off.

Input: what rich can print. Output: the same, on a stream. Control characters are escaped in every piece of text. A
table that is wider than the terminal keeps its numbers whole: words wrap first; if that is not enough, each row becomes
a block of "column: value" lines.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TextIO

from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.segment import Segment
from rich.table import Column, Table
from rich.text import Text

from tierstore.printable import PrintableStream, printable

WORDS_COLUMNS_WANTED, WORDS_COLUMNS_MIN = 24, 12  # so narrow may a column of words become, and so narrow at worst


class SafeConsole(Console):
    """A console for text that comes from files. See the module."""

    def __init__(self, stream: TextIO, width: int | None) -> None:
        """stream: where to; one that escapes by itself is looked through, since it would escape colours too."""
        inner = stream.stream if isinstance(stream, PrintableStream) else stream
        super().__init__(file=inner, width=width, highlight=False)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Yields the pieces of `renderable`, as `Console` does, escaped; tables are made to fit first."""
        if isinstance(renderable, Table):
            for column in renderable.columns:  # before widths are measured
                column._cells[:] = [_safe(cell) for cell in column._cells]
            renderable = fitted(renderable, self, (options or self.options).max_width)
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text, lines=True))


def fitted(table: Table, console: Console, width: int) -> RenderableType:
    """Returns a table that fits into `width` columns without cutting a number; the same one if it does already."""
    if console.measure(table, options=console.options.update(max_width=1 << 16)).maximum <= width:
        return table
    for words_width, has_frame in (
        (WORDS_COLUMNS_WANTED, True),
        (WORDS_COLUMNS_WANTED, False),
        (WORDS_COLUMNS_MIN, False),
    ):
        if not has_frame:
            table.box, table.padding, table.pad_edge, table.collapse_padding = None, (0, 1, 0, 0), False, True
        widths = [_needed_width(column, console, words_width) for column in table.columns]
        if sum(widths) + _width_beside(table) <= width:
            _narrow(table, widths)
            return table
    return _blocks(table)


def _needed_width(column: Column, console: Console, words_width: int) -> int:
    """Returns how wide a column must be: numbers whole, words wrapped at `words_width` if they are longer."""
    cells = [console.measure(cell).maximum for cell in (*column.cells, column.footer)]
    if column.justify == "right":
        return max(console.measure(column.header).minimum, *cells)  # a header may take several lines, a word in each
    return min(words_width, max(console.measure(column.header).maximum, *cells))


def _narrow(table: Table, widths: list[int]) -> None:
    """Fixes the widths of numbers; lets columns of words shrink, down to theirs, in the middle of a word if need be."""
    for column, width in zip(table.columns, widths, strict=True):
        if column.justify == "right":
            column.width = width
        else:
            column.overflow = "fold"
            column.min_width = width


def _safe(cell: RenderableType) -> RenderableType:
    """Returns a cell with its control characters escaped, itself if it has none."""
    if isinstance(cell, str):
        return printable(cell, lines=True)
    if isinstance(cell, Text) and printable(cell.plain, lines=True) != cell.plain:
        return Text(printable(cell.plain), style=cell.style)
    return cell


def _width_beside(table: Table) -> int:
    """Returns how many columns borders and padding take."""
    _, right, _, left = table.padding
    edges = (2 if table.show_edge else 0) + len(table.columns) - 1 if table.box else 0
    padding = len(table.columns) * (left + right)
    return padding + edges  # an upper bound


def _blocks(table: Table) -> Group:
    """Returns the rows of a table one below the other, each cell on a line of its own behind its column's name."""
    names = [_plain(column.header) for column in table.columns]
    name_width = max(map(len, names), default=0)
    parts: list[RenderableType] = [Text(_plain(table.title), style="bold")] if table.title else []
    for row in zip(*(column.cells for column in table.columns), strict=True):
        for name, cell in zip(names, row, strict=True):
            value = Text.from_markup(cell) if isinstance(cell, str) else cell
            label = f"{name:{name_width}}  "
            parts += [Text.assemble(label, value)] if isinstance(value, Text) else [Text(label), value]
        parts.append(Text())
    return Group(*parts)


def _plain(value: Any) -> str:
    return value.plain if isinstance(value, Text) else Text.from_markup(str(value)).plain
