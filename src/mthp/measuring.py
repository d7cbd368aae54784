"""The coverage of an address space, measured as its entries are read: now, and once planned folios are made.

What coverage is, :mod:`mthp.metrics` says.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mthp.addrspace import AddressSpace
from mthp.geometry import Geometry
from mthp.metrics import ORDERS, Coverage, CoverageCounter, anonymous_pages, mapped_runs, page_numbers, resident_pages
from mthp.ptes import Pte, PteColumns, Segment, in_range_blocks, without
from mthp.vma import Vma, VmaKind

BLOCK_PAGES = 1 << 18
"""Pages read at a time: enough that the cost of a call does not count, little enough to stay in bounds."""


@dataclass(frozen=True, slots=True)
class Scope:
    """What a coverage is of: anonymous memory, of the whole process by default.

    Attributes:
        within: the whole pages in this range of addresses alone.
        files: memory of files and shared memory, too.
    """

    within: Segment | None = None
    files: bool = False


@dataclass(frozen=True, slots=True)
class Measured:
    """The coverage of an address space at one moment.

    Attributes:
        now: as it is.
        planned: as it will be once some folios are made.
        by_vma: the coverage of each mapping that was given.
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
        scope: what counts; the anonymous memory of all of them by default.
        addresses, orders: folios that are to be made, by ascending address: uint64 and int8, shape (folios,).

    Raises:
        TargetVanishedError: the process is gone.
    """
    meter = Meter(space, vmas, scope)
    if addresses is not None and orders is not None:
        meter.expect(addresses, orders)
    for block in meter.blocks(meter.segments):
        meter.add(space.read(block))
    return meter.measured()


def out_of_reach_bytes(space: AddressSpace) -> int:
    """Return the bytes of anonymous memory in no whole PMD range of its mapping, without reading the other memory.

    Raises:
        TargetVanishedError: the process is gone.
    """
    vmas = space.vmas()
    meter = Meter(space, vmas)
    for block in meter.blocks(without(meter.segments, [vma.pmd_ranges(space.geometry) for vma in vmas])):
        meter.add(space.read(block))
    return meter.measured().now.out_of_reach_bytes(space.geometry)


class Meter:
    """Measures the coverage of an address space, as its entries are read.

    Args:
        vmas: its mappings, by ascending address.
        scope: what counts; the anonymous memory of all of them by default.

    Attributes:
        segments: what is to be read: what may hold pages that count.

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

    def blocks(self, segments: Iterable[Segment]) -> Iterator[list[Segment]]:
        """Group and cut `segments` at PMD ranges, so that no folio that the hardware could use falls into two reads."""
        return in_range_blocks(segments, self._geometry, BLOCK_PAGES * self._geometry.page_size)

    def expect(self, addresses: NDArray[np.uint64], orders: NDArray[np.int8]) -> None:
        """Expect that some folios are made of what is added next.

        Args:
            addresses, orders: of the folios, by ascending address: uint64 and int8, shape (folios,).
        """
        self._planned.expect(addresses, orders)

    def add(self, columns: PteColumns) -> None:
        """Count entries, each of which lies in one mapping with all of its segment."""
        chosen = anonymous_pages(columns)
        if self._scope.files:
            chosen = resident_pages(columns) & ~columns.has(Pte.HUGETLB)
        self._counter.add(columns, chosen)
        self._planned.add(columns, chosen)

    def measured(self) -> Measured:
        """Return what was counted."""
        by_vma = tuple(self._counter.coverage(at, at + 1) for at in range(self._mappings))
        now = Coverage.total(by_vma)
        return Measured(now, self._planned.after(now), by_vma)


def _counted(vma: Vma, scope: Scope, page_size: int) -> Segment | None:
    """Return the part of a mapping that may hold pages that count; None if there is none."""
    # A private mapping of a file holds anonymous memory once something was written; smaps says so at once.
    private = vma.kind is VmaKind.FILE and vma.has_anon_vma is True and not vma.permissions.endswith("s")
    if vma.kind is not VmaKind.ANON and not private and not (scope.files and vma.kind in (VmaKind.FILE, VmaKind.SHMEM)):
        return None
    start, end = vma.start, vma.end
    if scope.within is not None:
        low, high = scope.within
        start, end = max(start, -(-low // page_size) * page_size), min(end, high // page_size * page_size)
    return (start, end) if start < end else None


class _Planned:
    """What of the memory that is counted lies where folios are to be made.

    A planned folio of some order is aligned to its size, so every block of that order or a smaller one lies either in
    it or outside of it: what such blocks count for now is taken away, and the folio is put in their place.
    """

    def __init__(self, geometry: Geometry) -> None:
        self._geometry = geometry
        self._page = self._order = np.empty(0, np.int64)
        self._made = np.zeros(ORDERS, np.int64)
        self._inside = np.zeros(ORDERS, np.int64)
        self._unknown = 0

    def expect(self, addresses: NDArray[np.uint64], orders: NDArray[np.int8]) -> None:
        """Look for the pages of these folios, by ascending address, in what is added next."""
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
        """Return the coverage once the folios are made."""
        in_larger = np.cumsum(self._made[::-1])[::-1]
        pages = np.array(now.pages, np.int64) - self._inside + in_larger
        return Coverage(tuple(pages.tolist()), now.unknown - self._unknown, now.out_of_reach)
