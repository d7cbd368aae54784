"""Every figure of this project's comparisons, defined once: its name, its unit, and its meaning.

:data:`METRICS` has the definitions; tables use the names as columns, and reports print the meanings. The functions
below turn raw counts into these figures. Shares are of 1, sizes in bytes, times in seconds.

"Resident" is the target's memory in the PMD ranges that may be collapsed: pages with contents, and those that a
collapse filled; the zero page does not count. Bloat counts from the state before the first collapse.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mthp.sim.clock import Costs

MAX_ORDER = 20
"""The largest folio order to count: a 1 GiB page of hugetlbfs has 18. Larger ones count as this."""

Better = Literal["more", "less", ""]


@dataclass(frozen=True, slots=True)
class Metric:
    """One figure.

    Attributes:
        name: name of its column.
        unit: ``bytes``, ``share`` (of 1), ``seconds``, ``pages``, ``entries``, ``folios``, ``count``, or ``""``.
        meaning: its meaning in words.
        better: whether ``more`` or ``less`` of it is better; ``""`` for neither.
    """

    JSON: ClassVar = "unit meaning"

    name: str
    unit: str
    meaning: str
    better: Better = ""


_ALL = (
    Metric("resident_bytes", "bytes", "memory in the PMD ranges that may be collapsed, filled holes included"),
    Metric("out_of_reach_bytes", "bytes", "resident memory in no whole PMD range of its mapping, which is not in it"),
    Metric("huge_coverage", "share", "part of the resident memory that PMD entries map", "more"),
    Metric("hot_coverage", "share", "part of the observed accesses that go to memory that PMD entries map", "more"),
    Metric("large_coverage", "share", "part of the resident memory in folios of order 1 or larger", "more"),
    Metric("order_share", "share", "part of the resident memory in folios of one order; one column for each order"),
    Metric("bloat_bytes", "bytes", "zero-filled memory that collapses added, all scans together", "less"),
    Metric("bloat_share", "share", "bloat_bytes as a part of the resident memory before the first collapse", "less"),
    Metric("creep_bytes", "bytes", "bloat that this scan added; creep is bloat after the first", "less"),
    Metric("given_back_bytes", "bytes", "memory that trims gave back; of a comparison, the predicted effect of a trim"),
    Metric("copied_bytes", "bytes", "contents that collapses copied, all scans together", "less"),
    Metric("folios", "folios", "folios that collapses made, all scans together"),
    Metric("scanned_ptes", "entries", "PTEs scanned, all scans together", "less"),
    Metric("khugepaged_seconds", "seconds", "processor time of scanning, copying, clearing and installing", "less"),
    Metric("translations", "entries", "TLB entries that hold all of the resident memory at once", "less"),
    Metric(
        "tlb_reach_bytes",
        "bytes",
        "memory that the last level of the TLB maps at once, at the target's mean size",
        "more",
    ),
    Metric("tlb_misses", "count", "page walks of a trace, or of accesses drawn by heat, by the model of a TLB", "less"),
    Metric("alloc_attempts", "count", "folios that collapses requested from the allocator"),
    Metric("alloc_failures", "count", "of these, the folios that could not be allocated", "less"),
    Metric("alloc_failure_share", "share", "alloc_failures as a part of alloc_attempts", "less"),
    Metric("time_to_coverage", "seconds", "time until a coverage was reached; infinite if it never was", "less"),
    Metric("coverage", "share", "part of the resident memory in folios of the size that counts, or larger", "more"),
    Metric("seconds", "seconds", "simulated time of the row, or time of the step of a recording"),
    Metric("processes", "count", "processes that live"),
    Metric("killed", "count", "processes that the OOM killer ended", "less"),
    Metric("free_bytes", "bytes", "memory that is free on the machine"),
    Metric(
        "fairness",
        "share",
        "Jain's index of processes' coverages: 1 if all are equal, 1/n if one has all",
        "more",
    ),
)

_SETTINGS = {
    **dict.fromkeys(("setting", "policy", "orders", "trigger", "process"), "string"),
    **dict.fromkeys(("max_ptes_none", "max_ptes_swap", "max_ptes_shared", "mthp_min_order", "scan"), "integer"),
}
"""The other columns of rows, which identify a row, with their types in JSON."""

METRICS: Mapping[str, Metric] = {metric.name: metric for metric in _ALL}
"""The definitions, by name."""


def row_schema() -> dict[str, Any]:
    """Return the JSON Schema of a row."""
    metrics = {name: {"type": ["number", "null"], "description": metric.meaning} for name, metric in METRICS.items()}
    share = metrics.pop("order_share")
    settings = {name: {"type": kind} for name, kind in _SETTINGS.items()}
    return {"type": "object", "properties": settings | metrics, "patternProperties": {"^order_share_[0-9]+$": share}}


Row = Annotated[dict[str, Any], row_schema]
"""One row of a result table: the columns that identify it, and metrics by name."""


SETTING = ("orders", "trigger", "max_ptes_none", "max_ptes_swap", "max_ptes_shared", "mthp_min_order")
"""Columns that make up a setting, in addition to the policy."""


def setting_names(rows: Sequence[Row]) -> list[str]:
    """Return the name of the setting of each row: the policy, and the other values in which the settings differ."""
    # A value that all settings share would only make the names longer.
    differing = [key for key in SETTING if len({row.get(key) for row in rows}) > 1]
    return [" ".join([row["policy"], *(f"{key}={row.get(key)}" for key in differing)]) for row in rows]


def order_column(order: int) -> str:
    """Return the name of the column of one order's share: ``"order_share_9"``."""
    return f"order_share_{order}"


