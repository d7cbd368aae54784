"""Gives back pages of zeroes that lie in large folios of a process.

The kernel maps the shared zero page in place of a page of zeroes when it splits a folio to base pages, since Linux 6.12
(try_to_map_unused_to_zeropage(), mm/migrate.c), and looks at the bytes itself with the page unmapped: what is written
meanwhile is not lost. So all that has to be caused is a split. MADV_COLD of a part of a folio does (mm/madvise.c,
madvise_cold_or_pageout_pte_range()); it makes the page that it names look old, hence a page of zeroes is named.
``split_huge_pages`` of debugfs leaves large what is in use.
"""

from __future__ import annotations

import dataclasses
import errno
import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mthp.closing import Closing
from mthp.linux.divide import LargeFolio, divider_of
from mthp.linux.space import ProcessSpace
from mthp.linux.splitfile import SplitAbility, SplitFile, opened, split_ability
from mthp.ptes import Block, Pte, PteColumns, segments_of, spread
from mthp.results import ScanResult
from mthp.trimming import TrimBy, TrimOutcome, in_use
from mthp.vma import Vma

PAUSE = 0.002
"""Seconds before folios are tried a second time whose lock or reference may have passed."""

NOT_ONE = "what is there of it does not lie in one folio of this order"
SHARED = "shared with another process"
LOCKED = "mlocked: the kernel keeps zeroes of locked memory"
ARMED = "registered with userfaultfd"
NO_ZEROES = "no page of it held nothing but zeroes"
UNSPLIT = "it could not be split, as it is pinned, or was shared since"


class Trimmer(Closing):
    """Trims folios of one process.

    Args:
        space: of the process; it stays the caller's.
        ability: what the kernel does; found out if None.
        file: to split by; the system's if None.

    Raises:
        NotPermittedError: frames cannot be seen.
        TargetVanishedError: the process is gone.
    """

    def __init__(self, space: ProcessSpace, ability: SplitAbility | None = None, file: SplitFile | None = None) -> None:
        self._space, self._geometry = space, space.geometry
        self._ability = split_ability(self._geometry) if ability is None else ability
        if self._ability.splits and file is None:
            file = opened()
        self._divider = divider_of(space, file, self._ability)

    def close(self) -> None:
        self._divider.close()

    def trim(self, folios: Sequence[Block], zero: Sequence[NDArray[np.bool_]], by: TrimBy) -> list[TrimOutcome]:
        """Do what :meth:`mthp.trimming.Trimming.trim_folios` says.

        Raises:
            TargetVanishedError: the process is gone.
            UnsupportedError, NotPermittedError: not in this way here.
        """
        self._ability.require_split() if by == "split" else self._ability.require_cold()
        if not folios:
            return []
        before = _Tables(self._space, folios)
        vmas = self._space.vmas()
        starts = np.array([vma.start for vma in vmas], np.uint64)
        at = np.searchsorted(starts, np.array([address for address, _ in folios], np.uint64), side="right") - 1
        wanted: list[NDArray[np.bool_]] = []
        tried: dict[int, tuple[int, int]] = {}
        refused: dict[int, tuple[ScanResult, str]] = {}
        for index, (pages, each) in enumerate(zip(zero, at.tolist(), strict=True)):
            wanted.append(pages & before.there(index))
            why = _refusal(before, index, vmas[each] if each >= 0 else None, wanted[index])
            if why is None:
                tried[index] = self._one(folios[index], before.first_pfn(index), wanted[index], by)
            else:
                refused[index] = why
        after = _Tables(self._space, folios)
        again = [index for index, (error, _) in tried.items() if not error and not after.is_split(index)]
        if again:
            time.sleep(PAUSE)
            for index in again:
                error, elapsed = self._one(folios[index], before.first_pfn(index), wanted[index], by)
                tried[index] = error, tried[index][1] + elapsed
            after = _Tables(self._space, folios)
        outcomes = []
        for index, block in enumerate(folios):
            outcome = TrimOutcome(*block, *refused.get(index, (ScanResult.SUCCEED, "")), left=after.left(index))
            if index in tried:
                error, elapsed = tried[index]
                outcome = dataclasses.replace(
                    _end(outcome, error, is_split=after.is_split(index)),
                    given_back=before.resident(index) - after.resident(index),
                    elapsed_ns=elapsed,
                    errno=error,
                )
            outcomes.append(outcome)
        return outcomes

    def _one(self, folio: Block, pfn: int, zero: NDArray[np.bool_], by: TrimBy) -> tuple[int, int]:
        """Trim one folio: errno, and how long it took in nanoseconds.

        Raises:
            TargetVanishedError: the process is gone.
        """
        begin = time.perf_counter_ns()
        address, order = folio
        error = 0
        if by == "split":
            layout = in_use(zero, self._geometry.page_size)
            self._divider.divide(LargeFolio(address, pfn, order), layout)
        else:
            error = self._divider.cool(address + int(zero.argmax()) * self._geometry.page_size)
        return error, time.perf_counter_ns() - begin


