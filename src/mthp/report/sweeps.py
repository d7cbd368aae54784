"""The report on a sweep: all inputs together, and how far they lie apart."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mthp.geometry import Geometry
from mthp.lab.figures import Row, frontier
from mthp.report.compared import Compared, section
from mthp.report.document import Cell, Command, Document, Figure, ReportTable, Section, figures
from mthp.units import format_size, percent


def report_on_sweep(
    path: Path, rows: Sequence[Row], sums: Sequence[Row], geometry: Geometry, commands: Sequence[Command]
) -> Document:
    """Return the report on a sweep.

    Args:
        sums: one row for each setting and scan, all inputs together.
        geometry: geometry of the inputs' machines.
    """
    last = list({row["setting"]: row for row in sums}.values())
    on = frontier([row["coverage"] for row in last], [row["bloat_bytes"] for row in last])
    best_settings = frozenset(row["setting"] for row, best in zip(last, on, strict=True) if best)
    inputs = list(dict.fromkeys(row["input"] for row in rows))
    size = geometry.label(geometry.pmd_order)
    best = max((row for row in last if row["setting"] in best_settings), key=lambda row: row["coverage"])
    verdict = (
        f"Over {len(inputs)} inputs together, {best['setting']} covers most: {percent(best['coverage'])} in {size}"
        f" folios, for {format_size(best['bloat_bytes'])} of bloat."
    )
    # Each input once: before the first scan all settings have the same.
    resident = sum(row["resident_bytes"] for row in rows if (row["setting"], row["scan"]) == _first(rows))
    return Document(
        title=f"{path.name}: a sweep",
        verdict=verdict,
        figures=(
            Figure(f"{len(inputs):,}", "inputs", f"{format_size(resident)} resident together"),
            Figure(f"{len(last):,}", "settings", f"{len(best_settings)} of them on the frontier"),
        ),
        facts=(("table", path.name), ("machine", f"{geometry.name}, pages of {geometry.label(0)}")),
        sections=(
            section(Compared(geometry, size, sums, best_settings, [verdict])),
            Section("Spread of the inputs", tables=(_spread(rows, sums),)),
        ),
        commands=commands,
    )


def _first(rows: Sequence[Row]) -> tuple[int, int]:
    return rows[0]["setting"], min(row["scan"] for row in rows)


def _spread(rows: Sequence[Row], sums: Sequence[Row]) -> ReportTable:
    names = list(dict.fromkeys(row["setting"] for row in sums))
    last: dict[int, dict[str, Row]] = {}
    for row in rows:
        # Rows of an input ascend by scan, so its last one stays.
        last.setdefault(row["setting"], {})[row["input"]] = row
    cells = []
    for name, inputs in zip(names, last.values(), strict=True):
        coverage = np.percentile([row["huge_coverage"] for row in inputs.values()], [0, 50, 100])
        bloat = np.percentile([row["bloat_share"] for row in inputs.values()], [0, 50, 100])
        cells.append((Cell(name), *figures(*(percent(float(value)) for value in (*coverage, *bloat)))))
    columns = ("setting", "coverage, least", "median", "most", "bloat, least", "median", "most")
    return ReportTable("Coverage and bloat of single inputs", columns, cells)
