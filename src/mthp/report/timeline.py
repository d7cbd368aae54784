"""A recording, as a section of the page: memory and coverage over time, with maps of the first and the last moment."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mthp.addrspace import AddressSpace
from mthp.engine.census import take_census
from mthp.geometry import Geometry
from mthp.report.charts import Chart, Series, chart
from mthp.report.document import ReportTable, Section, figures
from mthp.report.memorymap import make_map
from mthp.units import format_size, percent

MAX_MOMENTS = 120
"""Most steps of a recording that are read: more than a chart of this size can show."""


@dataclass(frozen=True, slots=True)
class Moment:
    """A process at one moment: sizes in bytes, of anonymous memory unless noted.

    Attributes:
        seconds: time since the first moment.
        resident: all resident bytes, files included.
        anonymous: resident anonymous memory.
        huge: anonymous memory that PMD entries map.
        large: anonymous memory in aligned blocks above the base page, as the hardware uses them
            (:class:`mthp.metrics.Coverage`): less than its folios where they are mapped unaligned or in part.
    """

    seconds: float
    resident: int
    anonymous: int
    huge: int
    large: int


def moment_of(seconds: float, space: AddressSpace) -> Moment:
    """Return the figures of `space`, `seconds` after the first moment."""
    census = take_census(space)
    page, pages = census.geometry.page_size, census.anonymous
    return Moment(
        seconds,
        census.total.resident * page,
        pages.resident * page,
        pages.coverage.pages[census.geometry.pmd_order] * page,
        pages.coverage.pages[1] * page,
    )


def chosen_steps(count: int, most: int = MAX_MOMENTS) -> list[int]:
    """Return at most `most` of `count` steps, evenly spaced, with the first and the last."""
    if count <= most:
        return list(range(count))
    # The divisor is one less, so that the last step is among them.
    return sorted({round(at * (count - 1) / (most - 1)) for at in range(most)})


@dataclass(frozen=True, slots=True)
class Timeline:
    """A recording.

    Attributes:
        moments: figures by ascending time.
        first, last: the address spaces at the first and at the last moment.
        note: a remark for the reader, or ``""``.
    """

    moments: Sequence[Moment]
    first: AddressSpace
    last: AddressSpace
    note: str = ""


def gather(walk: Iterable[tuple[float, AddressSpace]], note: str = "") -> Timeline:
    """Return the timeline of `walk`: pairs of seconds and the space at that time, at least one."""
    moments, first, last = [], None, None
    for seconds, space in walk:
        moments.append(moment_of(seconds, space))
        first, last = first or space, space
    assert first is not None, "a recording has steps"
    assert last is not None
    return Timeline(moments, first, last, note)


def section(timeline: Timeline) -> Section:
    """Return the section of the page."""
    geometry = timeline.last.geometry
    tables = (_table(timeline, geometry),)
    begin, end = timeline.moments[0], timeline.moments[-1]
    lead = (
        f"{len(timeline.moments)} moments over {_time(end.seconds - begin.seconds)}. Resident memory went from"
        f" {format_size(begin.resident)} to {format_size(end.resident)}. {timeline.note}"
    )
    memory = make_map(
        timeline.first,
        take_census(timeline.first),
        names=("at the beginning", "at the end"),
        later=timeline.last,
        title="At the beginning and at the end",
    )
    return Section("Over time", lead, maps=(memory,), charts=_charts(timeline.moments, geometry), tables=tables)


def _charts(moments: Sequence[Moment], geometry: Geometry) -> tuple[Chart, Chart]:
    pmd, base = geometry.label(geometry.pmd_order), geometry.label(0)

    def share(part: int, moment: Moment) -> float:
        return 100 * part / moment.anonymous if moment.anonymous else 0.0

    def text(name: str, value: str, moment: Moment) -> str:
        return f"{name} after {_time(moment.seconds)}: {value}"

    huge = [(m.seconds, share(m.huge, m), text(f"{pmd} mapped", percent(share(m.huge, m) / 100), m)) for m in moments]
    large = [(m.seconds, share(m.large, m), text("large", percent(share(m.large, m) / 100), m)) for m in moments]
    resident = [(m.seconds, float(m.resident), text("resident", format_size(m.resident), m)) for m in moments]
    mapped = [(m.seconds, float(m.huge), text(f"{pmd} mapped", format_size(m.huge), m)) for m in moments]
    coverage = chart(
        "Coverage over time",
        "Share of the anonymous memory that is resident at each moment.",
        [Series(f"mapped as {pmd}", huge, joined=True), Series(f"in aligned blocks above {base}", large, joined=True)],
        x_name="seconds",
        y_name="% of the anonymous memory",
        y_unit="%",
        y_range=(0.0, 100.0),
    )
    memory = chart(
        "Memory over time",
        "Resident memory, and the anonymous part of it that PMD entries map.",
        [Series("resident", resident, joined=True), Series(f"mapped as {pmd}", mapped, joined=True)],
        x_name="seconds",
        y_name="bytes",
        y_unit="bytes",
    )
    return coverage, memory


def _table(timeline: Timeline, geometry: Geometry) -> ReportTable:
    rows = [
        figures(
            f"{moment.seconds:g}",
            *map(format_size, (moment.resident, moment.anonymous)),
            *(percent(part / (moment.anonymous or 1)) for part in (moment.huge, moment.large)),
        )
        for moment in timeline.moments
    ]
    pmd, base = geometry.label(geometry.pmd_order), geometry.label(0)
    columns = ("seconds", "resident", "anonymous", f"mapped as {pmd}", f"above {base}")
    return ReportTable("Moment by moment", columns, rows, folded=True)


def _time(seconds: float) -> str:
    if seconds >= 3600:
        return f"{seconds / 3600:.1f} h"
    if seconds >= 120:
        return f"{seconds / 60:.1f} min"
    return f"{seconds:.3g} s"