def metric_of(column: str) -> Metric:
    """Return the definition of a column of a result table.

    Raises:
        KeyError: no metric has that name.
    """
    return METRICS["order_share" if column.startswith("order_share_") else column]


def khugepaged_seconds(
    costs: Costs, *, ptes: int, ranges: int, copied_bytes: int, zeroed_bytes: int, folios: int, folio_pages: int
) -> float:
    """Return the processor seconds of khugepaged's work, by the simulated machine's table of costs.

    Args:
        ptes, ranges: PTEs and PMD ranges that were scanned.
        copied_bytes, zeroed_bytes: bytes that were copied, and cleared.
        folios, folio_pages: folios that were made, and the pages in them.
    """
    picoseconds = ptes * costs.scan_pte + ranges * costs.scan_range
    picoseconds += copied_bytes * costs.copy_byte + zeroed_bytes * costs.zero_byte
    picoseconds += folios * (costs.collapse + costs.alloc_large) + folio_pages * costs.collapse_pte
    return picoseconds / 1e12


def share(part: float, whole: float) -> float:
    """Return `part` as a share of `whole`; 0.0 if `whole` is 0."""
    return part / whole if whole else 0.0


def coverage_from(pages: ArrayLike, order: int) -> float:
    """Return the share of pages in folios of `order` or larger.

    Args:
        pages: int, shape (orders,): resident pages by the order of their folio.
    """
    counts = np.asarray(pages)
    return share(float(counts[order:].sum()), float(counts.sum()))


def translations(pages: ArrayLike, pmd_mapped: float, pmd_order: int, coalesced_order: int = 0) -> float:
    """Return the TLB entries that hold all of the pages at once.

    Args:
        pages: int, shape (orders,): resident pages by the order of their folio.
        pmd_mapped: pages of these that PMD entries map.
        coalesced_order: order of the largest run of PTEs in one entry; 0 for a processor that does not coalesce.
    """
    counts = np.array(pages, np.float64)
    largest = len(counts) - 1
    # One entry holds a folio that a PMD entry maps; PTEs map all others.
    counts[min(pmd_order, largest)] -= pmd_mapped
    # A run that is coalesced never spans folios, because their frames need not be adjacent.
    per_entry = 1 << np.minimum(np.arange(len(counts)), coalesced_order)
    return float((counts / per_entry).sum()) + pmd_mapped / (1 << pmd_order)


def time_to_coverage(seconds: ArrayLike, coverage: ArrayLike, wanted: float) -> float:
    """Return the time at which `coverage` first was at least `wanted`; ``inf`` if never.

    Args:
        seconds, coverage: float, shape (steps,): time of each step, and its coverage.
    """
    reached = np.flatnonzero(np.asarray(coverage, np.float64) >= wanted)
    return float(np.asarray(seconds, np.float64)[reached[0]]) if len(reached) else float("inf")


def frontier(coverage: Sequence[float], bloat: Sequence[float]) -> list[bool]:
    """Return for each setting whether no other has at least its coverage and at most its bloat, and one better."""
    # Both are to be small, so coverage is negated.
    points = np.column_stack([-np.asarray(coverage, np.float64), np.asarray(bloat, np.float64)])
    return [not bool(((points <= point).all(axis=1) & (points < point).any(axis=1)).any()) for point in points]


def fairness(values: Sequence[float] | NDArray[np.float64]) -> float:
    """Return Jain's index of processes' shares (Jain, Chiu, Hawe 1984): from 1/n to 1; 1.0 if all are 0."""
    shares = np.asarray(values, np.float64)
    squares = float((shares**2).sum())
    return float(shares.sum()) ** 2 / (len(shares) * squares) if squares else 1.0
