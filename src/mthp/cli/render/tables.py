"""Tables for a terminal of any width: no figure is ever cut.

A cell is one of three kinds:

- a *figure* is whole on one line;
- a *name* may be shortened in the middle, with an ellipsis, because its ends identify it;
- any other *text* is wrapped between words.

A table that is too wide first wraps its texts and heads and shortens its names. If that is not enough, the columns that
do not fit go below each row, every cell with its head::

    policy    2M mapped  resident
    mainline      50.0%      400M
        bloat: 3.0M  copied: 20M  khugepaged: 0.20 s

No table becomes narrower than :data:`MIN_WIDTH`. A column of names or texts that are all empty is left out.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace

from rich.cells import cell_len, chop_cells
from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from mthp.text import clean, shortened

MIN_WIDTH = 40
"""Columns of the narrowest layout: a narrower terminal breaks the lines itself, and cuts nothing either."""

GAP = 2
"""Blanks between two columns."""

INDENT = 4
"""Blanks before the cells below their row."""

TEXT_WIDTH = 20
"""Least width of a text column before columns go below the row: narrower ones become towers of single words."""

NAME_WIDTH = 24
"""The same for a column of names: the ends of a path that identify a library fit in it."""

_WORD = re.compile(r"[0-9.,]+ [num]?s\b\S*|\S+")
"""Pattern for text that is not broken: a word, or a number with its unit of time."""


@dataclass(frozen=True, slots=True)
class Table:
    """A titled table that rich prints.

    Attributes:
        title: a line above it.
        columns: heads.
        rows: cells, one for each head in every row.
        right: indexes of the columns that hold figures, and are aligned to the right.
        names: indexes of the columns that hold names, which may be shortened.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    right: Collection[int] = ()
    names: Collection[int] = ()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text("")
        for line in wrapped(clean(self.title), options.max_width):
            yield Text(line, style="bold")
        heads, lines = self.laid_out(max(options.max_width, MIN_WIDTH))
        for line in heads:
            yield _line(line, "bold")
        # Not in a pipe: scripts read every line below the heads as a row.
        if console.is_terminal and heads:
            yield _line("─" * max(map(cell_len, [*heads, *lines])))
        for line in lines:
            yield _line(line)

    def laid_out(self, width: int) -> tuple[list[str], list[str]]:
        """Return the lines of the heads, and those of the rows, none longer than `width`.

        Only a figure that is longer than `width` itself makes a longer line.
        """
        used = [at for at in range(len(self.columns)) if at in self.right or any(row[at] for row in self.rows)]
        # One column stays, for the lines of the rows.
        shown = (used or [0]) if self.rows else range(len(self.columns))
        columns = [
            _Column(clean(self.columns[at]), [clean(row[at]) for row in self.rows], at in self.right, at in self.names)
            for at in shown
        ]
        beside = _beside(columns, width)
        widths = _widths(columns[:beside], width)
        below = columns[beside:]
        heads = list(_side_by_side([column.head_in(room) for column, room in _pairs(columns, widths)], widths, columns))
        # If only one text column is below, its head is not repeated before every cell.
        alone = len(below) == 1 and not below[0].figures
        if alone:
            heads += _indented(wrapped(below[0].head, width - INDENT))
            below = [replace(below[0], head="")]
        lines: list[str] = []
        for row in range(len(self.rows)):
            cells = [column.cell_in(row, room) for column, room in _pairs(columns, widths)]
            side_by_side = list(_side_by_side(cells, widths, columns))
            lines += [line for line in side_by_side if line or not below]
            lines += _below(below, row, width)
        return heads, lines


