"""Policies side by side, as a section of the page: the coverage, the price and the creep of each.

Reads the rows of :mod:`mthp.lab.compare`, fresh or from a file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mthp.geometry import Geometry
from mthp.lab.compare import Comparison
from mthp.lab.figures import Row, order_column
from mthp.report.charts import BarChart, Chart, Series, bar_chart, chart
from mthp.report.document import Cell, ReportTable, Section, figures
from mthp.report.kinds import Kinds
from mthp.units import format_size, percent

CREEP_SETTINGS = 6
"""Settings in the chart of creep: those that creep most, one for each shape of mark."""


@dataclass(frozen=True, slots=True)
class Compared:
    """The result of a comparison.

    Attributes:
        geometry: geometry of the target's machine.
        size: the folio size from which on memory counts as covered, such as ``"2M"``.
        rows: those of :attr:`mthp.lab.compare.Comparison.rows`.
        frontier: names of the settings on the frontier.
        verdict: sentences.
    """

    geometry: Geometry
    size: str
    rows: Sequence[Row]
    frontier: frozenset[str]
    verdict: Sequence[str]

    @classmethod
    def of(cls, comparison: Comparison) -> Compared:
        """Return the result of `comparison`."""
        on = zip(comparison.names, comparison.frontier, strict=True)
        return cls(
            comparison.geometry,
            comparison.geometry.label(comparison.covered),
            comparison.rows,
            frozenset(name for name, best in on if best),
            comparison.verdict,
        )

    @property
    def settings(self) -> list[str]:
        """The settings' names, in order."""
        return list(dict.fromkeys(row["setting"] for row in self.rows))

    @property
    def last(self) -> list[Row]:
        """The row of every setting after its last scan."""
        # Rows of a setting ascend by scan, and later ones replace earlier ones.
        return list({row["setting"]: row for row in self.rows}.values())

    @property
    def scans(self) -> int:
        """The number of scans."""
        return max((int(row["scan"]) for row in self.rows), default=0)


def section(compared: Compared) -> Section:
    """Return the section of the page."""
    charts = [frontier_chart(compared)]
    tables = [_table(compared)]
    if compared.scans > 1:
        charts.append(creep_chart(compared))
        tables.append(_creep_table(compared))
    scans = f"{compared.scans} scans" if compared.scans > 1 else "one scan"
    lead = (
        "A policy chooses the folios to make; max_ptes_none is the number of empty pages that a collapse may fill in a"
        f" PMD range. Bloat is the memory of filled holes. All figures are those after {scans}."
    )
    return Section(
        "Effect of each policy",
        lead,
        bars=(_bars(compared),),
        charts=charts,
        tables=tables,
        remarks=compared.verdict,
    )


def frontier_chart(compared: Compared) -> Chart:
    """Return a chart of coverage against bloat: a series for each policy, and the frontier of the best settings."""
    series: dict[str, list[tuple[float, float, str]]] = {}
    for row in compared.last:
        text = (
            f"{row['setting']}: {percent(row['coverage'])} in {compared.size} folios,"
            f" {format_size(row['bloat_bytes'])} ({percent(row['bloat_share'])}) of bloat"
        )
        series.setdefault(row["policy"], []).append((100 * row["bloat_share"], 100 * row["coverage"], text))
    # A set, because settings with equal results are one corner.
    best = {
        (100 * row["bloat_share"], 100 * row["coverage"])
        for row in compared.last
        if row["setting"] in compared.frontier
    }
    return chart(
        "Coverage against bloat",
        "Up and left are better. The dashed line joins the settings that no other beats.",
        [Series(policy, points) for policy, points in series.items()],
        x_name="bloat, % of the resident memory",
        y_name=f"in {compared.size} folios, %",
        x_unit="%",
        y_unit="%",
        y_range=(0.0, 100.0),
        # By bloat. On the frontier more bloat has more coverage, so both ascend.
        frontier=sorted(best),
    )


