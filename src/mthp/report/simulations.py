"""The report on a simulation: coverage, memory and bloat over simulated time, a line for each policy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mthp.errors import UsageError
from mthp.geometry import Geometry
from mthp.lab.figures import METRICS, Row
from mthp.report.charts import MARKS, Chart, Series, chart
from mthp.report.document import Cell, Command, Document, ReportTable, Section, figures
from mthp.units import format_size, percent

CHARTS = (
    ("huge_coverage", "Memory mapped by PMD entries", "% of the resident memory"),
    ("large_coverage", "Memory in large folios", "% of the resident memory"),
    ("resident_bytes", "Resident memory", "bytes"),
    ("bloat_bytes", "Bloat", "bytes"),
    ("khugepaged_seconds", "khugepaged's processor time", "seconds"),
    ("alloc_failure_share", "Folios that could not be allocated", "% of the attempts"),
)
"""Metric, title and unit of each chart."""

MEANINGS = {"resident_bytes": "memory of all programs together, filled holes included"}
"""Meanings of metrics that differ from those of a comparison, which reads PMD ranges."""


def report_on_simulation(rows: Sequence[Row], about: Mapping[str, Any], commands: Sequence[Command]) -> Document:
    """Return the report on the results of `mthp simulate`.

    Args:
        rows: those of :mod:`mthp.lab.simulation`.
        about: facts about the simulation, for the head of the report.

    Raises:
        UsageError: a key is missing in `rows` or `about`.
    """
    try:
        geometry = Geometry(**about["geometry"])
        whole = [row for row in rows if not row["process"]]
        # Rows ascend by time, and later ones replace earlier ones.
        last = {row["policy"]: row for row in whole}
        return Document(
            title=str(about["name"]),
            verdict=_verdict(last, geometry),
            facts=(
                ("scenario", str(about["name"])),
                ("seed", str(about["seed"])),
                ("machine", f"simulated: {geometry.name}, pages of {geometry.label(0)}"),
                ("policies", ", ".join(map(str, about["policies"]))),
                ("simulated by", f"mthp {about['version']}"),
            ),
            sections=(
                _over_time(whole),
                _processes(rows, last),
                Section("The scenario", tables=(_text(str(about["scenario"])),)),
            ),
            commands=commands,
        )
    # StopIteration: there are no rows.
    except (KeyError, TypeError, StopIteration, AttributeError) as error:
        raise UsageError(f"damaged: {error} is missing in the results") from error


def _verdict(last: Mapping[str, Row], geometry: Geometry) -> str:
    pmd = geometry.label(geometry.pmd_order)
    parts = [
        f"{policy}: {percent(row['huge_coverage'])} mapped as {pmd}, {format_size(row['bloat_bytes'])} of bloat"
        for policy, row in last.items()
    ]
    seconds = next(iter(last.values()))["seconds"]
    return f"After {seconds:g} simulated seconds, {'; '.join(parts)}."


def _over_time(whole: Sequence[Row]) -> Section:
    # A chart of nothing but 0 is left out.
    charts = [_chart(whole, name, title, unit) for name, title, unit in CHARTS if any(row[name] for row in whole)]
    table = ReportTable(
        "Sample by sample",
        ("policy", "seconds", *(name for name, _, _ in CHARTS)),
        [
            (
                Cell(row["policy"]),
                *figures(f"{row['seconds']:g}", *(_form(name)(row[name]) for name, _, _ in CHARTS)),
            )
            for row in whole
        ],
        folded=True,
    )
    return Section("Over simulated time", "All processes together.", charts=charts, tables=(table,))


def _form(name: str) -> Callable[[Any], str]:
    unit = METRICS[name].unit
    if unit == "share":
        return percent
    return (lambda value: format_size(int(value))) if unit == "bytes" else (lambda value: f"{value:.2f} s")


def _chart(whole: Sequence[Row], name: str, title: str, unit: str) -> Chart:
    meaning = MEANINGS.get(name, METRICS[name].meaning)
    form, scale = _form(name), 100.0 if METRICS[name].unit == "share" else 1.0
    lines: dict[str, list[tuple[float, float, str]]] = {}
    for row in whole:
        text = f"{row['policy']} after {row['seconds']:g} s: {form(row[name])}"
        lines.setdefault(row["policy"], []).append((float(row["seconds"]), scale * row[name], text))
    return chart(
        title,
        f"{meaning[0].upper()}{meaning[1:]}.",
        # Lines beyond the number of marks would look alike; the table has all.
        [Series(policy, points, joined=True) for policy, points in list(lines.items())[: len(MARKS)]],
        x_name="simulated seconds",
        y_name=unit,
        y_unit="%" if scale > 1 else unit if unit == "bytes" else "",
        y_range=(0.0, 100.0) if name.endswith("coverage") else None,
    )


def _processes(rows: Sequence[Row], last: Mapping[str, Row]) -> Section:
    cells = [
        (
            Cell(row["policy"]),
            Cell(row["process"]),
            *figures(format_size(row["resident_bytes"]), *map(percent, (row["huge_coverage"], row["large_coverage"]))),
        )
        for row in rows
        # The last sample; processes that ended before are not in it.
        if row["process"] and row["seconds"] == last[row["policy"]]["seconds"]
    ]
    columns = ("policy", "process", "resident", "mapped by PMD entries", "in large folios")
    return Section("The processes at the end", tables=(ReportTable("Process by process", columns, cells),))


def _text(scenario: str) -> ReportTable:
    lines = [(Cell(str(number), figure=True), Cell(line)) for number, line in enumerate(scenario.splitlines(), 1)]
    return ReportTable("Line by line", ("line", "text"), lines, folded=True)
