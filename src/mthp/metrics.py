"""Coverage: the share of anonymous resident memory that lies in folios of a size, as the hardware uses them.

A folio saves TLB entries only if it is mapped in one piece and aligned: the PMD size by a PMD entry, smaller sizes by a
naturally aligned run of PTEs with frames of the same alignment. So a page counts for an order if the aligned block
of that order around it is mapped completely, in one folio, at frames that are aligned as the addresses are. A 2M folio
that mremap(2) moved off its alignment does not count for 2M; if it was moved by 64K, it still counts for 64K.

Anonymous memory is what the kernel counts as RssAnon (proc_pid_status(5)) and smaps as Anonymous: pages without a file,
copies of a private file mapping's pages included, zero pages and hugetlbfs pages excluded.

The mapping of each folio has the categories of the kernel's tools/mm/thpmaps: by a PMD entry, or by PTEs and aligned,
unaligned (all of it, at an address that is not a multiple of its size) or partial. Without readable frame numbers
(snapshots, no CAP_SYS_ADMIN), frames are assumed to be aligned as the addresses are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mthp import ptes
from mthp.geometry import Geometry
from mthp.ptes import Pte, PteColumns, Segment
from mthp.units import format_size

MAX_FOLIO_ORDER = 20
"""The largest folio order to count: a 1 GiB hugetlbfs page of 4 KiB base pages has order 18."""

ORDERS = MAX_FOLIO_ORDER + 1

PMD, ALIGNED, UNALIGNED, PARTIAL = range(4)
ALIGNMENTS = ("pmd_mapped", "aligned", "unaligned", "partial")
"""How a folio is mapped, by the names in the output, in the order of the constants above."""


@dataclass(frozen=True, slots=True)
class Coverage:
    """The amounts of some resident memory that lie in folios of each size, as the hardware uses them.

    Attributes:
        pages: pages in blocks of each order or a larger one; index 0 counts all resident pages.
        unknown: those of them in a folio of unknown order, which count for order 0 alone.
        out_of_reach: resident pages outside of whole PMD ranges of their mapping. No kernel collapses them, to any
            order (hugepage_vma_revalidate(), mm/khugepaged.c); only the mover does.
    """

    JSON: ClassVar = "resident_bytes bytes_of_unknown_order out_of_reach_bytes share_by_order"

    pages: tuple[int, ...] = (0,) * ORDERS
    unknown: int = 0
    out_of_reach: int = 0

    @property
    def resident(self) -> int:
        """All resident pages."""
        return self.pages[0]

    def share(self, order: int) -> float:
        """Return the share of the resident pages in blocks of `order` or larger; 0.0 if nothing is resident."""
        return self.pages[min(order, MAX_FOLIO_ORDER)] / self.resident if self.resident else 0.0

    def resident_bytes(self, geometry: Geometry) -> int:
        """Return the bytes of all resident pages."""
        return self.resident * geometry.page_size

    def bytes_of_unknown_order(self, geometry: Geometry) -> int:
        """Return the bytes of `unknown`."""
        return self.unknown * geometry.page_size

    def out_of_reach_bytes(self, geometry: Geometry) -> int:
        """Return the bytes of `out_of_reach`."""
        return self.out_of_reach * geometry.page_size

    def share_by_order(self, geometry: Geometry) -> dict[int, float]:
        """Return the share of every order that anonymous memory can have."""
        return {order: self.share(order) for order in geometry.anon_orders}

    @classmethod
    def total(cls, parts: Sequence[Coverage]) -> Coverage:
        """Return the sum of `parts`."""
        pages = np.array([part.pages for part in parts], np.int64).reshape(-1, ORDERS).sum(axis=0)
        out_of_reach = sum(part.out_of_reach for part in parts)
        return cls(tuple(pages.tolist()), sum(part.unknown for part in parts), out_of_reach)


def out_of_reach_remark(size: int, geometry: Geometry, *, recommend: bool = True) -> str:
    """Return as a sentence that no kernel collapses `size` bytes (:attr:`Coverage.out_of_reach`); ``""`` if 0.

    Args:
        recommend: whether to recommend the mover, which may refuse the memory, or have just done its work.
    """
    if not size:
        return ""
    remedy = "; mthp collapse --small --mechanism move does, by injected code" if recommend else ""
    return (
        f"out of reach: {format_size(size)} lie in no whole {geometry.label(geometry.pmd_order)} range of their"
        f" mapping. No kernel collapses them{remedy}"
    )


@dataclass(frozen=True, slots=True)
class Durations:
    """The durations of some calls, or pauses, in seconds.

    Attributes:
        count: number of calls or pauses.
        p50, p99, max, total: percentiles, maximum and sum; 0.0 without any.
    """

    JSON: ClassVar = "count p50_seconds=p50 p99_seconds=p99 max_seconds=max total_seconds=total"

    count: int
    p50: float
    p99: float
    max: float
    total: float

    @classmethod
    def of(cls, seconds: ArrayLike) -> Durations:
        """Summarise `seconds`: float64, shape (calls,)."""
        array = np.asarray(seconds, np.float64)
        if not len(array):
            return cls(0, 0.0, 0.0, 0.0, 0.0)
        p50, p99 = np.percentile(array, [50, 99])
        return cls(len(array), float(p50), float(p99), float(array.max()), float(array.sum()))


@dataclass(frozen=True, slots=True)
class MappedRuns:
    """Runs of pages of large folios, contiguous in the folio and in the address space. Columns of shape (runs,).

    Attributes:
        index: int64, index of the first page in the columns that were read.
        page: int64, its address divided by the page size.
        frame: int64, its frame number, or `page` if frame numbers are not readable.
        order: int64, order of the folio.
        count: int64, pages of the run.
        pmd_mapped: bool, mapped by a PMD entry.
    """

    index: NDArray[np.int64]
    page: NDArray[np.int64]
    frame: NDArray[np.int64]
    order: NDArray[np.int64]
    count: NDArray[np.int64]
    pmd_mapped: NDArray[np.bool_]

    def usable(self, order: int, geometry: Geometry) -> NDArray[np.int64]:
        """Return the pages of each run in blocks of `order` that the hardware can use: int64, shape (runs,).

        A PMD entry maps its whole range, so pages under it count without their neighbours, which may not have been
        read.
        """
        by_pmd = np.where(self.pmd_mapped & (self.order >= order), self.count, 0)
        # Only a PMD entry serves these sizes: without it the hardware needs an entry for each smaller block.
        if order >= geometry.pmd_order:
            return by_pmd
        size = 1 << order
        first, end = (self.page + size - 1) >> order, (self.page + self.count) >> order
        whole = np.maximum(end - first, 0) << order
        fits = (self.order >= order) & (((self.page ^ self.frame) & (size - 1)) == 0)
        return np.where(self.pmd_mapped, by_pmd, np.where(fits, whole, 0))

    def alignment(self) -> NDArray[np.int64]:
        """Return how each run maps its folio, as an index into `ALIGNMENTS`: int64, shape (runs,)."""
        size = np.int64(1) << self.order
        aligned = np.where(self.page % size == 0, ALIGNED, UNALIGNED)
        return np.where(self.pmd_mapped, PMD, np.where(self.count == size, aligned, PARTIAL))


def resident_pages(columns: PteColumns) -> NDArray[np.bool_]:
    """Return which entries map a page with contents: bool, shape (pages,)."""
    resident: NDArray[np.bool_] = (columns.state & np.uint16(Pte.PRESENT | Pte.ZERO)) == Pte.PRESENT
    return resident


def anonymous_pages(columns: PteColumns) -> NDArray[np.bool_]:
    """Return which entries map anonymous memory: bool, shape (pages,)."""
    mask = Pte.PRESENT | Pte.ZERO | Pte.FILE | Pte.HUGETLB
    anonymous: NDArray[np.bool_] = (columns.state & np.uint16(mask)) == Pte.PRESENT
    return anonymous


def page_numbers(columns: PteColumns, page_size: int, index: NDArray[np.intp] | None = None) -> NDArray[np.int64]:
    """Return the page number of each entry, or of those at an ascending `index`: int64."""
    # Divided as Python integers, because the address of [vsyscall] exceeds an int64.
    starts = np.array([start // page_size for start, _ in columns.segments], np.int64)
    counts = np.array([(end - start) // page_size for start, end in columns.segments], np.int64)
    ends = np.cumsum(counts)
    if index is None:
        index = np.arange(len(columns.state))
    return np.repeat(starts - (ends - counts), np.diff(np.searchsorted(index, ends), prepend=0)) + index


def mapped_runs(
    columns: PteColumns,
    page_size: int,
    chosen: NDArray[np.bool_],
    group: NDArray[np.int64] | None = None,
) -> MappedRuns:
    """Return the large folios of `columns` as runs.

    Args:
        chosen: bool, shape (pages,): the pages that count.
        group: int64, shape (pages,): runs are cut where it changes.
    """
    index = np.flatnonzero(chosen & (columns.folio_order > 0))
    page = page_numbers(columns, page_size, index)
    frame = page if columns.pfn is None else columns.pfn[index].astype(np.int64)
    order = np.minimum(columns.folio_order[index], MAX_FOLIO_ORDER).astype(np.int64)
    pmd_mapped = (columns.state[index] & np.uint16(Pte.PMD_MAPPED)) != 0
    head = (frame & ((np.int64(1) << order) - 1)) == 0
    # A run ends where a page is skipped, frames stop to advance with pages, or the folio's order or mapping changes.
    parts = [page - np.arange(len(page)), frame - page, order, pmd_mapped]
    parts += [] if group is None else [group[index]]
    for part in parts:
        head[1:] |= part[1:] != part[:-1]
    head[:1] = True
    at = np.flatnonzero(head)
    count = np.diff(at, append=len(index))
    return MappedRuns(index[at], page[at], frame[at], order[at], count, pmd_mapped[at])


class CoverageCounter:
    """Sums of the coverage of mappings.

    Args:
        mappings: start and end of each, ascending; a page in none of them counts for the one below.
    """

    def __init__(self, mappings: Sequence[Segment], geometry: Geometry) -> None:
        self._geometry = geometry
        self._starts, self._ends = ptes.page_numbers(mappings, geometry.page_size).T
        self._pages = np.zeros((len(mappings), ORDERS), np.int64)
        self._unknown, self._out_of_reach = (np.zeros(len(mappings), np.int64) for _ in range(2))
        self._alignments = np.zeros((len(mappings), len(ALIGNMENTS), ORDERS), np.int64)

    def add(self, columns: PteColumns, chosen: NDArray[np.bool_]) -> None:
        """Count the pages that are `chosen`: bool, shape (pages,)."""
        page_size = self._geometry.page_size
        lengths = np.array([(end - start) // page_size for start, end in columns.segments], np.int64)
        first, some = np.cumsum(lengths) - lengths, lengths > 0
        owner = self._owner(np.array([start // page_size for start, _ in columns.segments], np.int64))[some]
        unknown = chosen & (columns.folio_order < 0)
        for sums, pages in ((self._pages[:, 0], chosen), (self._unknown, unknown)):
            if pages.any():
                np.add.at(sums, owner, np.add.reduceat(pages, first[some], dtype=np.int64))
        np.add.at(self._out_of_reach, owner, self._edges(columns, chosen)[some])
        runs = mapped_runs(columns, page_size, chosen)
        if not len(runs.index):
            return
        # A run lies in one segment, and so in one mapping.
        owner = self._owner(runs.page)
        for order in range(1, int(runs.order.max()) + 1):
            np.add.at(self._pages[:, order], owner, runs.usable(order, self._geometry))
        np.add.at(self._alignments, (owner, runs.alignment(), runs.order), runs.count)

    def _edges(self, columns: PteColumns, chosen: NDArray[np.bool_]) -> NDArray[np.int64]:
        """Return the `chosen` pages of each segment that lie outside of whole PMD ranges of its mapping."""
        n = self._geometry.ptes_per_pmd
        firsts, ends = ptes.page_numbers(columns.segments, self._geometry.page_size).T
        owner = self._owner(firsts)
        low = np.clip(-(-self._starts[owner] // n) * n, firsts, ends)
        high = np.clip(self._ends[owner] // n * n, low, ends)
        begin = np.cumsum(ends - firsts) - ends
        # Few pages lie there, so only these are read.
        edges = np.zeros(len(firsts), np.int64)
        for starts, counts in ((firsts, low - firsts), (high, ends - high)):
            segments = np.repeat(np.arange(len(counts)), counts)
            pages = ptes.spread(begin + starts, counts)
            edges += np.bincount(segments[chosen[pages]], minlength=len(edges))
        return edges

    def _owner(self, pages: NDArray[np.int64]) -> NDArray[np.intp]:
        return np.searchsorted(self._starts, pages, side="right") - 1

    def coverage(self, first: int, last: int) -> Coverage:
        """Return the coverage of the mappings from index `first` up to but not including `last`."""
        pages = self._pages[first:last].sum(axis=0).tolist()
        unknown, out_of_reach = (int(sums[first:last].sum()) for sums in (self._unknown, self._out_of_reach))
        return Coverage(tuple(pages), unknown, out_of_reach)

    def alignments(self, first: int, last: int) -> NDArray[np.int64]:
        """Return the pages of these mappings in large folios by `ALIGNMENTS` and order: int64, shape (4, ORDERS)."""
        alignments: NDArray[np.int64] = self._alignments[first:last].sum(axis=0)
        return alignments
