"""Page table entries of segments of an address space, as columns, and the positions of blocks in them."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from mthp.geometry import Geometry
from mthp.tabular import Tabular

Segment = tuple[int, int]
"""A half-open, page-aligned range of addresses: (start, end)."""

Block = tuple[int, int]
"""An aligned run of memory: its address, and the order of the folio that it will become."""

LARGEST_ADDRESS = 1 << 63
"""Addresses from here on exceed an int64; of user space, only [vsyscall] lies there."""

ORDER_NONE = -1
"""In `PteColumns.folio_order`: no folio is mapped here."""

ORDER_UNKNOWN = -2
"""In `PteColumns.folio_order`: a folio is mapped, but the rights do not suffice to read its order."""


class Pte(enum.IntFlag):
    """Bits of `PteColumns.state`, a uint16 per PTE. A none PTE is 0."""

    PRESENT = 1 << 0
    """Maps a page, the zero page included."""
    ZERO = 1 << 1
    """Maps the shared zero page."""
    SWAP = 1 << 2
    """Not present and not none: a swap entry, or a marker that the kernel counts as one."""
    SHARED = 1 << 3
    """The folio is also mapped by another process, or more than once."""
    LAZYFREE = 1 << 4
    """Freed with MADV_FREE, and clean."""
    UFFD_WP = 1 << 5
    """Write-protected by userfaultfd, as a page, a swap entry or a marker."""
    FILE = 1 << 6
    """Maps a page of a file or of shared memory."""
    PMD_MAPPED = 1 << 7
    """Mapped by a PMD entry, not by a PTE of its own."""
    UNREFERENCED = 1 << 8
    """Known not to have been used recently. The bit is clear if the kernel does not say."""
    GUARD = 1 << 9
    """A guard marker (MADV_GUARD_INSTALL); SWAP is set with it."""
    HUGETLB = 1 << 10
    """Part of a hugetlbfs page, which collapse leaves alone."""


@dataclass(frozen=True, slots=True)
class PteColumns:
    """Page table entries of some segments, one after another, as columns.

    Attributes:
        segments: the segments that were read, in order.
        state: uint16, shape (pages,): bits of :class:`Pte`.
        folio_order: int8, shape (pages,): order of the folio that the page lies in (0 for a base page),
            ``ORDER_NONE`` or ``ORDER_UNKNOWN``.
        pfn: uint64, shape (pages,): page frame numbers, 0 where not present; None if not readable.
    """

    segments: tuple[Segment, ...]
    state: NDArray[np.uint16]
    folio_order: NDArray[np.int8]
    pfn: NDArray[np.uint64] | None = None

    def has(self, bits: Pte) -> NDArray[np.bool_]:
        """Return which entries have at least one of `bits`: bool, shape (pages,)."""
        chosen: NDArray[np.bool_] = (self.state & np.uint16(bits)) != 0
        return chosen

    def first_pages(self, firsts: NDArray[np.int64], lasts: NDArray[np.int64], page_size: int) -> NDArray[np.int64]:
        """Return the index in the columns at which each block begins; -1 if no segment contains the whole block.

        Args:
            firsts, lasts: page numbers of the blocks' half-open ranges (:func:`page_numbers`): int64, shape (blocks,).

        Returns:
            int64, shape (blocks,).
        """
        if not self.segments:
            return np.full(len(firsts), -1, np.int64)
        segments = page_numbers(self.segments, page_size)
        sizes = segments[:, 1] - segments[:, 0]
        offsets = np.cumsum(sizes) - sizes
        order = np.argsort(segments[:, 0])
        at = order[np.maximum(np.searchsorted(segments[order, 0], firsts, side="right") - 1, 0)]
        inside = (segments[at, 0] <= firsts) & (lasts <= segments[at, 1])
        return np.where(inside, offsets[at] + firsts - segments[at, 0], -1)

    def select(self, segments: Sequence[Segment], page_size: int) -> PteColumns:
        """Return the entries of `segments`, each of which must lie in one of the present segments."""
        firsts, lasts = page_numbers(segments, page_size).T
        pages = spread(self.first_pages(firsts, lasts, page_size), lasts - firsts)
        pfn = None if self.pfn is None else self.pfn[pages]
        return PteColumns(tuple(segments), self.state[pages], self.folio_order[pages], pfn)


def bytes_in(segments: Iterable[Segment]) -> int:
    """Return the size of all `segments` together."""
    return sum(end - start for start, end in segments)


def page_numbers(segments: Sequence[Segment], page_size: int) -> NDArray[np.int64]:
    """Return the first page of each segment, and the one behind its last: int64, shape (segments, 2).

    Page numbers fit int64, unlike the addresses of [vsyscall].
    """
    return (np.array(segments, np.uint64).reshape(-1, 2) // np.uint64(page_size)).astype(np.int64)


def spread(starts: NDArray[np.int64], counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the integers of the ranges (start, start + count), one range after another: int64, shape (total,)."""
    total = int(counts.sum())
    return np.repeat(starts - (np.cumsum(counts) - counts), counts) + np.arange(total)


