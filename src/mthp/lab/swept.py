"""The table of a sweep, read from its file, and summed over its inputs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mthp.bounded import named
from mthp.errors import UsageError
from mthp.geometry import GEOMETRIES, X86_64, Geometry
from mthp.lab.figures import Row, setting_names, share
from mthp.lab.rows import checked_rows
from mthp.snapshot.rowfiles import columns_and_metadata, read_rows
from mthp.units import parse_size

COLUMNS = ("input", "target", "setting", "policy", "orders", "scan", "resident_bytes", "huge_coverage", "bloat_bytes")
"""Columns that identify the table of a sweep."""

_KINDS = {
    **dict.fromkeys(("input", "target", "policy", "orders"), str),
    **dict.fromkeys(("step", "setting", "scan", "resident_bytes", "bloat_bytes", "creep_bytes", "copied_bytes"), int),
    **dict.fromkeys(("translations", "huge_coverage", "large_coverage", "bloat_share"), float),
}
"""The columns of a row that a report needs, and their types."""


def is_sweep(path: Path) -> bool:
    """Return whether the file at `path` is the table of a sweep; False if it cannot be read."""
    return set(COLUMNS) <= set(columns_and_metadata(path)[0])


def read(path: Path) -> list[Row]:
    """Return the rows of the sweep at `path`, of a recording only those of the last step.

    Raises:
        UsageError: the file is another one, empty, or damaged.
    """
    rows, _ = read_rows(path)
    if not rows or not set(COLUMNS) <= rows[0].keys():
        raise UsageError(f"{path}: not a table of a sweep, or an empty one")
    with named(path):
        rows = checked_rows(rows, _KINDS)
        if len(set(_names(rows).values())) < len({row["setting"] for row in rows}):
            raise UsageError("damaged: two settings have the same values")
    # Later steps of an input replace earlier ones.
    last = {row["input"]: row["step"] for row in sorted(rows, key=lambda row: row["step"])}
    return [row for row in rows if row["step"] == last[row["input"]]]


def geometry_of(rows: Sequence[Row]) -> Geometry:
    """Return the geometry with these orders and sizes; that of x86-64 if none has them."""
    # A table has no geometry, but a column for each order, and the largest size among its settings.
    orders = max((int(name[12:]) for name in rows[0] if name.startswith("order_share_")), default=0)
    try:
        largest = max(parse_size(label) for label in str(rows[0]["orders"]).split(","))
    except UsageError:
        return X86_64
    found = (each for each in GEOMETRIES.values() if (each.pmd_order, each.pmd_size) == (orders, largest))
    return next(found, X86_64)


def summed(rows: Sequence[Row]) -> list[Row]:
    """Return one row for each setting and scan, of all inputs together.

    Bytes and counts are sums; shares are of the sum. An input that ended earlier keeps the values of its last
    scan.
    """
    names = _names(rows)
    scans = max(row["scan"] for row in rows)
    by_setting: dict[int, dict[str, dict[int, Row]]] = {}
    for row in rows:
        by_setting.setdefault(row["setting"], {}).setdefault(row["input"], {})[row["scan"]] = row
    return [
        _sum([_at(by_scan, scan) for by_scan in inputs.values()], names[setting], scan)
        for setting, inputs in by_setting.items()
        for scan in range(min(row["scan"] for row in rows), scans + 1)
    ]


def _at(by_scan: dict[int, Row], scan: int) -> Row:
    row = by_scan[max(at for at in by_scan if at <= max(scan, min(by_scan)))]
    # A scan after the last one adds nothing.
    return row if row["scan"] == scan else row | {"creep_bytes": 0}


def _sum(rows: Sequence[Row], name: str, scan: int) -> Row:
    resident = sum(row["resident_bytes"] for row in rows)
    made: Row = {"setting": name, "policy": rows[0]["policy"], "scan": scan, "resident_bytes": resident}
    for key in ("bloat_bytes", "creep_bytes", "copied_bytes", "translations"):
        made[key] = sum(row[key] for row in rows)
    for key in rows[0]:
        if key.startswith("order_share_") or key in ("huge_coverage", "large_coverage"):
            # An input of another machine may have no folios of this order.
            made[key] = share(sum((row[key] or 0.0) * row["resident_bytes"] for row in rows), resident)
    # Inputs without heat have neither, and tables of older sweeps no such column.
    seen = [row for row in rows if row.get("hot_coverage") is not None]
    size = sum(row["resident_bytes"] for row in seen)
    made["hot_coverage"] = sum(row["hot_coverage"] * row["resident_bytes"] for row in seen) / size if size else None
    walks = [row["tlb_misses"] for row in rows if row.get("tlb_misses") is not None]
    made["tlb_misses"] = sum(walks) if walks else None
    # The memory before the first collapse is that of now, without what was filled.
    made["bloat_share"] = share(made["bloat_bytes"], resident - made["bloat_bytes"])
    return made | {"coverage": made["huge_coverage"]}


def _names(rows: Sequence[Row]) -> dict[int, str]:
    return dict(zip((row["setting"] for row in rows), setting_names(rows), strict=True))
