"""Read a live process repeatedly, for little more than the cost of its pagemap.

Of the two files with the state of a page, pagemap costs 7 ns a page and kpageflags 30 or more. But an untouched page
keeps its word in pagemap: the same frame, the same bits. So only pagemap is read every time, its words are summed up
for each PMD range, and all else is read only for the ranges with a changed sum. Two changes that leave the words
unchanged are seen within :data:`ROUNDS` reads: a folio split in place, and memory marked as lazily free.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from mthp.abilities import READ_PORTION
from mthp.geometry import Geometry
from mthp.linux.pagecolumns import ColumnReader, RangePieces, range_pieces
from mthp.linux.pagemap import Pagemap
from mthp.ptes import Pte, PteColumns, Segment, in_range_portions

ROUNDS = 16
"""Reads of the process within which every range is read fully at least once."""

_Sums = NDArray[np.uint64]
_Numbers = NDArray[np.int64]


class LiveWatch:
    """The :class:`~mthp.abilities.Watch` of a process with visible page frames."""

    def __init__(self, pagemap: Pagemap, columns: ColumnReader, geometry: Geometry) -> None:
        self._pagemap = pagemap
        self._columns = columns
        self._geometry = geometry
        n = geometry.ptes_per_pmd
        # A random number for each place in the range, so that words that trade places change the sum; odd, so that no
        # bit of a word is lost in the product.
        factors = np.random.default_rng().integers(0, 1 << 63, n, np.uint64) << np.uint64(1) | np.uint64(1)
        # As long as a portion and a range, so that the factors from any place on are a slice.
        self._factors = np.tile(factors, READ_PORTION // geometry.pmd_size + 2)
        self._round = 0
        self._seen = _Seen.nothing()

    def look(self, segments: Sequence[Segment]) -> Iterator[PteColumns]:
        """Yield entries as :meth:`mthp.abilities.Watch.look` does."""
        seen: list[_Seen] = []
        for portion in in_range_portions(segments, self._geometry, READ_PORTION):
            now = self._sums(portion)
            changed = self._changed(now)
            if changed.any():
                columns = self._columns.read(self._parts(now.ranges[changed], portion))
                now = now.with_huge(now.ranges[changed], self._huge_ranges(columns))
                yield columns
            seen.append(now)
        self._seen = _Seen.joined(seen)
        self._round += 1

    def _sums(self, portion: Sequence[Segment]) -> _Seen:
        """Return the PMD ranges of `portion`, each with the sum of its words, and huge if it was so before."""
        words = self._pagemap.read(portion)
        pieces = range_pieces(portion, self._geometry)
        n = self._geometry.ptes_per_pmd
        at = 0
        for start, end in portion:
            first, count = start // self._geometry.page_size % n, (end - start) // self._geometry.page_size
            # A word of none is 0 with any factor.
            words[at : at + count] *= self._factors[first : first + count]
            at += count
        numbers = pieces.page // n
        begins = np.flatnonzero(np.diff(numbers, prepend=-1))
        if not len(begins):
            return _Seen.nothing()
        # Unmapping a piece without pages changes a range too.
        sums = np.add.reduceat(words, pieces.index[begins]) + np.add.reduceat(pieces.count, begins).astype(np.uint64)
        ranges = numbers[begins]
        return _Seen(ranges, sums, self._seen.huge_at(ranges))

    def _changed(self, now: _Seen) -> NDArray[np.bool_]:
        """Return which ranges have another sum than the last time, were split since then, or have their turn."""
        changed = ~self._seen.same(now)
        # Words do not show folios split in place, or lazily freed pages: read a part of the ranges in any case.
        changed |= (now.ranges + self._round) % ROUNDS == 0
        # Words do not show a split PMD entry either. A scan of ranges that PMD entries map costs next to nothing.
        unsure = np.flatnonzero(now.huge & ~changed)
        if len(unsure):
            ranges, n = now.ranges[unsure], self._geometry.ptes_per_pmd
            pieces = RangePieces(ranges * n, np.zeros_like(ranges), np.full_like(ranges, n))
            changed[unsure] = ~self._columns.are_huge(pieces)
        return changed

    def _parts(self, ranges: _Numbers, portion: Sequence[Segment]) -> list[Segment]:
        """Return the parts of `portion` that lie in `ranges`."""
        size = self._geometry.pmd_size
        breaks = np.flatnonzero(np.diff(ranges) != 1) + 1
        firsts, lasts = ranges[np.r_[0, breaks]], ranges[np.r_[breaks - 1, len(ranges) - 1]] + 1
        starts = np.array([start // size for start, _ in portion], np.int64)
        parts: list[Segment] = []
        for first, last in zip(firsts.tolist(), lasts.tolist(), strict=True):
            begin = max(0, int(np.searchsorted(starts, first)) - 1)
            for start, end in portion[begin:]:
                if start >= last * size:
                    break
                if end > first * size:
                    parts.append((max(start, first * size), min(end, last * size)))
        return parts

    def _huge_ranges(self, columns: PteColumns) -> _Numbers:
        """Return the numbers of the ranges of `columns` that one PMD entry maps whole."""
        pieces = range_pieces(columns.segments, self._geometry)
        huge = (columns.state[pieces.index] & np.uint16(Pte.PMD_MAPPED)) != 0
        huge &= pieces.count == self._geometry.ptes_per_pmd
        numbers: _Numbers = pieces.page[huge] // self._geometry.ptes_per_pmd
        return numbers


class _Seen:
    """The state of some PMD ranges at the last read, by ascending number.

    Args:
        ranges: int64, shape (ranges,): their numbers.
        sums: uint64, the same shape.
        huge: whether a PMD entry maps the range: bool, the same shape.
    """

    def __init__(self, ranges: _Numbers, sums: _Sums, huge: NDArray[np.bool_]) -> None:
        self.ranges = ranges
        self.sums = sums
        self.huge = huge

    @classmethod
    def nothing(cls) -> _Seen:
        return cls(np.empty(0, np.int64), np.empty(0, np.uint64), np.empty(0, np.bool_))

    @classmethod
    def joined(cls, parts: Sequence[_Seen]) -> _Seen:
        if not parts:
            return cls.nothing()
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in ("ranges", "sums", "huge")))

    def _at(self, ranges: _Numbers) -> tuple[_Numbers, NDArray[np.bool_]]:
        """Return the position of each of `ranges` here, and whether it is present."""
        at = np.minimum(np.searchsorted(self.ranges, ranges), max(0, len(self.ranges) - 1))
        return at, self.ranges[at] == ranges if len(self.ranges) else np.zeros(len(ranges), np.bool_)

    def same(self, now: _Seen) -> NDArray[np.bool_]:
        """Return which of `now` have the same sum here: bool, shape (ranges of now,)."""
        at, there = self._at(now.ranges)
        if len(self.ranges):
            there = there & (self.sums[at] == now.sums)
        return there

    def huge_at(self, ranges: _Numbers) -> NDArray[np.bool_]:
        """Return which of `ranges` were huge: bool, shape (ranges,)."""
        at, there = self._at(ranges)
        return there & self.huge[at] if len(self.ranges) else there

    def with_huge(self, scanned: _Numbers, huge: _Numbers) -> _Seen:
        """Return the same with new knowledge: of the ranges `scanned`, those in `huge` are huge, others are not."""
        known = np.isin(self.ranges, scanned)
        return _Seen(self.ranges, self.sums, np.where(known, np.isin(self.ranges, huge), self.huge))
