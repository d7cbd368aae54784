"""Check which blocks of a process must not be moved: many blocks at once, from columns.

A *block* is a naturally aligned run of 2**order pages that is to become one folio. The columns were read a moment ago;
the process may have gone on since. So blocks are checked twice: before the threads are stopped, to spare them a useless
stop, and after it, when the process can no longer change the answer.

The kernel uses three kinds of memory inside an otherwise ordinary mapping on behalf of a thread, also while that thread
is stopped: rseq areas, robust lists and the memory below the stack pointer. A block that holds one is not moved.
"""

from __future__ import annotations

import ctypes
import enum
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mthp.linux.mover.outcome import Objection
from mthp.linux.mover.taskfiles import read_task_file, task_ids
from mthp.linux.process import Process
from mthp.movechecks import refuse_vma
from mthp.ptes import LARGEST_ADDRESS, Pte, PteColumns, Segment, spread
from mthp.results import ScanResult
from mthp.vma import Vma

NR_GET_ROBUST_LIST = {"x86_64": 274, "aarch64": 100}
"""``get_robust_list`` in each architecture's ``asm/unistd.h``."""

ROBUST_LIST_HEAD_BYTES = 24
"""``sizeof(struct robust_list_head)``, include/uapi/linux/futex.h."""

RED_ZONE_BYTES = 128
"""Bytes that a function may use below its stack pointer (System V ABI of x86-64, 3.2.2; aarch64 has none)."""

WORD_BYTES = 8

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long

_Int64s = NDArray[np.int64]
_Bools = NDArray[np.bool_]


class BlockRefusal(enum.IntEnum):
    """The reason not to move a block, in the order of precedence; NONE if it may be moved."""

    objection: Objection

    NONE = 0
    MISALIGNED = 1, ScanResult.ADDRESS_RANGE, "its address is not a multiple of its size"
    NOT_IN_ONE_VMA = 2, ScanResult.ADDRESS_RANGE, "it does not lie inside one mapping"
    VMA = 3, ScanResult.VMA_CHECK, "its mapping is refused"
    NOT_READ = 4, ScanResult.FAIL, "its page table entries were not read"
    SPECIAL = 5, ScanResult.PAGE_COUNT, "it holds a stack pointer, robust list or rseq area, which the kernel uses"
    MARKER = 6, ScanResult.PTE_UFFD, "it holds a guard or userfaultfd marker"
    SWAPPED = 7, ScanResult.EXCEED_SWAP_PTE, "a page of it is swapped out"
    NOT_ANON = 8, ScanResult.PAGE_ANON, "a page of it belongs to a file, to shared memory or to hugetlbfs"
    SHARED = 9, ScanResult.EXCEED_SHARED_PTE, "a page of it is mapped more than once"
    ALREADY = 10, ScanResult.PTE_MAPPED_HUGEPAGE, "it lies in one folio of that order or a larger one already"
    LARGE_FOLIO = 11, ScanResult.PTE_MAPPED_HUGEPAGE, "a page of it is part of a folio of that order or a larger one"
    EMPTY = 12, ScanResult.NO_PTE_TABLE, "it holds nothing"
    ABSENT = 13, ScanResult.EXCEED_NONE_PTE, "a page of it is absent or the zero page, and filling is not planned"

    def __new__(cls, number: int, result: ScanResult = ScanResult.SUCCEED, reason: str = "") -> BlockRefusal:
        """Make the refusal `number`; `result` is the scan result nearest to it."""
        self = int.__new__(cls, number)
        self._value_ = number
        self.objection = Objection(result, reason)
        return self


def objection_of(verdict: int, vmas: Sequence[Vma], address: int) -> Objection:
    """Return the objection to a block, as exact as possible.

    Args:
        verdict: of :func:`refuse_blocks`, not NONE.
        vmas: the mappings that the block was checked by.
    """
    objection = BlockRefusal(verdict).objection
    if verdict != BlockRefusal.VMA:
        return objection
    refusals = (refuse_vma(vma) for vma in vmas if vma.start <= address < vma.end)
    reason = next((refusal.reason for refusal in refusals if refusal), objection.reason)
    return Objection(objection.result, reason)