def wrapped(text: str, width: int) -> list[str]:
    """Return the lines of `text` broken between words, each with the blanks that `text` begins with.

    A word is broken only where it is longer than a line.
    """
    if cell_len(text) <= width:
        return [text]
    # Half of the line stays for words.
    indent = " " * min(len(text) - len(text.lstrip(" ")), width // 2)
    room = width - len(indent)
    lines = [""]
    for word in _WORD.findall(text):
        joined = f"{lines[-1]} {word}" if lines[-1] else word
        if cell_len(joined) <= room:
            lines[-1] = joined
            continue
        # In place of the last line if that is empty, else behind it.
        lines[len(lines) - (not lines[-1]) :] = chop_cells(word, room)
    return [indent + line for line in lines]


@dataclass(frozen=True, slots=True)
class _Column:
    head: str
    cells: list[str]
    figures: bool
    names: bool

    @property
    def natural(self) -> int:
        """The width at which nothing is wrapped or shortened."""
        return max(map(cell_len, [self.head, *self.cells]))

    @property
    def least(self) -> int:
        """The smallest width that is still easy to read."""
        widest = max(map(cell_len, self.cells), default=0)
        head = _longest_word(self.head)
        if self.figures:
            return max(widest, head)
        if self.names:
            return max(min(widest, NAME_WIDTH), head)
        return max(min(widest, TEXT_WIDTH), head, *map(_longest_word, self.cells), 0)

    def head_in(self, width: int) -> list[str]:
        return wrapped(self.head, width)

    def cell_in(self, row: int, width: int) -> list[str]:
        cell = self.cells[row]
        if self.figures:
            return [cell]
        return [shortened(cell, width)] if self.names else wrapped(cell, width)


def _beside(columns: Sequence[_Column], width: int) -> int:
    """Return how many of the leading columns fit beside each other."""
    used = -GAP
    for count, column in enumerate(columns):
        used += GAP + column.least
        if used > width:
            # The first column identifies the row, so it is always there.
            return max(count, 1)
    return len(columns)


def _widths(columns: Sequence[_Column], width: int) -> list[int]:
    """Return the widths of `columns` within `width` in all; columns that need least beyond their minimum come first."""
    # A single column is never wider than the line; several fit beside each other by _beside().
    least = [column.least if len(columns) > 1 else min(column.least, width) for column in columns]
    widths = list(least)
    spare = width - sum(least) - GAP * (len(columns) - 1)
    wishes = sorted((column.natural - least[index], index) for index, column in enumerate(columns))
    # So most columns have their full width.
    for wish, index in wishes:
        extra = max(0, min(wish, spare))
        widths[index] += extra
        spare -= extra
    return widths


def _pairs(columns: Sequence[_Column], widths: Sequence[int]) -> Iterator[tuple[_Column, int]]:
    return zip(columns, widths, strict=False)


def _side_by_side(cells: Sequence[list[str]], widths: Sequence[int], columns: Sequence[_Column]) -> Iterator[str]:
    """Yield the lines of one row of `cells`, each of which has lines of its own."""
    for number in range(max(map(len, cells), default=0)):
        line = []
        for cell, width, column in zip(cells, widths, columns, strict=False):
            text = cell[number] if number < len(cell) else ""
            blanks = " " * max(0, width - cell_len(text))
            line.append(blanks + text if column.figures else text + blanks)
        yield (" " * GAP).join(line).rstrip()


def _below(columns: Sequence[_Column], row: int, width: int) -> list[str]:
    """Return the lines below a row: the cells of `columns` that are not empty, each with its head."""
    room = width - INDENT
    lines = [""]
    for column in columns:
        if not column.cells[row]:
            continue
        label, cell = f"{column.head}: " if column.head else "", column.cells[row]
        if column.names:
            # After its head if that leaves at least half of the line, else on a line of its own.
            left = room - cell_len(label)
            cell = shortened(cell, left if left >= room // 2 else room)
        item = label + cell
        joined = f"{lines[-1]}{' ' * GAP}{item}" if lines[-1] else item
        if cell_len(joined) <= room:
            lines[-1] = joined
        else:
            # A figure or name that does not fit after its head has a line of its own, because wrapping must keep it
            # whole.
            pieces = [*wrapped(label, room), cell] if column.figures or column.names else wrapped(item, room)
            whole = [item] if cell_len(item) <= room else pieces
            lines[len(lines) - (not lines[-1]) :] = [piece.rstrip() for piece in whole]
    return _indented([line for line in lines if line])


def _indented(lines: Sequence[str]) -> list[str]:
    return [" " * INDENT + line for line in lines]


def _longest_word(text: str) -> int:
    return max(map(cell_len, _WORD.findall(text)), default=0)


def _line(text: str, style: str = "") -> Text:
    # rich must not cut a figure that is longer than the line.
    return Text(text, style=style, no_wrap=True, overflow="ignore")
