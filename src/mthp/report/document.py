"""The content of a report as a value: facts, maps, charts and tables."""

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
class ReportTable:
    """A table.

    Attributes:
        title: text above the table.
        columns: headings.
        rows: rows of cells, each with a cell for every heading.
        note: a sentence below the table, or ``""``.
        folded: whether the table is hidden until the reader opens it.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    note: str = ""
    folded: bool = False


@dataclass(frozen=True, slots=True)
class Figure:
    """An important number, shown large.

    Attributes:
        value: the number as text, such as ``"94.1%"``.
        name: name of the number.
        detail: the value to compare it with, or ``""``.
    """

    value: str
    name: str
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Command:
    """A command line and its purpose."""

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
    tables: Sequence[ReportTable] = ()
    remarks: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Document:
    """A report.

    Attributes:
        title: the subject, such as ``"1234 (redis-server)"``.
        verdict: the conclusion, in a sentence or two.
        facts: pairs of a name and a value: kernel, time, switches.
        figures: the important numbers.
        sections: the parts.
        commands: commands that repeat the report.
        notes: facts that could not be read, and why.
    """

    title: str
    verdict: str
    facts: Sequence[tuple[str, str]] = ()
    figures: Sequence[Figure] = ()
    sections: Sequence[Section] = ()
    commands: Sequence[Command] = ()
    notes: Sequence[str] = ()
