"""Check again, once all threads of the target are stopped, whatever may have changed.

Processes, mappings and blocks are checked before the stop (:mod:`mthp.linux.mover.refuse`), which takes milliseconds:
the kernel walks all page tables to write smaps, every process of the machine is compared, every open file is read. No
target may be stopped for that long. So after the stop only facts that can have changed in between are checked, in a
form that takes a fraction of a millisecond (bench/bench_mover.py; 0.3 ms for 8 blocks, and 0.6 ms with 64 threads, on
a busy machine):

- *Pages*: the pagemap words of the blocks, but not folios and other counts.
- *Mappings*: one query for each (PROCMAP_QUERY, Linux 6.11; elsewhere maps is read).
- *Sharers of the address space*: there is no new PID, or the new processes are compared (kcmp(2)).
- *Pins, THP switched off, system calls filtered*: status of the process. :mod:`mthp.linux.mover.freeze` checks new
  threads when it stops them, this module their robust lists.
- *userfaultfd*: the process has none, or its mappings are checked again.
- *io_uring, asynchronous I/O, devices*: nothing. The pages that they hold at this moment are pinned, which the kernel
  sees, and threads that work for them are refused as threads.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mthp.closing import Closing
from mthp.geometry import Geometry
from mthp.linux import abi, procfs
from mthp.linux.mover.freeze import FrozenProcess
from mthp.linux.mover.mapping import query_mapping
from mthp.linux.mover.outcome import Objection
from mthp.linux.mover.refuse.block import ROBUST_LIST_HEAD_BYTES, BlockRefusal, robust_list, touches
from mthp.linux.mover.refuse.sharing import last_pid, new_sharer
from mthp.linux.pagemap import Pagemap
from mthp.linux.process import Process, status_fields
from mthp.movechecks import refuse_vma
from mthp.ptes import Block, Pte, PteColumns
from mthp.results import ScanResult
from mthp.vma import Vma

MAX_FILES = 256
"""Open files that are checked while the target is stopped; about a microsecond each."""

_Int64s = NDArray[np.int64]
_USERFAULTFD = "anon_inode:[userfaultfd]"
MAPPING_CHANGED = Objection(ScanResult.VMA_CHECK, "its mapping changed meanwhile")
"""For blocks of a mapping that is smaller than before, or another one; they may be checked again."""


_SHARED_NOW = Objection(ScanResult.EXCEED_SHARED_PTE, "a page of it is shared with another process now")
_GONE = Objection(ScanResult.PTE_NON_PRESENT, "a page of it went away meanwhile")


@dataclass(slots=True)
class Before:
    """Facts found before the stop, or in an earlier window since.

    Attributes:
        vmas: the mappings, ascending, with their flags.
        zero_pages: frames of the zero pages in the blocks: uint64, sorted.
        last_pid: the last PID that the system had given out when other processes were last compared.
        has_userfaultfd: whether the process itself had one then.
        fill: whether holes are to be filled.
    """

    vmas: Sequence[Vma]
    zero_pages: NDArray[np.uint64]
    last_pid: int
    has_userfaultfd: bool
    fill: bool


class Recheck(Closing):
    """The second check of blocks. Call its methods in the tracing thread."""

    def __init__(self, process: Process, geometry: Geometry) -> None:
        self._process = process
        self._geometry = geometry
        self._pagemap = Pagemap(process)

    def close(self) -> None:
        self._pagemap.close()

    def objections(self, frozen: FrozenProcess, blocks: Sequence[Block], before: Before) -> list[Objection | None]:
        """Return the reason not to move each block after all, or None."""
        if objection := self._process_objection(before):
            return [objection] * len(blocks)
        vmas = before.vmas
        # If a mapping was registered with it meanwhile, the refill would wait for a thread of the target. Only smaps
        # shows that, which takes long.
        if before.has_userfaultfd:
            vmas = procfs.read_vmas(self._process)
        size = self._geometry.size_of
        with _PresentMappings(self._process, vmas) as mappings:
            objections = [mappings.objection(address, address + size(order)) for address, order in blocks]
        heads = [head for tid in frozen.tracees if (head := robust_list(tid))]
        addresses, orders = np.array(blocks, np.int64).T
        ends = addresses + (self._geometry.page_size << orders)
        lists = [(head, head + ROBUST_LIST_HEAD_BYTES) for head in heads]
        for index in np.flatnonzero(touches(addresses, ends, lists)).tolist():
            objections[index] = objections[index] or BlockRefusal.SPECIAL.objection
        self._look_at_pages(addresses, ends, before, objections)
        return objections

    def _process_objection(self, before: Before) -> Objection | None:
        status = status_fields(self._process.read("status"))
        if int(status.get("Seccomp", "0")):
            return Objection(ScanResult.FAIL, "the process filters its system calls now (seccomp)")
        if status.get("THP_enabled") == "0":
            return Objection(ScanResult.FAIL, "the process switched THP off for itself meanwhile (PR_SET_THP_DISABLE)")
        if int(status.get("VmPin", "0").split()[0]):
            return Objection(ScanResult.PAGE_COUNT, "the process pinned memory meanwhile (VmPin)")
        # PIDs are given out in order, and /proc/loadavg names the last one.
        newest = last_pid()
        if new_sharer(self._process.pid, before.last_pid, newest):
            return Objection(ScanResult.FAIL, "another process shares its memory or files now (CLONE_VM, CLONE_FILES)")
        # Not compared again in later windows: only a sharer of an address space can make another one share it.
        before.last_pid = newest
        # With too many files to look through in a window, the answer from before the stop counts.
        if not before.has_userfaultfd and has_userfaultfd(self._process, at_most=MAX_FILES):
            return Objection(
                ScanResult.VMA_CHECK, "the process has a userfaultfd now: its mappings must be checked again"
            )
        return None

    def _look_at_pages(
        self, addresses: _Int64s, ends: _Int64s, before: Before, objections: list[Objection | None]
    ) -> None:
        """Object to blocks that have lost a page, or share one."""
        # Adjacent blocks are read together.
        breaks = np.flatnonzero(addresses[1:] != ends[:-1]) + 1
        firsts, lasts = np.r_[0, breaks], np.r_[breaks, len(ends)] - 1
        words = self._pagemap.read(list(zip(addresses[firsts].tolist(), ends[lasts].tolist(), strict=True)))
        counts = (ends - addresses) // self._geometry.page_size
        begins = np.cumsum(counts) - counts
        own = np.uint64(abi.PM_PRESENT | abi.PM_MMAP_EXCLUSIVE)
        bad = np.uint64(abi.PM_FILE | abi.PM_SWAP | abi.PM_UFFD_WP | abi.PM_GUARD_REGION)
        # No look at the folios: they were checked before, and the kernel checks each again when it moves it
        # (move_present_ptes, mm/userfaultfd.c in 7.3).
        good = ((words & own) == own) & ((words & bad) == 0)
        if before.fill and not good.all():
            rest = np.flatnonzero(~good)
            frames = words[rest] & np.uint64(abi.PM_PFRAME_MASK)
            zero = ((words[rest] & np.uint64(abi.PM_PRESENT)) != 0) & np.isin(frames, before.zero_pages)
            # A none PTE's word may still have the soft-dirty bit.
            nothing = (words[rest] & (own | bad)) == 0
            good[rest] = zero | nothing
        present = (words & np.uint64(abi.PM_PRESENT)) != 0
        shared = np.logical_or.reduceat(~good & present, begins)
        for index in np.flatnonzero(~np.logical_and.reduceat(good, begins)).tolist():
            if objections[index] is None:
                objections[index] = _SHARED_NOW if shared[index] else _GONE


class _PresentMappings(Closing):
    """The present mappings, compared with the earlier ones; each is queried once."""

    def __init__(self, process: Process, vmas: Sequence[Vma]) -> None:
        self._process = process
        self._vmas = vmas
        self._starts = [vma.start for vma in vmas]
        self._fd = process.open("maps")
        self._answers: dict[int, Objection | None] = {}

    def objection(self, start: int, end: int) -> Objection | None:
        """Return the reason in its mapping not to move the block from `start` to `end`, or None."""
        at = bisect_right(self._starts, start) - 1
        vma = self._vmas[at] if at >= 0 else None
        if vma is None or end > vma.end:
            return BlockRefusal.NOT_IN_ONE_VMA.objection
        if vma.start not in self._answers:
            self._answers[vma.start] = self._ask(vma, start)
        return self._answers[vma.start]

    def _ask(self, vma: Vma, address: int) -> Objection | None:
        if refusal := refuse_vma(vma):
            return Objection(ScanResult.VMA_CHECK, refusal.reason)
        now = query_mapping(self._process, self._fd, address)
        # A mapping that has grown has the same flags: the kernel merges only mappings with equal flags
        # (is_mergeable_vma, mm/vma.c). Flags that changed for the whole mapping do not show here; the important ones,
        # such as VM_LOCKED, make the kernel refuse the move.
        if now is None or now.inode or now.start > vma.start or now.end < vma.end or now.permissions != vma.permissions:
            return MAPPING_CHANGED
        return None

    def close(self) -> None:
        os.close(self._fd)


def has_userfaultfd(process: Process, *, at_most: int = 1 << 30) -> bool:
    """Return whether `process` has a userfaultfd open; False if it has more than `at_most` files."""
    directory = process.open("fd")
    try:
        with os.scandir(directory) as entries:
            names = [entry.name for entry in entries]
        if len(names) > at_most:
            return False
        for name in names:
            try:
                if os.readlink(name, dir_fd=directory) == _USERFAULTFD:
                    return True
            except FileNotFoundError:
                continue
    except OSError as error:
        process.fail(error, "its files")
    finally:
        os.close(directory)
    return False


def zero_pages_of(columns: PteColumns) -> NDArray[np.uint64]:
    """Return the frames of the zero pages in `columns`, sorted; empty where frames cannot be seen."""
    if columns.pfn is None:
        return np.empty(0, np.uint64)
    return np.unique(columns.pfn[columns.has(Pte.ZERO)])
