"""What a report says, as a value: facts, maps, charts and tables. Whoever has results can make one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mthp.report.charts import BarChart, Chart
from mthp.report.memorymap import MemoryMap


@dataclass(frozen=True, slots=True)
class Cell:
    """One cell of a table: its text, and whether it is a figure, which is aligned to the right."""

    text: str
    figure: bool = False
    mark: bool = False


def figures(*texts: str) -> list[Cell]:
    """Return cells of figures."""
    return [Cell(text, figure=True) for text in texts]


@dataclass(frozen=True, slots=True)
class Table:
    """A table.

    Attributes:
        title: above it.
        columns: the heads.
        rows: of cells, as many as there are heads.
        note: a sentence below it, or ``""``.
        folded: shown when the reader opens it.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    note: str = ""
    folded: bool = False


@dataclass(frozen=True, slots=True)
class Figure:
    """A number that matters, large.

    Attributes:
        value: such as ``"94.1%"``.
        name: what it is.
        detail: what it is compared to, or ``""``.
    """

    value: str
    name: str
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Command:
    """A command line, and what it is for."""

    purpose: str
    line: str


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the page: its heading, a sentence or two, maps, charts, tables, and remarks that can be opened."""

    title: str
    lead: str = ""
    maps: Sequence[MemoryMap] = ()
    bars: Sequence[BarChart] = ()
    charts: Sequence[Chart] = ()
    tables: Sequence[Table] = ()
    remarks: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Document:
    """A report.

    Attributes:
        title: what it is about, such as ``"1234 (redis-server)"``.
        verdict: what it comes to, in a sentence or two.
        facts: pairs of a name and a value: kernel, time, switches.
        figures: the numbers that matter.
        sections: the parts.
        commands: how to repeat it.
        notes: what could not be seen, and why.
        version: of mthp.
    """

    title: str
    verdict: str
    facts: Sequence[tuple[str, str]] = ()
    figures: Sequence[Figure] = ()
    sections: Sequence[Section] = ()
    commands: Sequence[Command] = ()
    notes: Sequence[str] = ()
    version: str = ""
