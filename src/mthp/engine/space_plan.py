"""The plan of an address space: the folios that a collapse would make, their price, and the memory it leaves alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from mthp.eligibility import Trigger
from mthp.geometry import MIN_ANON_ORDER, Geometry
from mthp.heat import Heat, worth
from mthp.measuring import Scope
from mthp.metrics import Coverage
from mthp.ptes import ColumnTable
from mthp.results import ScanResult
from mthp.tabular import Tabular
from mthp.tunables import Tunables
from mthp.vma import Vma


@dataclass(frozen=True)
class Ranges(ColumnTable):
    """The scanned PMD ranges, and parts of them, as columns, by ascending address.

    Attributes:
        address: uint64, start address.
        scan_result: int8, :class:`~mthp.results.ScanResult`.
        resident: int32, pages with contents now.
        copied: int32, pages with contents that would be copied.
        filled: int32, PTEs without contents that would become memory: bloat.
    """

    DTYPES = (np.uint64, np.int8, np.int32, np.int32, np.int32)

    address: NDArray[np.uint64]
    scan_result: NDArray[np.int8]
    resident: NDArray[np.int32]
    copied: NDArray[np.int32]
    filled: NDArray[np.int32]


@dataclass(frozen=True)
class Folios(ColumnTable):
    """The folios that would be made, as columns, by ascending address.

    Attributes:
        address: uint64, start address.
        order: int8.
        filled: int32, PTEs without contents in the folio.
    """

    DTYPES = (np.uint64, np.int8, np.int32)

    address: NDArray[np.uint64]
    order: NDArray[np.int8]
    filled: NDArray[np.int32]

    def ends(self, geometry: Geometry) -> NDArray[np.uint64]:
        """Return the end address of each folio: uint64, shape (folios,)."""
        return self.address + (np.uint64(geometry.page_size) << self.order.astype(np.uint64))


@dataclass(frozen=True, slots=True)
class Left:
    """Memory that a plan leaves alone, for one reason.

    Attributes:
        reason: why.
        mappings: number of mappings; 0 if the reason is not one of a mapping.
        size: bytes of these mappings, or of the PMD ranges.
        resident: bytes of them that count for the coverage.
    """

    JSON: ClassVar = "reason mappings bytes=size resident_bytes=resident"

    reason: str
    mappings: int
    size: int
    resident: int


@dataclass(frozen=True)
class SpacePlan(Tabular):
    """The plan of a collapse of an address space.

    Attributes:
        label: name of the target.
        geometry: geometry of its machine.
        policy: name of the policy.
        orders: the orders that were enabled for any mapping.
        trigger, tunables: the circumstances that the plan assumes.
        ranges: the PMD ranges that have contents.
        folios: the folios that would be made.
        refused: mappings that are left alone, each with the reason; with `within`, only those inside it.
        planned_bytes: size of the PMD ranges of the mappings that were planned.
        coverage_order: coverage counts folios of this order and larger ones: the smallest requested order, or the PMD
            order if none was named.
        scope: the memory that the coverage is of.
        before, after: the coverage now, and after the plan is carried out.
        eligible: as `before`, of only those mappings that may be collapsed.
        refused_resident: pages that count for the coverage in each of the `refused` mappings.
        heat: which memory the target uses; None if unknown.
        small: whether memory outside of whole PMD ranges of its mapping was planned too.
    """

    ROWS: ClassVar = "folios"
    JSON: ClassVar = (
        "target=label geometry policy trigger orders max_ptes_none=tunables.max_ptes_none"
        " max_ptes_swap=tunables.max_ptes_swap max_ptes_shared=tunables.max_ptes_shared planned_bytes resident_bytes"
        " copied_bytes bloat_bytes=filled_bytes coverage coverage_after coverage_order measured=before"
        " measured_after=after already_bytes folios_by_order ranges_by_result left_alone=left heat heat_share"
    )

    label: str
    geometry: Geometry
    policy: str
    orders: tuple[int, ...]
    trigger: Trigger
    tunables: Tunables
    ranges: Ranges
    folios: Folios
    refused: tuple[tuple[Vma, str], ...]
    planned_bytes: int
    coverage_order: int
    scope: Scope = field(default_factory=Scope)
    before: Coverage = field(default_factory=Coverage)
    after: Coverage = field(default_factory=Coverage)
    eligible: Coverage = field(default_factory=Coverage)
    refused_resident: tuple[int, ...] = ()
    heat: Heat | None = None
    small: bool = False

    def worth(self, folios: Folios) -> NDArray[np.float64]:
        """Return the worth of each folio by its heat, 0 without heat: float64, shape (folios,)."""
        if self.heat is None:
            return np.zeros(len(folios))
        pages = np.int64(1) << folios.order.astype(np.int64)
        return worth(self.heat.within(folios.address, folios.ends(self.geometry)), pages - folios.filled)

    def ranked(self, folios: Folios) -> Folios:
        """Return folios of the plan in the order in which they are made.

        The largest first; of one order those of the greatest worth, then the fullest, then by ascending address, so
        that a budget buys as much as it can.
        """
        return folios[self.ranking(folios)]

    def ranking(self, folios: Folios) -> NDArray[np.intp]:
        """Return the rows of `folios` in the order in which they are made: intp, shape (folios,)."""
        # The last key of lexsort is the first to sort by.
        return np.lexsort((folios.address, folios.filled, -self.worth(folios), -folios.order.astype(np.int16)))

    def range_ranks(self, folios: Folios) -> NDArray[np.intp]:
        """Return the rank of each folio's PMD range: intp, shape (folios,).

        The ranges of the greatest worth come first, of equals those with least to fill.
        """
        ranges, at = np.unique(folios.address // np.uint64(self.geometry.pmd_size), return_inverse=True)
        filled = np.bincount(at, weights=folios.filled, minlength=len(ranges))
        pages = (1 << folios.order.astype(np.int64)) - folios.filled
        # The worth of a block is per copied page, and so is the worth of a range.
        gained = np.bincount(at, weights=self.worth(folios) * pages, minlength=len(ranges))
        worth = gained / np.maximum(np.bincount(at, weights=pages, minlength=len(ranges)), 1)
        ranks = np.empty(len(ranges), np.intp)
        ranks[np.lexsort((filled, -worth))] = np.arange(len(ranges))
        return ranks[at]

    @cached_property
    def heat_share(self) -> float | None:
        """The share of the accesses seen that lie in the folios; None if none were seen."""
        if self.heat is None or not self.heat.spans:
            return None
        return self.heat.share(self.folios.address, self.folios.ends(self.geometry))

    def table_columns(self) -> Mapping[str, Any]:
        """Return the columns of the folios that would be made; :attr:`ranges` is a table of its own."""
        return self.folios.table_columns()

    def _repr_svg_(self) -> str:
        """Return the plan as an SVG picture, for a notebook."""
        # Imported here, because only notebooks draw plans.
        from mthp.engine.picture import picture

        return picture(self)

    @cached_property
    def folios_by_order(self) -> dict[int, int]:
        """Number of folios by order, the largest order first."""
        counts = np.bincount(self.folios.order, minlength=1)
        return {int(order): int(counts[order]) for order in np.flatnonzero(counts)[::-1]}

    @cached_property
    def ranges_by_result(self) -> dict[ScanResult, int]:
        """Number of PMD ranges by scan result, the most frequent first."""
        counts = np.bincount(self.ranges.scan_result, minlength=len(ScanResult))
        return {ScanResult(index): int(counts[index]) for index in np.argsort(-counts, kind="stable") if counts[index]}

    @property
    def resident_bytes(self) -> int:
        """Bytes with contents in the PMD ranges."""
        return int(self.ranges.resident.sum(dtype=np.int64)) * self.geometry.page_size

    @property
    def copied_bytes(self) -> int:
        """Bytes that would be copied."""
        return int(self.ranges.copied.sum(dtype=np.int64)) * self.geometry.page_size

    @property
    def filled_bytes(self) -> int:
        """Bytes by which resident memory would grow: the bloat."""
        return int(self.ranges.filled.sum(dtype=np.int64)) * self.geometry.page_size

    @property
    def out_of_reach_bytes(self) -> int:
        """Bytes that are resident now in no whole PMD range of their mapping."""
        return self.before.out_of_reach_bytes(self.geometry)

    @property
    def coverage(self) -> float:
        """The share of `before` in folios of `coverage_order` or larger; 0.0 if nothing is resident."""
        return self.before.share(self.coverage_order)

    @property
    def coverage_after(self) -> float:
        """The share of `after` in folios of `coverage_order` or larger; 0.0 if nothing is resident."""
        return self.after.share(self.coverage_order)

    @property
    def already_bytes(self) -> int:
        """Bytes that may be collapsed and already lie in folios of the requested sizes."""
        return self.eligible.pages[self.coverage_order] * self.geometry.page_size

    @property
    def finished(self) -> bool:
        """Whether all memory that may be collapsed under these limits, and not none, is already as requested."""
        return not len(self.folios) and self.already_bytes > 0

    @cached_property
    def left(self) -> tuple[Left, ...]:
        """The memory that the plan leaves alone, by reason, the most resident bytes first."""
        page, pmd = self.geometry.page_size, self.geometry.label(self.geometry.pmd_order)
        found: dict[str, Left] = {}
        for (vma, reason), resident in zip(self.refused, self.refused_resident, strict=False):
            one = found.get(reason, Left(reason, 0, 0, 0))
            found[reason] = Left(reason, one.mappings + 1, one.size + vma.size, one.resident + resident * page)
        left = list(found.values())
        for result, count in self.ranges_by_result.items():
            if result not in _NOT_HINDERED:
                resident = int(self.ranges.resident[self.ranges.scan_result == result].sum(dtype=np.int64))
                reason = f"{result.name}: {result.meaning}"
                left.append(Left(reason, 0, count * self.geometry.pmd_size, resident * page))
        # What is resident in eligible mappings and in no scanned range lies at the mappings' ends.
        ends = (self.eligible.resident - int(self.ranges.resident.sum(dtype=np.int64))) * page
        if ends > 0:
            smallest = self.geometry.label(MIN_ANON_ORDER)
            where = f"in no aligned {smallest}" if self.small else f"outside of whole {pmd} ranges"
            left.append(Left(f"at the ends of mappings, {where}", 0, ends, ends))
        return tuple(sorted(left, key=lambda one: (-one.resident, -one.size)))


_NOT_HINDERED = frozenset({ScanResult.SUCCEED, ScanResult.PMD_MAPPED, ScanResult.NO_PTE_TABLE})
"""Results of PMD ranges that yield folios, or in which there is nothing to do."""
