"""Collapse PMD ranges by MADV_COLLAPSE: process_madvise(2), or madvise(2) for this process, and explain its errno."""

from __future__ import annotations

import errno
import time

from mthp.abilities import memory_bounds
from mthp.budget import MACHINE
from mthp.errors import NotPermittedError, UnsupportedError
from mthp.linux import abi, procfs
from mthp.linux.processspace import ProcessSpace
from mthp.ptes import Block
from mthp.results import BlockOutcome, ScanResult, result_of_madvise


class Madvise:
    """MADV_COLLAPSE of PMD ranges of one process.

    The methods raise TargetVanishedError if the process is gone, UnsupportedError if this kernel cannot do it or not
    for this process, and NotPermittedError if CAP_SYS_NICE or the right to read the process is missing.
    """

    def __init__(self, space: ProcessSpace) -> None:
        self._space, self._process, self._geometry = space, space.process, space.geometry

    def collapse(self, blocks: list[Block]) -> list[BlockOutcome]:
        """Collapse PMD ranges; after a failed charge no more are tried, because the target is at a limit."""
        outcomes: list[BlockOutcome] = []
        for address, _ in blocks:
            outcome = self.collapse_range(address)
            outcomes.append(outcome)
            if outcome.result is ScanResult.CGROUP_CHARGE_FAIL or (
                outcome.result is ScanResult.ALLOC_HUGE_PAGE_FAIL
                and any(bound.name != MACHINE for bound in memory_bounds(self._space))
            ):
                break
        last = outcomes[-1]
        left = blocks[len(outcomes) :]
        return outcomes + [BlockOutcome(*block, last.result, errno=last.errno, everywhere=True) for block in left]

    def collapse_range(self, address: int) -> BlockOutcome:
        """Collapse one PMD range; return the result of the call."""
        size = self._geometry.pmd_size
        begin = time.perf_counter_ns()
        error = self._process.advise(address, size, abi.MADV_COLLAPSE)
        if error == errno.EAGAIN:
            # The cause passes (madvise(2), EAGAIN): often a page that is on its way to the LRU lists.
            error = self._process.advise(address, size, abi.MADV_COLLAPSE)
        elapsed = time.perf_counter_ns() - begin
        result = self._result(error, address, size)
        return BlockOutcome(address, self._geometry.pmd_order, result, elapsed_ns=elapsed, errno=error)

    def _result(self, error: int, address: int, size: int) -> ScanResult:
        """Return the scan result behind errno."""
        if not error:
            return ScanResult.SUCCEED
        self._process.check_alive()
        if error in (errno.EPERM, errno.EACCES):
            raise NotPermittedError(
                f"not permitted to collapse memory of process {self._space.label}",
                help="process_madvise needs CAP_SYS_NICE, and CAP_SYS_PTRACE or the same user (run as root)",
            )
        if error == errno.ENOSYS:
            raise UnsupportedError("this kernel has no process_madvise", help="Linux 5.10 or later has it")
        if error == errno.EINVAL and not self._space.sysfs.exists:
            raise UnsupportedError("this kernel has no THP", help="it takes CONFIG_TRANSPARENT_HUGEPAGE")
        if error == errno.ENOMEM and not procfs.is_mapped(self._process, address, address + size):
            # madvise(2) returns ENOMEM both for no memory and for no mapping.
            return ScanResult.VMA_NULL
        if error == errno.EBUSY and any(vma.uffd_armed for vma in self._space.vmas() if vma.start <= address < vma.end):
            # The kernel returns EBUSY both for a cgroup at its limit and for none PTEs that must not be filled.
            return ScanResult.EXCEED_NONE_PTE
        return result_of_madvise(error)
