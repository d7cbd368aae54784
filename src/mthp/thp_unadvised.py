"""Detect processes that may have THP only where advised (PR_THP_DISABLE_EXCEPT_ADVISED, Linux 6.18).

prctl(PR_SET_THP_DISABLE, 1, PR_THP_DISABLE_EXCEPT_ADVISED), used by systemd for MemoryTHP=madvise, keeps page faults
from making folios in mappings without MADV_HUGEPAGE; MADV_COLLAPSE is not affected (vma_thp_disabled(),
include/linux/huge_mm.h). /proc/PID/status has THP_enabled: 1 all the same, and only PR_GET_THP_DISABLE inside the
process reports it, for which code would have to be injected. The mover makes its folios by faults, so the first batch
shows it: every block comes back as small pages, although the machine has free folios.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mthp import abilities
from mthp.addrspace import AddressSpace
from mthp.ptes import Block, Segment
from mthp.results import BlockOutcome, ScanResult

REASON = (
    "all blocks of a batch came back as small pages, although the machine has free folios of this size: probably the"
    " process may have THP only where it is advised (prctl PR_SET_THP_DISABLE with PR_THP_DISABLE_EXCEPT_ADVISED, as"
    " systemd's MemoryTHP=madvise sets it); MADV_COLLAPSE, for the PMD size, is not affected"
)

RESULT = ScanResult.VMA_CHECK
"""The result of blocks in such memory, also of those that were tried."""


def came_back_small(outcome: BlockOutcome) -> bool:
    """Return whether a block was moved, and the kernel put small pages in its place."""
    return outcome.result is ScanResult.ALLOC_HUGE_PAGE_FAIL and not outcome.errno and outcome.elapsed_ns > 0


def advised(space: AddressSpace) -> list[Segment]:
    """Return the mappings with MADV_HUGEPAGE, which are not affected."""
    return [(vma.start, vma.end) for vma in space.vmas() if "hg" in vma.flags]


def lies_in(address: int, segments: Sequence[Segment]) -> bool:
    """Return whether `address` lies in one of `segments`."""
    return any(start <= address < end for start, end in segments)


def corrected(space: AddressSpace, blocks: Sequence[Block], outcomes: Sequence[BlockOutcome]) -> list[BlockOutcome]:
    """Return the outcomes of a batch, with `RESULT` for its blocks that came back small for this reason.

    It is assumed to be the reason if no block in memory without advice became a folio, and if the machine and the
    memory cgroup have more free memory for each of the orders than the batch took. A memory policy that binds the
    process to a node without free folios looks the same.

    Raises:
        TargetVanishedError: the process is gone.
    """
    pmd_order = space.geometry.pmd_order
    moved = [at for at, block in enumerate(blocks) if block[1] < pmd_order]
    small = [at for at in moved if came_back_small(outcomes[at])]
    if not small:
        return list(outcomes)
    spared = advised(space)
    small = [at for at in small if not lies_in(blocks[at][0], spared)]
    made = [at for at in moved if outcomes[at].result is ScanResult.SUCCEED and not lies_in(blocks[at][0], spared)]
    size = sum(space.geometry.size_of(blocks[at][1]) for at in small)
    # One success, or a lack of free folios, explains the small pages otherwise.
    if made or any(not _has_free(space, order, size) for order in {blocks[at][1] for at in small}):
        return list(outcomes)
    return [
        replace(outcome, result=RESULT, reason=REASON) if at in set(small) else outcome
        for at, outcome in enumerate(outcomes)
    ]


def _has_free(space: AddressSpace, order: int, size: int) -> bool:
    free = abilities.free_memory(space)
    if free is None:
        return False
    geometry, bounds = space.geometry, [bound.left for bound in abilities.memory_bounds(space)]
    # A failed charge also makes the fault fall back to small pages (alloc_anon_folio(), mm/memory.c).
    return min([free.folios(order) * geometry.size_of(order), free.spare * geometry.page_size, *bounds]) > size
