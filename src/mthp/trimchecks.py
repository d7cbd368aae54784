"""Trim large folios, by any splitter: check them, retry some, and read the outcome from the page tables.

A refused split also returns success, so the outcome of a folio is read from its page tables afterwards.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from mthp.addrspace import AddressSpace
from mthp.ptes import Block, Pte, PteColumns, segments_of, spread
from mthp.results import ScanResult
from mthp.trimming import TrimOutcome
from mthp.vma import Vma

NOT_ONE = "its pages do not lie in one folio of this order"
SHARED = "shared with another process"
LOCKED = "mlocked: the kernel keeps zeroes of locked memory"
ARMED = "registered with userfaultfd"
NO_ZEROES = "no page of it held nothing but zeroes"
UNSPLIT = "it could not be split, as it is pinned, or was shared since"

TrimOne = Callable[[Block, int, NDArray[np.bool_]], tuple[int, int]]
"""Called with a folio, its first frame, and which of its pages contain only zeroes: returns errno, and the duration in
nanoseconds."""


def trim_each(
    space: AddressSpace,
    folios: Sequence[Block],
    zero: Sequence[NDArray[np.bool_]],
    trim_one: TrimOne,
    pause: Callable[[], None],
) -> list[TrimOutcome]:
    """Trim `folios` of `space`, retry those that were not split, and return the outcomes in their order.

    Args:
        zero: the pages of each that contained only zeroes when they were last read: bool, shape (2**order,).
        trim_one: tries one folio.
        pause: called before folios are tried again.

    Raises:
        TargetVanishedError: the process is gone.
    """
    if not folios:
        return []
    before = _Tables(space, folios)
    vmas = space.vmas()
    starts = np.array([vma.start for vma in vmas], np.uint64)
    at = np.searchsorted(starts, np.array([address for address, _ in folios], np.uint64), side="right") - 1
    wanted: list[NDArray[np.bool_]] = []
    tried: dict[int, tuple[int, int]] = {}
    refused: dict[int, tuple[ScanResult, str]] = {}
    for index, (pages, each) in enumerate(zip(zero, at.tolist(), strict=True)):
        # A page that was unmapped since has nothing to give back, and may belong to something new.
        wanted.append(pages & before.there(index))
        why = _refusal(before, index, vmas[each] if each >= 0 else None, wanted[index])
        if why is None:
            tried[index] = trim_one(folios[index], before.first_pfn(index), wanted[index])
        else:
            refused[index] = why
    after = _Tables(space, folios)
    again = [index for index, (error, _) in tried.items() if not error and not after.is_split(index)]
    if again:
        pause()
        for index in again:
            error, elapsed = trim_one(folios[index], before.first_pfn(index), wanted[index])
            tried[index] = error, tried[index][1] + elapsed
        after = _Tables(space, folios)
    return [
        _outcome(block, index, before, after, tried[index])
        if index in tried
        else TrimOutcome(*block, *refused[index], left=after.left(index))
        for index, block in enumerate(folios)
    ]


class _Tables:
    """The page tables of some folios at one moment.

    Raises:
        TargetVanishedError: the process is gone.
    """

    def __init__(self, space: AddressSpace, folios: Sequence[Block]) -> None:
        size = space.geometry.page_size
        columns: PteColumns = space.read(segments_of(folios, size))
        addresses, self._orders = np.array(folios, np.int64).T
        counts = np.int64(1) << self._orders
        first = columns.first_pages(addresses // size, addresses // size + counts, size)
        self._begins = np.cumsum(counts) - counts
        self._counts = counts
        pages = spread(first, counts)
        self._state, self._folio_order = columns.state[pages], columns.folio_order[pages]
        self._pfn = np.zeros(len(pages), np.int64) if columns.pfn is None else columns.pfn[pages].view(np.int64)
        there = (self._state & np.uint16(Pte.PRESENT | Pte.ZERO)) == np.uint16(Pte.PRESENT)
        self._resident = np.add.reduceat(there, self._begins, dtype=np.int64)
        # Where the folio begins, by each of its present pages.
        offsets = np.arange(len(pages)) - np.repeat(self._begins, counts)
        large = there & (self._folio_order == np.repeat(self._orders, counts))
        # Each page of a folio that is mapped in order has the same difference to its frame.
        heads = np.where(large, self._pfn - offsets, -1)
        self._head = np.maximum.reduceat(heads, self._begins)
        alike = np.logical_and.reduceat(~there | (heads == np.repeat(self._head, counts)), self._begins)
        self._large = alike & (self._head >= 0) & (self._head % counts == 0)
        self._any_large = np.logical_or.reduceat(large, self._begins)
        self._there = there

    def is_one(self, index: int) -> bool:
        """Return whether all its present pages lie in one aligned folio of its order; parts may be unmapped."""
        return bool(self._large[index])

    def is_split(self, index: int) -> bool:
        """Return whether none of its pages lies in a folio of its order any more."""
        return not self._any_large[index]

    def there(self, index: int) -> NDArray[np.bool_]:
        """Return which of its pages are present and not the zero page: bool, shape (pages,)."""
        pages: NDArray[np.bool_] = self._there[self._pages(index)]
        return pages

    def resident(self, index: int) -> int:
        """Return the number of its pages that are present and not the zero page."""
        return int(self._resident[index])

    def first_pfn(self, index: int) -> int:
        """Return its first frame."""
        return int(self._head[index])

    def has(self, index: int, bits: Pte) -> bool:
        """Return whether one of its pages has one of `bits`."""
        return bool((self._state[self._pages(index)] & np.uint16(bits)).any())

    def left(self, index: int) -> dict[int, int]:
        """Return the number of its folios by order; a folio of which only some pages are present counts, too."""
        pages = self._pages(index)
        orders = self._folio_order[pages][self._there[pages]]
        found, counts = np.unique(orders[orders >= 0], return_counts=True)
        return {order: -(-count >> order) for order, count in zip(found.tolist(), counts.tolist(), strict=True)}

    def _pages(self, index: int) -> slice:
        begin = int(self._begins[index])
        return slice(begin, begin + int(self._counts[index]))


def _refusal(tables: _Tables, index: int, vma: Vma | None, zero: NDArray[np.bool_]) -> tuple[ScanResult, str] | None:
    """Return why a folio is left alone; None if it may be tried."""
    if not tables.is_one(index) or vma is None:
        return ScanResult.PTE_NON_PRESENT, NOT_ONE
    if tables.has(index, Pte.FILE | Pte.HUGETLB):
        return ScanResult.PAGE_ANON, ""
    if tables.has(index, Pte.SHARED):
        return ScanResult.EXCEED_SHARED_PTE, SHARED
    if "lo" in vma.flags:
        return ScanResult.VMA_CHECK, LOCKED
    if vma.uffd_armed:
        return ScanResult.VMA_CHECK, ARMED
    return None if zero.any() else (ScanResult.FAIL, NO_ZEROES)


def _outcome(block: Block, index: int, before: _Tables, after: _Tables, tried: tuple[int, int]) -> TrimOutcome:
    """Return the outcome of a folio that its call (errno, duration in nanoseconds) and the page tables show."""
    error, elapsed = tried
    result, reason = ScanResult.PAGE_COUNT, UNSPLIT
    if after.is_split(index):
        result, reason = ScanResult.SUCCEED, ""
    elif error == errno.EINVAL:
        # can_madv_lru_vma() (mm/madvise.c) refused: the mapping was locked since, or is another one.
        result, reason = ScanResult.VMA_CHECK, LOCKED
    elif error == errno.ENOMEM:
        result, reason = ScanResult.VMA_NULL, ""
    back = before.resident(index) - after.resident(index)
    return TrimOutcome(*block, result, reason, back, after.left(index), elapsed_ns=elapsed, errno=error)