def creep_chart(compared: Compared) -> Chart:
    """Return a chart of bloat by scan."""
    bloat: dict[str, list[tuple[float, float, str]]] = {}
    for row in compared.rows:
        text = f"{row['setting']}, after scan {row['scan']}: {format_size(row['bloat_bytes'])} of bloat"
        bloat.setdefault(row["setting"], []).append((float(row["scan"]), 100 * row["bloat_share"], text))

    def growth(name: str) -> float:
        points = bloat[name]
        # Since the first scan: what that adds is not creep.
        return points[-1][1] - points[min(1, len(points) - 1)][1]

    # Those that creep most, then again in the order of the table.
    shown = sorted(sorted(bloat, key=growth, reverse=True)[:CREEP_SETTINGS], key=list(bloat).index)
    creeping = [name for name in shown if growth(name) > 0]
    said = f"It grows for {', '.join(creeping)}." if creeping else "It grows for none of them."
    return chart(
        "Creep: bloat that grows after the first scan",
        f"Every scan reads the result of the one before. {said}",
        [Series(name, bloat[name], joined=True) for name in shown],
        x_name="scans",
        y_name="bloat, % of the resident memory",
        y_unit="%",
    )


def _bars(compared: Compared) -> BarChart:
    kinds = Kinds(compared.geometry)

    def parts(row: Row) -> list[tuple[str, str, int]]:
        found = []
        # The largest folios first, as in the map of the address space.
        for order in range(compared.geometry.pmd_order, -1, -1):
            kind = kinds.of(order)
            # A table of several machines has None for orders that one of them does not have.
            share = row.get(order_column(order)) or 0.0
            found.append((kind.key, kind.label, round(share * row["resident_bytes"])))
        return found

    # Settings with equal results share a bar.
    alike: dict[tuple[tuple[str, str, int], ...], list[str]] = {}
    for row in compared.last:
        alike.setdefault(tuple(parts(row)), []).append(row["setting"])
    # The state before the first scan, which is the same for all settings.
    now = next(iter(compared.rows))
    bars, full_names = [("now", parts(now))], {}
    for made, names in alike.items():
        name = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} alike"
        full_names[name] = " = ".join(names)
        bars.append((name, list(made)))
    return bar_chart(
        "Memory by folio size",
        "Where a bar is longer than the first, the difference is bloat.",
        bars,
        legend=[(kind.key, kind.label) for kind in kinds.all],
        full_names=full_names,
        size=format_size,
    )


def _table(compared: Compared) -> ReportTable:
    # Columns without any value are left out.
    seen = [name for name in _BY_HEAT if any(row.get(name) is not None for row in compared.last)]
    rows = [
        (
            Cell(row["setting"], mark=row["setting"] in compared.frontier),
            *figures(percent(row["coverage"]), percent(row["large_coverage"]), format_size(row["bloat_bytes"])),
            *figures(percent(row["bloat_share"]), format_size(row["copied_bytes"]), f"{row['translations']:,.0f}"),
            *figures(*("" if row.get(name) is None else _BY_HEAT[name][1](row[name]) for name in seen)),
            Cell("yes" if row["setting"] in compared.frontier else ""),
        )
        for row in compared.last
    ]
    above, by_heat = f"above {compared.geometry.label(0)}", [_BY_HEAT[name][0] for name in seen]
    columns = (
        "setting",
        f"in {compared.size}",
        above,
        "bloat",
        "bloat %",
        "copied",
        "TLB entries",
        *by_heat,
        "frontier",
    )
    return ReportTable("All settings in figures", columns, rows, folded=len(rows) > 12)


_BY_HEAT: Mapping[str, tuple[str, Callable[[Any], str]]] = {
    "hot_coverage": ("hot coverage", percent),
    "tlb_misses": ("page walks", "{:,}".format),
}
"""Heads and formats of the columns of a target with observed accesses."""


def _creep_table(compared: Compared) -> ReportTable:
    added: dict[str, dict[int, int]] = {}
    for row in compared.rows:
        if row["scan"]:
            added.setdefault(row["setting"], {})[row["scan"]] = row["creep_bytes"]
    scans = range(1, compared.scans + 1)
    rows = [
        (Cell(name), *figures(*(format_size(by_scan.get(scan, 0)) for scan in scans)))
        for name, by_scan in added.items()
    ]
    return ReportTable("Memory added by each scan", ("setting", *(f"scan {scan}" for scan in scans)), rows, folded=True)
