"""A live process looked at again and again, for little more than reading its pagemap.

Of the two files that say what a page is, pagemap costs 7 ns a page and kpageflags 30 or more. But a page that nobody
touched since the last look has the same word in pagemap: the same frame, the same bits. So only pagemap is read every
time, its words are summed up for each PMD range, and all else is read only of the ranges whose sum is another one now.
A sum is over products with random odd numbers, one for each place in the range: that two contents have the same is
as likely as to guess a 64-bit number.

Three things change without a word of pagemap changing. A PMD entry may be replaced by PTEs of the same folio: the
ranges that PMD entries map are asked about with PAGEMAP_SCAN every time, which for them costs next to nothing. A large
folio may be split in place, and memory may be marked as lazily free: for these, one of every :data:`ROUNDS` ranges is
read anew at each look, so they are seen, only later.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from mthp.abilities import READ_BLOCK
from mthp.geometry import Geometry
from mthp.linux.columns import ColumnReader, Windows, windows_of
from mthp.linux.pagemap import Pagemap
from mthp.ptes import Pte, PteColumns, Segment, in_range_blocks

ROUNDS = 16
"""Looks within which every range is read anew at least once."""

_Sums = NDArray[np.uint64]
_Numbers = NDArray[np.int64]


class LiveWatch:
    """The :class:`~mthp.abilities.Watch` of a process whose page frames can be seen."""

    def __init__(self, pagemap: Pagemap, columns: ColumnReader, geometry: Geometry) -> None:
        self._pagemap = pagemap
        self._columns = columns
        self._geometry = geometry
        n = geometry.ptes_per_pmd
        factors = np.random.default_rng().integers(0, 1 << 63, n, np.uint64) << np.uint64(1) | np.uint64(1)
        # As long as a block and a range, so that the factors from any place on are a slice.
        self._factors = np.tile(factors, READ_BLOCK // geometry.pmd_size + 2)
        self._round = 0
        self._seen = _Seen.nothing()

    def look(self, segments: Sequence[Segment]) -> Iterator[PteColumns]:
        """As :meth:`mthp.abilities.Watch.look`."""
        seen: list[_Seen] = []
        for block in in_range_blocks(segments, self._geometry, READ_BLOCK):
            now = self._sums(block)
            changed = self._changed(now)
            if changed.any():
                columns = self._columns.read(self._parts(now.ranges[changed], block))
                now = now.with_huge(now.ranges[changed], self._huge_ranges(columns))
                yield columns
            seen.append(now)
        self._seen = _Seen.joined(seen)
        self._round += 1

    def _sums(self, block: Sequence[Segment]) -> _Seen:
        """The PMD ranges of `block`, each with the sum of its words; whether they are huge is what it was."""
        words = self._pagemap.read(block)
        windows = windows_of(block, self._geometry)
        n = self._geometry.ptes_per_pmd
        at = 0
        for start, end in block:
            first, count = start // self._geometry.page_size % n, (end - start) // self._geometry.page_size
            # A word of none is 0 wherever it stands.
            words[at : at + count] *= self._factors[first : first + count]
            at += count
        numbers = windows.page // n
        begins = np.flatnonzero(np.diff(numbers, prepend=-1))
        if not len(begins):
            return _Seen.nothing()
        # Unmapping a window that held nothing changes a range too.
        sums = np.add.reduceat(words, windows.index[begins]) + np.add.reduceat(windows.count, begins).astype(np.uint64)
        ranges = numbers[begins]
        return _Seen(ranges, sums, self._seen.huge_at(ranges))

    def _changed(self, now: _Seen) -> NDArray[np.bool_]:
        """Which ranges have another sum than at the last look, were split since then, or have their turn."""
        changed = ~self._seen.same(now)
        changed |= (now.ranges + self._round) % ROUNDS == 0
        unsure = np.flatnonzero(now.huge & ~changed)
        if len(unsure):
            changed[unsure] = ~self._still_huge(now.ranges[unsure])
        return changed

    def _still_huge(self, ranges: _Numbers) -> NDArray[np.bool_]:
        n = self._geometry.ptes_per_pmd
        windows = Windows(ranges * n, np.zeros_like(ranges), np.full_like(ranges, n))
        regions = self._columns.huge_regions(windows)
        if not len(regions):
            return np.zeros(len(ranges), np.bool_)
        at = np.maximum(np.searchsorted(regions[:, 0], windows.page, side="right") - 1, 0)
        still: NDArray[np.bool_] = (regions[at, 0] <= windows.page) & (windows.page + n <= regions[at, 1])
        return still

    def _parts(self, ranges: _Numbers, block: Sequence[Segment]) -> list[Segment]:
        """The parts of `block` that lie in `ranges`."""
        size = self._geometry.pmd_size
        breaks = np.flatnonzero(np.diff(ranges) != 1) + 1
        firsts, lasts = ranges[np.r_[0, breaks]], ranges[np.r_[breaks - 1, len(ranges) - 1]] + 1
        starts = np.array([start // size for start, _ in block], np.int64)
        parts: list[Segment] = []
        for first, last in zip(firsts.tolist(), lasts.tolist(), strict=True):
            begin = max(0, int(np.searchsorted(starts, first)) - 1)
            for start, end in block[begin:]:
                if start >= last * size:
                    break
                if end > first * size:
                    parts.append((max(start, first * size), min(end, last * size)))
        return parts

    def _huge_ranges(self, columns: PteColumns) -> _Numbers:
        """The numbers of the ranges of `columns` that one PMD entry maps whole."""
        windows = windows_of(columns.segments, self._geometry)
        huge = (columns.state[windows.index] & np.uint16(Pte.PMD_MAPPED)) != 0
        huge &= windows.count == self._geometry.ptes_per_pmd
        numbers: _Numbers = windows.page[huge] // self._geometry.ptes_per_pmd
        return numbers


class _Seen:
    """What was seen of some PMD ranges, by ascending number.

    Args:
        ranges: int64, shape (ranges,): their numbers.
        sums: uint64, the same shape.
        huge: bool, the same shape: a PMD entry maps it.
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
        """Where each of `ranges` stands here, and whether it does."""
        at = np.minimum(np.searchsorted(self.ranges, ranges), max(0, len(self.ranges) - 1))
        return at, self.ranges[at] == ranges if len(self.ranges) else np.zeros(len(ranges), np.bool_)

    def same(self, now: _Seen) -> NDArray[np.bool_]:
        """Which of `now` have the sum that they have here: bool, shape (ranges of now,)."""
        at, there = self._at(now.ranges)
        if len(self.ranges):
            there = there & (self.sums[at] == now.sums)
        return there

    def huge_at(self, ranges: _Numbers) -> NDArray[np.bool_]:
        """Which of `ranges` were huge: bool, shape (ranges,)."""
        at, there = self._at(ranges)
        return there & self.huge[at] if len(self.ranges) else there

    def with_huge(self, looked_at: _Numbers, huge: _Numbers) -> _Seen:
        """The same once of the ranges `looked_at`, those in `huge` are known to be huge, and the others not to be."""
        known = np.isin(self.ranges, looked_at)
        return _Seen(self.ranges, self.sums, np.where(known, np.isin(self.ranges, huge), self.huge))