@dataclass(frozen=True, slots=True)
class SpecialRanges:
    """Memory that the kernel uses on behalf of threads; half-open ranges of addresses in bytes.

    Attributes:
        robust_lists: the head of each thread's list.
        stacks: the red zone and the word at each stack pointer.
    """

    robust_lists: tuple[Segment, ...] = ()
    stacks: tuple[Segment, ...] = ()

    @property
    def ranges(self) -> tuple[Segment, ...]:
        """Return all ranges."""
        return self.robust_lists + self.stacks


def special_ranges(process: Process) -> SpecialRanges:
    """Return the :class:`SpecialRanges` that are visible at this moment, without stopping anything."""
    robust: list[Segment] = []
    stacks: list[Segment] = []
    for tid in task_ids(process):
        # The kernel walks the list when the thread is killed (exit_robust_list, kernel/futex/core.c).
        if head := robust_list(tid):
            robust.append((head, head + ROBUST_LIST_HEAD_BYTES))
        # The kernel pushes a signal's frame below the stack pointer. Not `kstkesp` of stat: the kernel fills it in for
        # exiting threads only (do_task_stat, fs/proc/array.c). Rseq areas take a tracer (mthp.linux.mover.park).
        text = read_task_file(process, tid, "syscall")
        if text is None:
            continue
        words = text.split()
        if len(words) < 3:
            continue  # It runs, and its stack pointer is unknown.
        # Number, arguments, stack pointer, program counter (proc_pid_syscall, fs/proc/base.c).
        pointer = int(words[-2], 16)
        stacks.append((max(0, pointer - RED_ZONE_BYTES), pointer + WORD_BYTES))
    return SpecialRanges(tuple(robust), tuple(stacks))


def robust_list(tid: int) -> int:
    """Return the address of the head of a thread's robust list; 0 if it has none or is gone."""
    number = NR_GET_ROBUST_LIST.get(os.uname().machine)
    head, length = ctypes.c_uint64(), ctypes.c_size_t()
    if number is None or _libc.syscall(
        ctypes.c_long(number), ctypes.c_long(tid), ctypes.byref(head), ctypes.byref(length)
    ):
        return 0
    return head.value


