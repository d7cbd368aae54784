"""The plan of an address space: which folios a collapse would make, at what price, and what it does not reach."""

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
from mthp.ptes import Table
from mthp.results import ScanResult
from mthp.tabular import Tabular
from mthp.tunables import Tunables
from mthp.vma import Vma


@dataclass(frozen=True)
class Ranges(Table):
    """The PMD ranges, and parts of them, that were scanned, as columns; rows are by ascending address.

    Attributes:
        address: uint64, where it begins.
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
class Folios(Table):
    """The folios that would be made, as columns; rows are by ascending address.

    Attributes:
        address: uint64.
        order: int8.
        filled: int32, PTEs without contents in it.
    """

    DTYPES = (np.uint64, np.int8, np.int32)

    address: NDArray[np.uint64]
    order: NDArray[np.int8]
    filled: NDArray[np.int32]

    def ends(self, geometry: Geometry) -> NDArray[np.uint64]:
        """Return the address behind each folio: uint64, shape (folios,)."""
        return self.address + (np.uint64(geometry.page_size) << self.order.astype(np.uint64))


@dataclass(frozen=True, slots=True)
class Left:
    """Memory that a plan does not reach, for one reason.

    Attributes:
        reason: why.
        mappings: how many mappings it is in; 0 where the reason is not one of a mapping.
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
    """What a collapse would make of an address space.

    Attributes:
        label: the target's name.
        geometry: of its machine.
        policy: the policy's name.
        orders: the orders that were enabled for any mapping.
        trigger, tunables: what the plan was made for.
        ranges: the PMD ranges that hold anything.
        folios: the folios that would be made.
        refused: mappings that are left alone, each with the reason; only those in `within` if that was given.
        planned_bytes: size of the PMD ranges of the mappings that were planned.
        asked_order: coverage is stated for folios of this order and larger ones: the smallest that was asked for, and
            the PMD order where no orders were named.
        scope: what the coverage is of.
        before, after: the coverage now, and once the plan is carried out.
        eligible: as `before`, of those mappings alone that may be collapsed.
        refused_resident: pages that count for the coverage in each of the `refused` mappings.
        heat: which memory the target uses; None if that is not known.
        small: whether memory in no whole PMD range of its mapping was planned too.
    """

    ROWS: ClassVar = "folios"
    JSON: ClassVar = (
        "target=label geometry policy trigger orders max_ptes_none=tunables.max_ptes_none"
        " max_ptes_swap=tunables.max_ptes_swap max_ptes_shared=tunables.max_ptes_shared planned_bytes resident_bytes"
        " copied_bytes bloat_bytes=filled_bytes coverage coverage_after coverage_order=asked_order measured=before"
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
    asked_order: int
    scope: Scope = field(default_factory=Scope)
    before: Coverage = field(default_factory=Coverage)
    after: Coverage = field(default_factory=Coverage)
    eligible: Coverage = field(default_factory=Coverage)
    refused_resident: tuple[int, ...] = ()
    heat: Heat | None = None
    small: bool = False

    def worth(self, folios: Folios) -> NDArray[np.float64]:
        """Return what each folio of the plan is worth by its heat, all 0 without: float64, shape (folios,)."""
        if self.heat is None:
            return np.zeros(len(folios))
        pages = np.int64(1) << folios.order.astype(np.int64)
        return worth(self.heat.within(folios.address, folios.ends(self.geometry)), pages - folios.filled)

    def ranked(self, folios: Folios) -> Folios:
        """Return folios of the plan in the order in which they are made.

        The largest first, of each order those that are worth most, then the fullest, then by ascending address: so that
        a budget buys as much as it can.
        """
        by_rank = (folios.address, folios.filled, -self.worth(folios), -folios.order.astype(np.int16))
        return folios[np.lexsort(by_rank)]

    @cached_property
    def heat_share(self) -> float | None:
        """The share of the accesses seen that the folios would serve; None if none were seen."""
        if self.heat is None or not self.heat.spans:
            return None
        return self.heat.share(self.folios.address, self.folios.ends(self.geometry))

    def table_columns(self) -> Mapping[str, Any]:
        """Return the folios that would be made; :attr:`ranges` is a table of its own."""
        return self.folios.table_columns()

    def _repr_svg_(self) -> str:
        """Return the plan as a picture, which a notebook shows."""
        # Imported here: a plan is not drawn elsewhere.
        from mthp.engine.picture import picture

        return picture(self)

    @cached_property
    def folios_by_order(self) -> dict[int, int]:
        """How many folios of which order would be made, the largest order first."""
        counts = np.bincount(self.folios.order, minlength=1)
        return {int(order): int(counts[order]) for order in np.flatnonzero(counts)[::-1]}

    @cached_property
    def ranges_by_result(self) -> dict[ScanResult, int]:
        """How many PMD ranges have which outcome, the most frequent first."""
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
        """Bytes that resident memory would grow by: the bloat."""
        return int(self.ranges.filled.sum(dtype=np.int64)) * self.geometry.page_size

    @property
    def coverage(self) -> float:
        """The share of `before` in folios of `asked_order` or larger; 0.0 if nothing is resident."""
        return self.before.share(self.asked_order)

    @property
    def coverage_after(self) -> float:
        """The same of `after`."""
        return self.after.share(self.asked_order)

    @property
    def already_bytes(self) -> int:
        """Bytes that may be collapsed and lie in folios of the sizes asked for already."""
        return self.eligible.pages[self.asked_order] * self.geometry.page_size

    @property
    def finished(self) -> bool:
        """Whether all that may be collapsed under these limits is as asked for already, and some memory is."""
        return not len(self.folios) and self.already_bytes > 0

    @cached_property
    def left(self) -> tuple[Left, ...]:
        """What the plan does not reach and why, by resident bytes, the most first."""
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
        ends = (self.eligible.resident - int(self.ranges.resident.sum(dtype=np.int64))) * page
        if ends > 0:
            smallest = self.geometry.label(MIN_ANON_ORDER)
            where = f"in no aligned {smallest}" if self.small else f"outside of whole {pmd} ranges"
            left.append(Left(f"at the ends of mappings, {where}", 0, ends, ends))
        return tuple(sorted(left, key=lambda one: (-one.resident, -one.size)))


_NOT_HINDERED = frozenset({ScanResult.SUCCEED, ScanResult.PMD_MAPPED, ScanResult.NO_PTE_TABLE})
"""Results of PMD ranges of which something is made, or in which there is nothing to do."""