def segments_of(blocks: Sequence[Block], page_size: int) -> list[Segment]:
    """Return the segments of disjoint `blocks`, by ascending address; neighbours are joined."""
    if not blocks:
        return []
    addresses, orders = np.array(sorted(blocks), np.uint64).T
    ends = addresses + (np.uint64(page_size) << orders)
    breaks = np.flatnonzero(addresses[1:] != ends[:-1]) + 1
    firsts, lasts = np.r_[0, breaks], np.r_[breaks - 1, len(ends) - 1]
    return list(zip(addresses[firsts].tolist(), ends[lasts].tolist(), strict=True))


def at_pmd_ranges(segments: Iterable[Segment], geometry: Geometry) -> Iterator[Segment]:
    """Yield `segments`, cut at the end of a PMD range if they begin inside it.

    :func:`in_portions` cuts at multiples of its size from a segment's start, so it cuts these at PMD ranges only.
    """
    for start, end in segments:
        aligned = -(-start // geometry.pmd_size) * geometry.pmd_size
        if start < aligned < end:
            yield start, aligned
            start = aligned
        yield start, end


def in_range_portions(segments: Iterable[Segment], geometry: Geometry, portion_size: int) -> Iterator[list[Segment]]:
    """Group as :func:`in_portions`, but keep each PMD range in one group, which may exceed the size by that much."""
    portion: list[Segment] = []
    room = portion_size
    for [segment] in (
        group for piece in at_pmd_ranges(segments, geometry) for group in in_portions([piece], portion_size)
    ):
        start, end = segment
        if portion and end - start > room and start // geometry.pmd_size != (portion[-1][1] - 1) // geometry.pmd_size:
            yield portion
            portion, room = [], portion_size
        portion.append(segment)
        room -= end - start
    if portion:
        yield portion


def in_portions(segments: Iterable[Segment], portion_size: int) -> Iterator[list[Segment]]:
    """Group and cut `segments` so that each group has at most `portion_size` bytes.

    Cuts fall on multiples of `portion_size` from a segment's start, so segments of whole PMD ranges are cut at PMD
    ranges if that size is a multiple of the PMD size.
    """
    portion: list[Segment] = []
    room = portion_size
    for start, end in segments:
        while start < end:
            if portion and end - start > room:
                yield portion
                portion, room = [], portion_size
            stop = min(end, start + room)
            portion.append((start, stop))
            room -= stop - start
            start = stop
    if portion:
        yield portion


def union(segments: Iterable[Segment]) -> tuple[Segment, ...]:
    """Return the union of `segments`, ascending, with neighbours joined."""
    joined: list[Segment] = []
    for start, end in sorted(segments):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(joined[-1][1], end))
        else:
            joined.append((start, end))
    return tuple(joined)


def without(segments: Iterable[Segment], removed: Iterable[Segment]) -> Iterator[Segment]:
    """Yield the parts of `segments` outside of `removed`. Both ascend, and their segments do not overlap."""
    holes = iter(removed)
    hole = next(holes, None)
    for begin, end in segments:
        start = begin
        while hole is not None and hole[0] < end:
            if start < hole[0]:
                yield start, hole[0]
            start = max(start, min(hole[1], end))
            if hole[1] > end:
                break
            hole = next(holes, None)
        if start < end:
            yield start, end


@dataclass(frozen=True)
class ColumnTable(Tabular):
    """Base of dataclasses that are tables. All fields are arrays of the shape (rows,)."""

    DTYPES: ClassVar[tuple[type[np.generic], ...]]
    """The dtype of each column, in the order of the fields."""

    def __len__(self) -> int:
        return len(getattr(self, fields(self)[0].name))

    def __getitem__(self, chosen: slice | NDArray[np.bool_] | NDArray[np.intp]) -> Self:
        """Return the chosen rows."""
        return type(self)(*(column[chosen] for column in self._columns()))

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """Return all rows of `parts`, one part after another; a single part is not copied."""
        if len(parts) == 1:
            return parts[0]
        if not parts:
            return cls(*(np.empty(0, dtype) for dtype in cls.DTYPES))
        return cls(*(np.concatenate(columns) for columns in zip(*(part._columns() for part in parts), strict=True)))

    def table_columns(self) -> dict[str, NDArray[np.generic]]:
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def _columns(self) -> list[NDArray[np.generic]]:
        return [getattr(self, f.name) for f in fields(self)]
