"""The coverage of an address space, measured as its entries are read: now, and after planned folios are made.

:mod:`mthp.metrics` defines coverage.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mthp.addrspace import AddressSpace
from mthp.geometry import Geometry
from mthp.metrics import ORDERS, Coverage, CoverageCounter, anonymous_pages, mapped_runs, page_numbers, resident_pages
from mthp.ptes import Pte, PteColumns, Segment, in_range_portions, without
from mthp.vma import Vma, VmaKind

PORTION_PAGES = 1 << 18
"""Pages per read: enough to amortise the cost of a call, and few enough to bound memory."""


@dataclass(frozen=True, slots=True)
class Scope:
    """The memory that a coverage is of: by default the anonymous memory of the whole process.

    Attributes:
        within: only the whole pages in this range of addresses.
        files: memory of files and shared memory, too.
    """

    within: Segment | None = None
    files: bool = False


@dataclass(frozen=True, slots=True)
class Measured:
    """The coverage of an address space at one moment.

    Attributes:
        now: the present coverage.
        planned: the coverage after the expected folios are made.
        by_vma: the present coverage of each mapping.
    """

    now: Coverage
    planned: Coverage
    by_vma: tuple[Coverage, ...]


def measure(
    space: AddressSpace,
    vmas: Sequence[Vma],
    scope: Scope | None = None,
    *,
    addresses: NDArray[np.uint64] | None = None,
    orders: NDArray[np.int8] | None = None,
) -> Measured:
    """Measure the coverage of an address space.

    Args:
        vmas: its mappings, by ascending address.
        scope: the memory that counts; by default the anonymous memory of all mappings.
        addresses, orders: planned folios, by ascending address: uint64 and int8, shape (folios,).

    Raises:
        TargetVanishedError: the process is gone.
    """
    meter = Meter(space, vmas, scope)
    if addresses is not None and orders is not None:
        meter.expect(addresses, orders)
    for portion in meter.portions(meter.segments):
        meter.add(space.read(portion))
    return meter.measured()


def out_of_reach_bytes(space: AddressSpace) -> int:
    """Return the bytes of anonymous memory outside of whole PMD ranges of its mapping, reading only that memory.

    Raises:
        TargetVanishedError: the process is gone.
    """
    vmas = space.vmas()
    meter = Meter(space, vmas)
    for portion in meter.portions(without(meter.segments, [vma.pmd_ranges(space.geometry) for vma in vmas])):
        meter.add(space.read(portion))
    return meter.measured().now.out_of_reach_bytes(space.geometry)


class Meter:
    """Measures the coverage of an address space, as its entries are read.

    Args:
        vmas: its mappings, by ascending address.
        scope: the memory that counts; by default the anonymous memory of all mappings.

    Attributes:
        segments: segments to read: those that may have pages that count.

    Raises:
        TargetVanishedError: the process is gone.
    """

    def __init__(self, space: AddressSpace, vmas: Sequence[Vma], scope: Scope | None = None) -> None:
        self._geometry = space.geometry
        self._scope = scope or Scope()
        self._mappings = len(vmas)
        self._counter = CoverageCounter([(vma.start, vma.end) for vma in vmas], space.geometry)
        self._planned = _Planned(space.geometry)
        page_size = space.geometry.page_size
        wanted = [segment for vma in vmas if (segment := _counted(vma, self._scope, page_size)) is not None]
        self.segments = space.populated(wanted, page_size)

    def portions(self, segments: Iterable[Segment]) -> Iterator[list[Segment]]:
        """Group and cut `segments` at PMD ranges, so that no folio that the hardware could use spans two reads."""
        return in_range_portions(segments, self._geometry, PORTION_PAGES * self._geometry.page_size)

    def expect(self, addresses: NDArray[np.uint64], orders: NDArray[np.int8]) -> None:
        """Expect folios to be made of the entries that are added next.

        Args:
            addresses, orders: the folios, by ascending address: uint64 and int8, shape (folios,).
        """
        self._planned.expect(addresses, orders)

    def add(self, columns: PteColumns) -> None:
        """Count entries; each of their segments must lie in one mapping."""
        chosen = anonymous_pages(columns)
        if self._scope.files:
            chosen = resident_pages(columns) & ~columns.has(Pte.HUGETLB)
        self._counter.add(columns, chosen)
        self._planned.add(columns, chosen)

    def measured(self) -> Measured:
        """Return the coverage of all added entries."""
        by_vma = tuple(self._counter.coverage(at, at + 1) for at in range(self._mappings))
        now = Coverage.total(by_vma)
        return Measured(now, self._planned.after(now), by_vma)


def _counted(vma: Vma, scope: Scope, page_size: int) -> Segment | None:
    """Return the part of a mapping that may have pages that count; None if it has none."""
    # A private mapping of a file has anonymous memory once it was written to, which smaps shows.
    private = vma.kind is VmaKind.FILE and vma.has_anon_vma is True and not vma.permissions.endswith("s")
    if vma.kind is not VmaKind.ANON and not private and not (scope.files and vma.kind in (VmaKind.FILE, VmaKind.SHMEM)):
        return None
    start, end = vma.start, vma.end
    if scope.within is not None:
        low, high = scope.within
        start, end = max(start, -(-low // page_size) * page_size), min(end, high // page_size * page_size)
    return (start, end) if start < end else None


class _Planned:
    """The counted memory that lies where folios are planned.

    A planned folio is aligned to its size, so every block of its order or a smaller one lies either in it or outside of
    it: the present counts of such blocks are subtracted, and the folio is added.
    """

    def __init__(self, geometry: Geometry) -> None:
        self._geometry = geometry
        self._page = self._order = np.empty(0, np.int64)
        self._made = np.zeros(ORDERS, np.int64)
        self._inside = np.zeros(ORDERS, np.int64)
        self._unknown = 0

    def expect(self, addresses: NDArray[np.uint64], orders: NDArray[np.int8]) -> None:
        """Count pages of these folios, by ascending address, in the entries that are added next."""
        self._page = (addresses // np.uint64(self._geometry.page_size)).astype(np.int64)
        self._order = orders.astype(np.int64)
        pages = np.int64(1) << self._order
        self._made += np.bincount(self._order, weights=pages, minlength=ORDERS).astype(np.int64)[:ORDERS]

    def add(self, columns: PteColumns, chosen: NDArray[np.bool_]) -> None:
        """Count the pages that are `chosen` and lie in planned folios."""
        if not len(self._page) or not len(columns.state):
            return
        page = page_numbers(columns, self._geometry.page_size)
        at = np.searchsorted(self._page, page, side="right") - 1
        inside = chosen & (at >= 0)
        inside &= page < self._page[at] + (np.int64(1) << self._order[at])
        self._inside[0] += np.count_nonzero(inside)
        self._unknown += int(np.count_nonzero(inside & (columns.folio_order < 0)))
        runs = mapped_runs(columns, self._geometry.page_size, inside, at)
        planned = self._order[at[runs.index]]
        for order in range(1, int(runs.order.max(initial=0)) + 1):
            self._inside[order] += int(runs.usable(order, self._geometry)[planned >= order].sum())

    def after(self, now: Coverage) -> Coverage:
        """Return the coverage after the folios are made."""
        # Coverage counts a folio for its order and for all smaller ones.
        in_larger = np.cumsum(self._made[::-1])[::-1]
        pages = np.array(now.pages, np.int64) - self._inside + in_larger
        return Coverage(tuple(pages.tolist()), now.unknown - self._unknown, now.out_of_reach)