class _Tables:
    """What the page tables show of some folios at one moment.

    Raises:
        TargetVanishedError: the process is gone.
    """

    def __init__(self, space: ProcessSpace, folios: Sequence[Block]) -> None:
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
        # Where the folio begins, by each of its pages; those that are not there have no say.
        offsets = np.arange(len(pages)) - np.repeat(self._begins, counts)
        large = there & (self._folio_order == np.repeat(self._orders, counts))
        heads = np.where(large, self._pfn - offsets, -1)
        self._head = np.maximum.reduceat(heads, self._begins)
        alike = np.logical_and.reduceat(~there | (heads == np.repeat(self._head, counts)), self._begins)
        self._large = alike & (self._head >= 0) & (self._head % counts == 0)
        self._any_large = np.logical_or.reduceat(large, self._begins)
        self._there = there

    def is_one(self, index: int) -> bool:
        """Whether all that is there of it lies in one folio of its order, aligned. Parts may have been unmapped."""
        return bool(self._large[index])

    def is_split(self, index: int) -> bool:
        """Whether nothing of it lies in a folio of its order any more."""
        return not self._any_large[index]

    def there(self, index: int) -> NDArray[np.bool_]:
        """Which of its pages are there and not the zero page: bool, shape (pages,)."""
        pages: NDArray[np.bool_] = self._there[self._pages(index)]
        return pages

    def resident(self, index: int) -> int:
        """Pages of it that are there and not the zero page."""
        return int(self._resident[index])

    def first_pfn(self, index: int) -> int:
        """Its first frame."""
        return int(self._head[index])

    def has(self, index: int, bits: Pte) -> bool:
        """Whether a page of it has one of `bits`."""
        return bool((self._state[self._pages(index)] & np.uint16(bits)).any())

    def left(self, index: int) -> dict[int, int]:
        """How many folios of which order there are; one of which only some pages are there counts as a part."""
        pages = self._pages(index)
        orders = self._folio_order[pages][self._there[pages]]
        found, counts = np.unique(orders[orders >= 0], return_counts=True)
        return {order: -(-count >> order) for order, count in zip(found.tolist(), counts.tolist(), strict=True)}

    def _pages(self, index: int) -> slice:
        begin = int(self._begins[index])
        return slice(begin, begin + int(self._counts[index]))


def _refusal(tables: _Tables, index: int, vma: Vma | None, zero: NDArray[np.bool_]) -> tuple[ScanResult, str] | None:
    """Return why a folio is left alone; None if it is tried."""
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


def _end(outcome: TrimOutcome, error: int, *, is_split: bool) -> TrimOutcome:
    """Return what the calls and the page tables say."""
    if is_split:
        return outcome
    if error == errno.EINVAL:
        # can_madv_lru_vma(): mlocked since, or another mapping.
        return dataclasses.replace(outcome, result=ScanResult.VMA_CHECK, reason=LOCKED)
    if error == errno.ENOMEM:
        return dataclasses.replace(outcome, result=ScanResult.VMA_NULL)
    return dataclasses.replace(outcome, result=ScanResult.PAGE_COUNT, reason=UNSPLIT)
