"""The census that `mthp inspect` prints: the pages of an address space by folio order, per mapping and in all.

Page table entries are read in blocks and reduced at once to runs of equal entries, then to counts per mapping, so that
memory use depends on the number of mappings alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from mthp import abilities
from mthp.addrspace import AddressSpace
from mthp.eligibility import Eligibility, eligibility
from mthp.geometry import Geometry
from mthp.measuring import PORTION_PAGES
from mthp.metrics import ALIGNMENTS, MAX_FOLIO_ORDER, ORDERS, Coverage, CoverageCounter, anonymous_pages, resident_pages
from mthp.progress import Progress, ReadProgress
from mthp.ptes import ORDER_UNKNOWN, Pte, PteColumns, Segment, in_portions, in_range_portions
from mthp.tabular import Tabular
from mthp.tunables import Switches
from mthp.vma import Vma, VmaKind

CONTENTS_PAGES = 1 << 14
"""Pages of contents to read between two reports of progress."""

STATES = {
    "zero": Pte.ZERO,
    "swap": Pte.SWAP,
    "shared": Pte.SHARED,
    "lazyfree": Pte.LAZYFREE,
    "uffd_wp": Pte.UFFD_WP,
    "guard": Pte.GUARD,
    "pmd_mapped": Pte.PMD_MAPPED,
}
"""States that are counted, by their name in the output."""


@dataclass(frozen=True, slots=True)
class PageCounts:
    """Counts of pages by kind.

    Attributes:
        orders: int64, shape (MAX_FOLIO_ORDER + 1,): pages with contents, by the order of their folio.
        unknown: pages with contents in a folio of unknown order.
        coverage: the pages with contents that lie in folios of each size as the hardware uses them.
        alignments: int64, shape (len(ALIGNMENTS), ORDERS): pages of large folios by how the folio is mapped, and order.
        states: int64, shape (len(STATES),): pages by state, in the order of ``STATES``.
        zero_filled: int64, shape (MAX_FOLIO_ORDER + 2,): pages with contents that contain only zeroes, by the order
            of their folio, the unknown order last; None if contents were not read.
    """

    JSON: ClassVar = (
        "resident_bytes pages_by_order=by_order pages_of_unknown_order=unknown pages_by_alignment pages_by_state"
        " zero_filled_pages_by_order huge_coverage large_coverage out_of_reach_bytes"
    )

    orders: NDArray[np.int64]
    unknown: int
    coverage: Coverage
    alignments: NDArray[np.int64]
    states: NDArray[np.int64]
    zero_filled: NDArray[np.int64] | None = None

    @property
    def resident(self) -> int:
        """Pages with contents; zero pages and swapped ones do not count."""
        return int(self.orders.sum()) + self.unknown

    def state(self, name: str) -> int:
        """Return the pages in the state called `name` in ``STATES``."""
        return int(self.states[list(STATES).index(name)])

    def by_order(self) -> dict[int, int]:
        """Return the pages by folio order, without the orders that have none."""
        return {order: int(pages) for order, pages in enumerate(self.orders) if pages}

    def mapped_as(self, alignment: int, order: int) -> int:
        """Return the pages of folios of `order` that are mapped as `alignment`, an index into ``ALIGNMENTS``."""
        return int(self.alignments[alignment, order])

    def resident_bytes(self, geometry: Geometry) -> int:
        """Return the bytes of `resident`."""
        return self.resident * geometry.page_size

    @property
    def pmd_mapped(self) -> int:
        """Pages that PMD entries map."""
        return self.state("pmd_mapped")

    @property
    def pages_by_state(self) -> dict[str, int]:
        """`states` by name."""
        return dict(zip(STATES, self.states.tolist(), strict=True))

    @property
    def pages_by_alignment(self) -> dict[int, dict[str, int]]:
        """Pages of large folios by order, and by how the folio is mapped."""
        return {
            order: {name: self.mapped_as(index, order) for index, name in enumerate(ALIGNMENTS)}
            for order in self.by_order()
            if order
        }

    @property
    def zero_filled_pages_by_order(self) -> dict[str, int] | None:
        """`zero_filled` by the name of the order; ``unknown`` for the unknown order."""
        if self.zero_filled is None:
            return None
        names = [*map(str, range(MAX_FOLIO_ORDER + 1)), "unknown"]
        return {name: pages for name, pages in zip(names, self.zero_filled.tolist(), strict=True) if pages}

    def huge_coverage(self, geometry: Geometry) -> float:
        """Return the share of the pages with contents that PMD entries map."""
        return self.coverage.share(geometry.pmd_order)

    @property
    def large_coverage(self) -> float:
        """The share of the pages with contents in folios of order 1 or larger, as the hardware uses them."""
        return self.coverage.share(1)

    def out_of_reach_bytes(self, geometry: Geometry) -> int:
        """Return the bytes outside of whole PMD ranges of their mapping (:class:`~mthp.metrics.Coverage`)."""
        return self.coverage.out_of_reach_bytes(geometry)

    @classmethod
    def total(cls, counts: Sequence[PageCounts]) -> PageCounts:
        """Return the sum of `counts`."""
        orders = sum((count.orders for count in counts), np.zeros(ORDERS, np.int64))
        alignments = sum((count.alignments for count in counts), np.zeros((len(ALIGNMENTS), ORDERS), np.int64))
        coverage = Coverage.total([count.coverage for count in counts])
        states = sum((count.states for count in counts), np.zeros(len(STATES), np.int64))
        looked = [count.zero_filled for count in counts if count.zero_filled is not None]
        zero_filled = sum(looked, np.zeros(MAX_FOLIO_ORDER + 2, np.int64)) if looked else None
        return cls(orders, sum(count.unknown for count in counts), coverage, alignments, states, zero_filled)


@dataclass(frozen=True, slots=True)
class VmaCensus:
    """One mapping and its pages.

    Attributes:
        vma: the mapping.
        pages: its pages.
        anonymous: those of them that are anonymous memory (:func:`mthp.metrics.anonymous_pages`).
        khugepaged: the orders to which the kernel's khugepaged may collapse it, with the present switches.
        madvise: the orders to which a collapse on request may collapse it.
    """

    JSON: ClassVar = "*vma khugepaged madvise *pages"

    vma: Vma
    pages: PageCounts
    anonymous: PageCounts
    khugepaged: Eligibility
    madvise: Eligibility


@dataclass(frozen=True, slots=True)
class Census(Tabular):
    """The counted pages of an address space.

    Attributes:
        label: name of the target.
        kernel: release of the kernel.
        geometry: geometry of the machine.
        switches: switches of the machine at the time.
        thp_disabled: the process switched THP off for itself.
        missing: what could not be read, and what would make it readable.
        vmas: every mapping, by address.
    """

    ROWS: ClassVar = "vmas"
    JSON: ClassVar = "target=label kernel geometry switches thp_disabled missing total anonymous vmas"

    label: str
    kernel: str
    geometry: Geometry
    switches: Switches
    thp_disabled: bool
    missing: tuple[str, ...]
    vmas: tuple[VmaCensus, ...]

    @property
    def total(self) -> PageCounts:
        """All pages."""
        return PageCounts.total([vma.pages for vma in self.vmas])

    @property
    def anonymous(self) -> PageCounts:
        """The anonymous pages, which coverage is of."""
        return PageCounts.total([vma.anonymous for vma in self.vmas])


def take_census(
    space: AddressSpace,
    progress: Progress | None = None,
    *,
    nodes: bool = False,
    zero_filled: bool = False,
    portion_pages: int = PORTION_PAGES,
) -> Census:
    """Count the pages of `space`.

    Args:
        nodes: also read on which NUMA nodes the pages of each mapping lie.
        zero_filled: also read the contents of anonymous mappings, and count the pages that contain only zeroes.
        portion_pages: most entries to read at a time, in whole PMD ranges.

    Raises:
        TargetVanishedError: the process exited in the meantime.
        UnsupportedError: `zero_filled` of an address space without contents.
    """
    if zero_filled:
        abilities.zero_filled(space, space.read([]))  # Fails at once for an address space without contents.
    vmas, totals = _listed_and_counted(space, nodes, portion_pages, progress)
    if zero_filled:
        for index, zeroes in _zero_filled(space, vmas, progress).items():
            totals[index] = tuple(replace(pages, zero_filled=zeroes) for pages in totals[index])
    geometry, switches, disabled = space.geometry, space.switches, space.thp_disabled
    allowed = partial(eligibility, geometry=geometry, switches=switches, thp_disabled=disabled)
    counted = tuple(
        VmaCensus(
            vma,
            pages,
            anonymous,
            khugepaged=allowed(vma, trigger="khugepaged"),
            madvise=allowed(vma, trigger="madvise", include_file=True),
        )
        for vma, (pages, anonymous) in zip(vmas, totals, strict=True)
    )
    return Census(space.label, space.kernel, geometry, switches, disabled, space.missing, counted)


def _listed_and_counted(
    space: AddressSpace, nodes: bool, portion_pages: int, progress: Progress | None
) -> tuple[Sequence[Vma], list[tuple[PageCounts, ...]]]:
    """Return the mappings, and of each the counts of all pages and of the anonymous ones."""
    # For the details of a mapping the kernel walks over all its pages, and this process only waits for that. So another
    # thread reads them, while this one reads the pages themselves.
    with ThreadPoolExecutor(1) as pool:
        listing = pool.submit(lambda: abilities.with_nodes(space, space.vmas()) if nodes else space.vmas())
        mapped = space.mapped()
        counts = _Counts(mapped, space.geometry)
        segments = space.populated(mapped, space.geometry.page_size)
        reading = ReadProgress(progress, segments)
        for portion in in_range_portions(segments, space.geometry, portion_pages * space.geometry.page_size):
            counts.add(space.read(portion))
            reading.has_read(portion)
        vmas = listing.result()
    return vmas, counts.of(vmas)


def _zero_filled(space: AddressSpace, vmas: Sequence[Vma], progress: Progress | None) -> dict[int, NDArray[np.int64]]:
    """Return :attr:`PageCounts.zero_filled` of each anonymous mapping of `vmas`, by its index."""
    page_size, found = space.geometry.page_size, {}
    # Contents of files are not the process's own, and zeroes in them cannot be given back.
    anonymous = [(index, vma) for index, vma in enumerate(vmas) if vma.kind is VmaKind.ANON]
    populated = {index: space.populated([(vma.start, vma.end)], page_size) for index, vma in anonymous}
    reading = ReadProgress(progress, chain.from_iterable(populated.values()))
    for index, segments in populated.items():
        found[index] = np.zeros(MAX_FOLIO_ORDER + 2, np.int64)
        for portion in in_portions(segments, CONTENTS_PAGES * page_size):
            columns = space.read(portion)
            order = columns.folio_order[resident_pages(columns) & abilities.zero_filled(space, columns)]
            column = np.where(order == ORDER_UNKNOWN, MAX_FOLIO_ORDER + 1, np.clip(order, 0, MAX_FOLIO_ORDER))
            found[index] += np.bincount(column, minlength=MAX_FOLIO_ORDER + 2)
            reading.has_read(portion)
    return found


class _Counts:
    """Sums of columns by mapping: of all pages, and of the anonymous ones."""

    def __init__(self, mapped: Sequence[Segment], geometry: Geometry) -> None:
        self._page_size = geometry.page_size
        self._starts = np.array([start for start, _ in mapped], np.uint64)
        self._every = _Sums(CoverageCounter(mapped, geometry), len(mapped), resident_pages)
        self._anonymous = _Sums(CoverageCounter(mapped, geometry), len(mapped), anonymous_pages, but=Pte.FILE)

    def add(self, columns: PteColumns) -> None:
        """Count the pages of `columns`; each of its segments must lie within one mapping."""
        if not len(columns.state):
            return
        first, pages = runs_of_equal(columns, self._page_size)
        lengths = [(end - start) // self._page_size for start, end in columns.segments]
        segment = np.searchsorted(np.cumsum(lengths), first, side="right")
        starts = np.array([start for start, _ in columns.segments], np.uint64)
        vma = (np.searchsorted(self._starts, starts, side="right") - 1)[segment]
        for sums in (self._every, self._anonymous):
            sums.add(columns, first, pages, vma)

    def of(self, vmas: Sequence[Vma]) -> list[tuple[PageCounts, ...]]:
        """Return the counts of each of `vmas`: those of the mappings that began within it when they were read.

        Memory that the kernel or a driver mapped is not the process's, and does not count.
        """
        first = np.searchsorted(self._starts, np.array([vma.start for vma in vmas], np.uint64))
        ends = [vma.start if vma.kind is VmaKind.SPECIAL else vma.end for vma in vmas]
        last = np.searchsorted(self._starts, np.array(ends, np.uint64))
        # Not all backends know which pages of shared memory belong to a file.
        own = np.where([vma.kind in (VmaKind.ANON, VmaKind.FILE) for vma in vmas], last, first)
        return [
            (self._every.of(a, b), self._anonymous.of(a, c))
            for a, b, c in zip(first.tolist(), last.tolist(), own.tolist(), strict=True)
        ]


class _Sums:
    """The counts of some of the pages, by mapping.

    Args:
        coverage: counter of the coverage of the same mappings.
        mappings: number of mappings.
        choose: returns which entries map a page that counts: bool, shape (pages,).
        but: entries with one of these bits count for no state.
    """

    def __init__(
        self,
        coverage: CoverageCounter,
        mappings: int,
        choose: Callable[[PteColumns], NDArray[np.bool_]],
        but: int = 0,
    ) -> None:
        self._coverage = coverage
        self._choose = choose
        self._but = np.uint16(but)
        self._orders = np.zeros((mappings, ORDERS), np.int64)
        self._unknown = np.zeros(mappings, np.int64)
        self._states = np.zeros((mappings, len(STATES)), np.int64)

    def add(
        self, columns: PteColumns, first: NDArray[np.intp], pages: NDArray[np.int64], vma: NDArray[np.intp]
    ) -> None:
        """Count the chosen pages of `columns`.

        Args:
            first, pages: runs of equal entries, as :func:`runs_of_equal` returns them.
            vma: index of each run's mapping.
        """
        chosen = self._choose(columns)
        self._coverage.add(columns, chosen)
        state, order, counted = columns.state[first], columns.folio_order[first], chosen[first]
        state = np.where(state & self._but, np.uint16(0), state)
        known = counted & (order != ORDER_UNKNOWN)
        np.add.at(self._orders, (vma[known], np.clip(order[known], 0, MAX_FOLIO_ORDER)), pages[known])
        np.add.at(self._unknown, vma[counted & ~known], pages[counted & ~known])
        for index, bit in enumerate(STATES.values()):
            having = (state & np.uint16(bit)) != 0
            np.add.at(self._states[:, index], vma[having], pages[having])

    def of(self, first: int, last: int) -> PageCounts:
        """Return the counts of the mappings from index `first` up to but not including `last`."""
        return PageCounts(
            self._orders[first:last].sum(axis=0),
            int(self._unknown[first:last].sum()),
            self._coverage.coverage(first, last),
            self._coverage.alignments(first, last),
            self._states[first:last].sum(axis=0),
        )


def runs_of_equal(columns: PteColumns, page_size: int) -> tuple[NDArray[np.intp], NDArray[np.int64]]:
    """Return the runs of equal state and folio order in `columns`, which do not cross a segment's end.

    Returns:
        For every run the index of its first page (intp) and its number of pages (int64).
    """
    state, order = columns.state, columns.folio_order
    differs = np.empty(len(state), np.bool_)
    differs[:1] = True
    np.not_equal(state[1:], state[:-1], out=differs[1:])
    differs[1:] |= order[1:] != order[:-1]
    ends = np.cumsum([(end - start) // page_size for start, end in columns.segments])
    differs[ends[:-1]] = True
    first = np.flatnonzero(differs)
    return first, np.diff(first, append=len(state))