def refuse_blocks(
    columns: PteColumns,
    mapcounts: _Int64s | None,
    addresses: _Int64s,
    orders: NDArray[np.int8],
    *,
    vmas: Sequence[Vma],
    special: SpecialRanges,
    page_size: int,
    fill: bool = False,
) -> NDArray[np.uint8]:
    """Check blocks, and return the :class:`BlockRefusal` of each: uint8, shape (blocks,).

    Pages freed with MADV_FREE are not refused: moving is as right as writing to them. The plan decides what is wanted.

    Args:
        columns: the page table entries around the blocks; segments in any order, not overlapping.
        mapcounts: how often each page of `columns` is mapped, or None to use the bit SHARED alone. The bit counts in
            any case, because the kernel may count only an average for large folios.
        addresses: start of each block in bytes: int64, shape (blocks,).
        orders: order of each block: int8, shape (blocks,).
        vmas: the mappings, ascending.
        special: memory that the kernel uses.
        fill: whether holes and zero pages are to be filled.
    """
    verdict = np.zeros(len(addresses), np.uint8)
    if not len(addresses):
        return verdict
    counts = np.int64(1) << orders.astype(np.int64)
    ends = addresses + counts * page_size

    def refuse(mask: _Bools, why: BlockRefusal) -> None:
        verdict[mask & (verdict == 0)] = why

    # In the order of precedence: the first refusal of a block stays.
    refuse(addresses % (counts * page_size) != 0, BlockRefusal.MISALIGNED)
    inside, allowed = _by_vma(addresses, ends, vmas)
    refuse(~inside, BlockRefusal.NOT_IN_ONE_VMA)
    refuse(~allowed, BlockRefusal.VMA)
    first = columns.first_pages(addresses // page_size, ends // page_size, page_size)
    refuse(first < 0, BlockRefusal.NOT_READ)
    refuse(touches(addresses, ends, special.ranges), BlockRefusal.SPECIAL)
    open_ = np.flatnonzero(verdict == 0)
    if len(open_):
        verdict[open_] = _by_pages(columns, mapcounts, first[open_], counts[open_], orders[open_], fill=fill)
    return verdict


def _by_vma(addresses: _Int64s, ends: _Int64s, vmas: Sequence[Vma]) -> tuple[_Bools, _Bools]:
    """Return whether each block lies inside one mapping, and whether that one may be touched: bool, shape (blocks,)."""
    # [vsyscall] lies beyond what an int64 holds.
    user = [vma for vma in vmas if vma.end < LARGEST_ADDRESS]
    if not user:
        return np.zeros(len(addresses), np.bool_), np.zeros(len(addresses), np.bool_)
    starts = np.array([vma.start for vma in user], np.int64)
    vma_ends = np.array([vma.end for vma in user], np.int64)
    at = np.searchsorted(starts, addresses, side="right") - 1
    inside = (at >= 0) & (ends <= vma_ends[at])
    allowed = np.zeros(len(user), np.bool_)
    # Each mapping once, however many blocks lie in it.
    for index in np.unique(at[inside]).tolist():
        allowed[index] = refuse_vma(user[index]) is None
    return inside, inside & allowed[at]


def touches(addresses: _Int64s, ends: _Int64s, ranges: Sequence[Segment]) -> _Bools:
    """Return which blocks overlap one of `ranges`: bool, shape (blocks,).

    Args:
        addresses, ends: those of the blocks: int64, shape (blocks,).
        ranges: half-open, in any order, of any lengths; those beyond user space touch nothing.
    """
    user = sorted(pair for pair in ranges if pair[1] < LARGEST_ADDRESS)
    if not user:
        return np.zeros(len(addresses), np.bool_)
    pairs = np.array(user, np.int64)
    # Of all ranges that start before a block's end, the one that reaches furthest decides.
    reach = np.maximum.accumulate(pairs[:, 1])
    before = np.searchsorted(pairs[:, 0], ends, side="left")
    touched: _Bools = (before > 0) & (reach[np.maximum(before - 1, 0)] > addresses)
    return touched


def _by_pages(
    columns: PteColumns,
    mapcounts: _Int64s | None,
    first: _Int64s,
    counts: _Int64s,
    orders: NDArray[np.int8],
    *,
    fill: bool,
) -> NDArray[np.uint8]:
    """Return refusals from the entries of blocks that lie in `columns` from page `first` on: uint8, shape (blocks,)."""
    verdict = np.zeros(len(first), np.uint8)
    pages = spread(first, counts)
    begins = np.cumsum(counts) - counts
    state = columns.state[pages]
    some = np.bitwise_or.reduceat(state, begins)

    def refuse(mask: _Bools, why: BlockRefusal) -> None:
        verdict[mask & (verdict == 0)] = why

    def has(bits: Pte) -> _Bools:
        chosen: _Bools = (some & np.uint16(bits)) != 0
        return chosen

    refuse(has(Pte.GUARD | Pte.UFFD_WP), BlockRefusal.MARKER)
    refuse(has(Pte.SWAP), BlockRefusal.SWAPPED)
    refuse(has(Pte.FILE | Pte.HUGETLB), BlockRefusal.NOT_ANON)
    shared = has(Pte.SHARED)
    real = (state & np.uint16(Pte.PRESENT | Pte.ZERO)) == np.uint16(Pte.PRESENT)
    if mapcounts is not None:
        shared |= np.logical_or.reduceat(real & (mapcounts[pages] > 1), begins)
    refuse(shared, BlockRefusal.SHARED)
    large = columns.folio_order[pages] >= np.repeat(orders, counts)
    large &= real
    refuse(_one_folio(columns, pages, begins, counts, large), BlockRefusal.ALREADY)
    refuse(np.logical_or.reduceat(large, begins), BlockRefusal.LARGE_FOLIO)
    held = np.add.reduceat(real.astype(np.int64), begins)
    refuse(held == 0, BlockRefusal.EMPTY)
    if not fill:
        refuse(held < counts, BlockRefusal.ABSENT)
    return verdict


def _one_folio(columns: PteColumns, pages: _Int64s, begins: _Int64s, counts: _Int64s, large: _Bools) -> _Bools:
    """Return which blocks lie in one folio of their order or more: bool, shape (blocks,).

    Folios are naturally aligned, so such a block's frames are consecutive from one aligned like the block. Without
    frame numbers only folios mapped by a PMD entry have a known order, and they are whole.
    """
    whole: _Bools = np.logical_and.reduceat(large, begins)
    if columns.pfn is None:
        return whole
    frames = columns.pfn[pages].view(np.int64)
    heads = frames[begins]
    expected = np.repeat(heads - begins, counts) + np.arange(len(pages))
    consecutive = np.logical_and.reduceat(frames == expected, begins)
    whole &= consecutive & (heads % counts == 0)
    return whole
