"""Read :class:`~mthp.ptes.PteColumns` of a live process: combine three sources for every page.

pagemap has whether and how a page is mapped. kpageflags has the kind of its frame: the folio order, the zero page,
freed lazily. PAGEMAP_SCAN has the rest: whether a PMD entry maps it.

The three are read one after the other while the process runs, so they may disagree about a page that changed in
between. Each is right about its moment, and no conclusion from two of them does harm if it is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mthp.geometry import Geometry
from mthp.linux import abi
from mthp.linux.kpageflags import FolioReader, states_of
from mthp.linux.pagemap import Pagemap, own_frame, states
from mthp.linux.procfs import read_pmd_mapped
from mthp.ptes import ORDER_NONE, ORDER_UNKNOWN, Pte, PteColumns, Segment, spread

_PFRAME_MASK = np.uint64(abi.PM_PFRAME_MASK)
_PRESENT = np.uint16(Pte.PRESENT)
_PMD_MAPPED = np.uint16(Pte.PMD_MAPPED)
_NOT_SHARED_NOR_FILE = np.uint16(0xFFFF & ~int(Pte.SHARED | Pte.FILE))

_Index = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class RangePieces:
    """The pieces of segments that lie in one PMD range each, as columns of int64, shape (pieces,).

    Attributes:
        page: page number (address / page size) of the first page.
        index: position of the first page among the pages of the segments.
        count: number of pages.
    """

    page: _Index
    index: _Index
    count: _Index

    def __len__(self) -> int:
        return len(self.page)

    def where(self, chosen: NDArray[np.bool_]) -> RangePieces:
        """Return the pieces that are `chosen`: bool, shape (pieces,)."""
        return RangePieces(self.page[chosen], self.index[chosen], self.count[chosen])

    def indices(self) -> _Index:
        """Return the positions of all their pages, one after another."""
        return spread(self.index, self.count)


def range_pieces(segments: Sequence[Segment], geometry: Geometry) -> RangePieces:
    """Cut `segments` at the borders of PMD ranges."""
    n = geometry.ptes_per_pmd
    # Divided before NumPy stores them, because [vsyscall] lies beyond the range of int64.
    size = geometry.page_size
    pages = np.array([(start // size, end // size) for start, end in segments], np.int64).reshape(-1, 2)
    starts, ends = pages[:, 0], pages[:, 1]
    sizes = ends - starts
    first = starts // n
    counts = np.where(sizes > 0, -(-ends // n) - first, 0)
    base = spread(first, counts) * n
    start_of = np.repeat(starts, counts)
    page = np.maximum(base, start_of)
    end = np.minimum(base + n, np.repeat(ends, counts))
    index = page - start_of + np.repeat(np.cumsum(sizes) - sizes, counts)
    return RangePieces(page, index, end - page)


class ColumnReader:
    """A reader of the page table entries of one process.

    Args:
        folios: reader of kpageflags, or None if these rights do not include it.
    """

    def __init__(self, pagemap: Pagemap, folios: FolioReader | None, geometry: Geometry) -> None:
        self._pagemap = pagemap
        self._folios = folios
        self._geometry = geometry
        self._believed = _believed(folios)

    def read(self, segments: Sequence[Segment]) -> PteColumns:
        """Return the page table entries of `segments`, one after another.

        The order of a zero page is that of its folio: 0, or the PMD order for the huge one.
        """
        words = self._pagemap.read(segments)
        state = states(words)
        present = (state & _PRESENT) != 0
        order = np.where(present, np.int8(ORDER_UNKNOWN), np.int8(ORDER_NONE))
        pfn = None
        if self._folios is None:
            # Without frames an order is known only where a PMD entry maps it, and lazily freed pages look like others.
            self._paint_scanned(segments, state, order)
        else:
            pfn = words
            # In place: the words are not needed any more, and a process has many pages.
            pfn &= _PFRAME_MASK
            if not present.all():
                pfn[~present] = 0
            self._paint_folios(self._folios, segments, pfn, state, order)
        if int(np.bitwise_or.reduce(state)) & Pte.ZERO:
            # pagemap shows the small zero page as not exclusive, and the huge one as of a file.
            state[(state & np.uint16(Pte.ZERO)) != 0] &= _NOT_SHARED_NOR_FILE
        return PteColumns(tuple(segments), state, order, pfn)

    def _paint_folios(
        self,
        folios: FolioReader,
        segments: Sequence[Segment],
        pfn: NDArray[np.uint64],
        state: NDArray[np.uint16],
        order: NDArray[np.int8],
    ) -> None:
        """Add to `state` and `order` the flags and orders in kpageflags of the frames `pfn`."""
        singly = (state & _PRESENT) != 0
        huge = self._pmd_mapped(folios, segments, pfn, state)
        if len(huge):
            # Only heads are read from kpageflags, so that huge memory costs almost nothing.
            heads = pfn[huge.index] - (huge.page % self._geometry.ptes_per_pmd).astype(np.uint64)
            flags = folios.words_at(heads)
            pages = huge.indices()
            state[pages] |= _PMD_MAPPED | np.repeat(states_of(flags & self._believed), huge.count)
            order[pages] = np.repeat(self._huge_orders(folios, heads, flags), huge.count)
            singly[pages] = False
        if singly.all():
            flags, order[:] = folios.read(pfn)
            state |= states_of(flags & self._believed)
        elif len(chosen := np.flatnonzero(singly)):
            flags, order[chosen] = folios.read(pfn[chosen])
            state[chosen] |= states_of(flags & self._believed)
        _share_whole_folios(pfn, state, order)

    def _pmd_mapped(
        self, folios: FolioReader, segments: Sequence[Segment], pfn: NDArray[np.uint64], state: NDArray[np.uint16]
    ) -> RangePieces:
        """Return the pieces that a PMD entry maps."""
        pieces = range_pieces(segments, self._geometry)
        n = self._geometry.ptes_per_pmd
        last = pieces.index + pieces.count - 1
        first_pfn, last_pfn = pfn[pieces.index].view(np.int64), pfn[last].view(np.int64)
        # Scanning everything would cost as much as reading pagemap again. So scan only the pieces whose first and last
        # page lie in the frames of one possible aligned folio of PMD order.
        likely = (state[pieces.index] & state[last] & _PRESENT) != 0
        likely &= (first_pfn - pieces.page) % n == 0
        likely &= last_pfn - first_pfn == pieces.count - 1
        pieces = pieces.where(likely)
        if not len(pieces):
            return pieces
        if not self._pagemap.can_scan:
            # Before Linux 6.7 only smaps shows PMD entries: how much of a mapping they map, but not where.
            return self._shown_by_smaps(folios, pieces, pfn)
        return pieces.where(self.are_huge(pieces))

    def _shown_by_smaps(self, folios: FolioReader, pieces: RangePieces, pfn: NDArray[np.uint64]) -> RangePieces:
        """Return those of `pieces` that a PMD entry maps, as far as smaps shows it: all must have suitable frames.

        They must lie in one folio of PMD order, and in a mapping in which PMD entries map something according to smaps.
        If such a mapping also has a folio of PMD order that PTEs map, that folio is returned too: no interface of these
        kernels distinguishes the two.
        """
        orders = folios.read(pfn[pieces.index])[1]
        huge = [(vma.start, vma.end) for vma, _ in read_pmd_mapped(self._pagemap.process)]
        return self._within(pieces.where(orders >= self._geometry.pmd_order), huge)

    def _within(self, pieces: RangePieces, parts: Sequence[Segment]) -> RangePieces:
        """Return those of `pieces` that begin within one of `parts`, which ascend."""
        size = self._geometry.page_size
        bounds = np.array([(start // size, end // size) for start, end in parts], np.int64).reshape(-1, 2)
        at = np.searchsorted(bounds[:, 0], pieces.page, side="right") - 1
        inside = at >= 0
        inside[inside] = pieces.page[inside] < bounds[at[inside], 1]
        return pieces.where(inside)

    def are_huge(self, pieces: RangePieces) -> NDArray[np.bool_]:
        """Return which of `pieces` a PMD entry maps, by PAGEMAP_SCAN: bool, shape (pieces,)."""
        regions = self._huge_regions(pieces)
        if not len(regions):
            return np.zeros(len(pieces), np.bool_)
        at = np.maximum(np.searchsorted(regions[:, 0], pieces.page, side="right") - 1, 0)
        huge: NDArray[np.bool_] = (regions[at, 0] <= pieces.page) & (pieces.page + pieces.count <= regions[at, 1])
        return huge

    def _huge_regions(self, pieces: RangePieces) -> _Index:
        """Return the runs that PMD entries map, within `pieces`: int64, shape (runs, 2), page numbers, ascending."""
        page_size = self._geometry.page_size
        order = np.argsort(pieces.page)
        starts, ends = pieces.page[order], (pieces.page + pieces.count)[order]
        breaks = np.flatnonzero(starts[1:] != ends[:-1]) + 1
        runs = zip(starts[np.r_[0, breaks]].tolist(), ends[np.r_[breaks - 1, len(ends) - 1]].tolist(), strict=True)
        wanted = abi.PAGE_IS_HUGE | abi.PAGE_IS_PRESENT
        found = [
            regions[:, :2].astype(np.int64) // page_size
            for start, end in runs
            for regions in self._pagemap.scan((start * page_size, end * page_size), all_of=wanted)
        ]
        return np.concatenate(found) if found else np.empty((0, 2), np.int64)

    def _huge_orders(
        self, folios: FolioReader, heads: NDArray[np.uint64], flags: NDArray[np.uint64]
    ) -> NDArray[np.int8]:
        """Return the orders of folios that PMD entries map: the PMD order, but those of hugetlbfs may be larger."""
        orders = np.full(len(heads), self._geometry.pmd_order, np.int8)
        head, order = 0, ORDER_UNKNOWN
        for at in np.flatnonzero(flags & np.uint64(abi.KPF_HUGE)).tolist():
            pfn = int(heads[at])
            if order < 0 or not head <= pfn < head + (1 << order):
                head, order = folios.folio_of(pfn)
            orders[at] = order
        return orders

    def _paint_scanned(self, segments: Sequence[Segment], state: NDArray[np.uint16], order: NDArray[np.int8]) -> None:
        """Add to `state` and `order` the results of PAGEMAP_SCAN, without frame numbers."""
        if not self._pagemap.can_scan:
            self._paint_wholly_huge(segments, state, order)
            return
        page_size = self._geometry.page_size
        offset = 0
        for segment in segments:
            for regions in self._pagemap.scan(segment, any_of=abi.PAGE_IS_PFNZERO | abi.PAGE_IS_HUGE):
                bounds = (regions[:, :2].astype(np.int64) - segment[0]) // page_size + offset
                counts = bounds[:, 1] - bounds[:, 0]
                pages = spread(bounds[:, 0], counts)
                categories = np.repeat(regions[:, 2], counts)
                # The scan is later than the read of pagemap: a page that has come in between keeps its word as absent.
                still = (state[pages] & _PRESENT) != 0
                zero = pages[still & ((categories & np.uint64(abi.PAGE_IS_PFNZERO)) != 0)]
                state[zero] |= np.uint16(Pte.ZERO)
                order[zero] = 0
                huge = pages[still & ((categories & np.uint64(abi.PAGE_IS_HUGE)) != 0)]
                state[huge] |= _PMD_MAPPED
                order[huge] = self._geometry.pmd_order
            offset += (segment[1] - segment[0]) // page_size

    def _paint_wholly_huge(
        self, segments: Sequence[Segment], state: NDArray[np.uint16], order: NDArray[np.int8]
    ) -> None:
        """Add the results of smaps alone: the mappings in which PMD entries map every PMD range."""
        found = read_pmd_mapped(self._pagemap.process)
        ranges = [(vma.pmd_ranges(self._geometry), mapped) for vma, mapped in found]
        whole = [(start, end) for (start, end), mapped in ranges if mapped == end - start]
        pages = self._within(range_pieces(segments, self._geometry), whole).indices()
        pages = pages[(state[pages] & _PRESENT) != 0]
        state[pages] |= _PMD_MAPPED
        order[pages] = self._geometry.pmd_order


def _believed(folios: FolioReader | None, own: Callable[[], int] = own_frame) -> np.uint64:
    """Return a mask of the flags of kpageflags that are valid on this kernel."""
    # Linux 6.12 to 7.0, except some of their stable releases, show KPF_KSM for every anonymous page (stable_page_flags,
    # fs/proc/page.c): then it is set on a page of this process, too, which cannot have been merged.
    frame = own() if folios else 0
    lies = folios is not None and frame and int(folios.words_at(np.array([frame], np.uint64))[0]) & abi.KPF_KSM
    return np.uint64(0xFFFFFFFFFFFFFFFF & ~abi.KPF_KSM if lies else 0xFFFFFFFFFFFFFFFF)


def _share_whole_folios(pfn: NDArray[np.uint64], state: NDArray[np.uint16], order: NDArray[np.int8]) -> None:
    """Mark every page of an anonymous large folio shared if one is, as khugepaged does (folio_maybe_mapped_shared)."""
    if not (int(np.bitwise_or.reduce(state)) & Pte.SHARED and len(order) and order.max() > 0):
        return
    large = (order > 0) & ((state & np.uint16(Pte.FILE | Pte.PMD_MAPPED)) == 0)
    shared = large & ((state & np.uint16(Pte.SHARED)) != 0)
    if not shared.any():
        return
    pages = np.flatnonzero(large)
    shifts = order[pages].astype(np.uint64)
    # pagemap shows each page by itself, and another process may map only some of the pages of a folio.
    heads = pfn[pages] >> shifts << shifts
    state[pages[np.isin(heads, np.unique(heads[shared[pages]]))]] |= np.uint16(Pte.SHARED)
