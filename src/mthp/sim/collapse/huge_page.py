"""collapse_huge_page: the steps that turn the pages of a run into one folio, for any order.

The steps are alloc_charge, revalidate, swapin, revalidate again, isolate, copy, install. Their order is the kernel's
(mm/khugepaged.c), because the effects of a step remain visible when a later one fails: an allocated folio is counted
although it is freed again, pages that were read from swap stay, and pages that were isolated wait in the CPU's batch
with an extra reference.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray

from mthp.eligibility import Trigger
from mthp.engine.policy import Policy, Rules
from mthp.results import ScanResult
from mthp.sim.address_space.faults import do_swap_page
from mthp.sim.allocation.alloc import charge, take_folio
from mthp.sim.collapse.look import Look, isolate_look
from mthp.sim.collapse.single_pmd import RangeScan
from mthp.sim.frames.buddy import Frames
from mthp.sim.frames.memory import Fl
from mthp.sim.mm import Mm, P, Pmd, Ptes, SimVma
from mthp.sim.parts import CollapseStep, Parts
from mthp.sim.trace import Collapse, Isolate, Swapin


def collapse_huge_page(
    parts: Parts,
    mm: Mm,
    address: int,
    order: int,
    scan: RangeScan,
    policy: Policy,
    rules: Rules,
    node_load: NDArray[np.int64],
) -> ScanResult:
    """Try to collapse the run of 2**order pages at `address`.

    Args:
        scan: result of the scan of the PMD range.
        node_load: int64, shape (nodes,): pages of the PMD range on each node.
    """
    result = Attempt(parts, mm, address, order, scan, policy, rules).run(node_load)
    parts.trace.emit(Collapse(mm.id, order, result))
    return result


class Attempt:
    """One attempt at one run."""

    def __init__(
        self, parts: Parts, mm: Mm, address: int, order: int, scan: RangeScan, policy: Policy, rules: Rules
    ) -> None:
        self.parts = parts
        self.mm = mm
        self.address = address
        self.order = order
        self.scan = scan
        self.policy = policy
        self.rules = rules
        self.size = 1 << order
        self.pmd_order = parts.geometry.pmd_order
        self.pmd_address = address // parts.geometry.pmd_size * parts.geometry.pmd_size
        self.limits = policy.attempt_limits(order, rules)

    @property
    def ptes(self) -> Ptes:
        """The entries of the run."""
        return self.mm.ptes(self.address, self.size)

    def let_in(self, step: CollapseStep) -> None:
        """Let other actors run before a step."""
        self.parts.let_in(step, self.mm, self.address, self.order)

    def run(self, node_load: NDArray[np.int64]) -> ScanResult:
        """Make the attempt; a folio that is not installed is freed again."""
        self.let_in(CollapseStep.ALLOC_CHARGE)
        # Before mmap_lock is taken, because an allocation may compact and reclaim memory: so the mapping must be
        # checked again.
        folio = self.alloc_charge(node_load)
        if isinstance(folio, ScanResult):
            return folio
        result = self.fill(folio)
        if result is not ScanResult.SUCCEED:
            self.give_back(folio)
        return result

    def give_back(self, folio: int) -> None:
        """Free the folio that was taken for the run."""
        self.parts.memory.put(folio)
        self.parts.clock.spend("free_folio")

    def alloc_charge(self, node_load: NDArray[np.int64]) -> int | ScanResult:
        """Allocate a folio for the run, on a node with most pages of the PMD range; return it, or why not."""
        # Every node with as many pages as the best one (collapse_find_target_node()).
        loads = node_load.tolist()
        nodes = [node for node, load in enumerate(loads) if load == max(loads)]
        # MADV_COLLAPSE always may (GFP_TRANSHUGE in alloc_charge_folio()).
        may_wait = self.rules.forced or self.parts.tunables.defrag
        folio = take_folio(self.parts, self.order, nodes, may_wait=may_wait)
        outcome = "collapse_alloc_failed" if folio is None else "collapse_alloc"
        # Before the charge: a folio that a cgroup at its limit refuses has been counted as allocated.
        self.parts.count_order(self.order, f"thp_{outcome}", outcome)
        if folio is None:
            return ScanResult.ALLOC_HUGE_PAGE_FAIL
        if not charge(self.parts, folio, self.mm.charge, may_wait=may_wait):
            self.give_back(folio)
            return ScanResult.CGROUP_CHARGE_FAIL
        return folio

    def fill(self, folio: int) -> ScanResult:
        """Run all steps after the allocation."""
        self.let_in(CollapseStep.REVALIDATE)
        vma = self.revalidate()
        if isinstance(vma, ScanResult):
            return vma
        # The count is that of the PMD range, so a run without swap entries comes here, too.
        if self.scan.unmapped:
            self.let_in(CollapseStep.SWAPIN)
            result = self.swapin(vma)
            if result is not ScanResult.SUCCEED:
                return result
        # mmap_lock, held for reading, is released before it is taken for writing.
        self.let_in(CollapseStep.REVALIDATE_AGAIN)
        vma = self.revalidate()
        if isinstance(vma, ScanResult):
            return vma
        self.let_in(CollapseStep.ISOLATE)
        look = self.isolate(vma)
        if look.result is not ScanResult.SUCCEED:
            return look.result
        self.parts.clock.spend("collapse")
        self.parts.clock.spend("collapse_pte", len(look.pfns))
        self.let_in(CollapseStep.COPY)
        if not self.copy(folio, look):
            # copy_mc_user_highpage() found a poisoned page: the old pages are put back as they were.
            self.release(look)
            return ScanResult.COPY_MC
        self.let_in(CollapseStep.INSTALL)
        self.remove_old(vma, look)
        self.install(folio, vma)
        return ScanResult.SUCCEED

    def revalidate(self) -> SimVma | ScanResult:
        """Return the mapping if it and the PMD entry still allow the collapse (with check_pmd_state), or why not."""
        vma = revalidate(self.parts, self.mm, self.pmd_address, self.order, self.rules.trigger)
        if isinstance(vma, ScanResult):
            return vma
        pmd = self.mm.pmd(self.pmd_address)
        if pmd is Pmd.TABLE:
            return vma
        return ScanResult.PMD_MAPPED if pmd is Pmd.HUGE else ScanResult.NO_PTE_TABLE

    def swapin(self, vma: SimVma) -> ScanResult:
        """Read the run's swap entries (__collapse_huge_page_swapin)."""
        parts = self.parts
        result, swapped_in = ScanResult.SUCCEED, 0
        offsets = np.flatnonzero(_unmapped(self.ptes)).tolist()
        # Pages read back for a small run could make the next scan find a larger one full enough: creep.
        if self.order != self.pmd_order and len(offsets) > self.limits.swap:
            parts.counters.count_mthp(self.order, "collapse_exceed_swap_pte")
            result, offsets = ScanResult.EXCEED_SWAP_PTE, []
        for offset in offsets:
            if self.ptes.bits[offset] & P.PRESENT:
                continue  # Was read together with an earlier one.
            if not do_swap_page(parts, self.mm, vma, self.address + offset * parts.geometry.page_size):
                result = ScanResult.FAIL
                break
            swapped_in += 1
        # The batch holds a reference to each page that was read, and isolation would find one too many.
        if swapped_in and result is ScanResult.SUCCEED:
            parts.lru.drain()
        parts.trace.emit(Swapin(self.mm.id, self.order, result, swapped_in, self.scan.referenced))
        return result

    def isolate(self, vma: SimVma) -> Look:
        """Check every page of the run again, lock it and take it off the LRU lists, or undo that."""
        parts = self.parts
        # The program's handler must see every fault (userfaultfd_armed() in collapse_max_ptes_none()).
        limits = self.limits._replace(none=0) if vma.userfaultfd_armed else self.limits
        # A PMD collapse takes large folios apart, too; a smaller one would only replace a folio by one like it.
        large = None if self.order == self.pmd_order else self.order
        large_first = self.policy.large_before_shared
        forced = self.rules.forced
        look = isolate_look(parts, vma, self.ptes, limits, forced=forced, large=large, large_first=large_first)
        referenced = 0 if self.rules.forced else look.referenced
        if len(look.heads):
            small, large_heads = self._folios(look)
            heads = np.concatenate((small, large_heads)) if large_heads else small
            # All at once: what lies between locking and isolation shows nothing.
            parts.memory.flags[heads] |= Fl.LOCKED
            parts.lru.isolate(heads)
        self._count_exceeded(look.result)
        if look.result is ScanResult.SUCCEED and not self._writable(look):
            look = dataclasses.replace(look, result=ScanResult.PAGE_RO)
        elif look.result is ScanResult.SUCCEED and not referenced and not self.rules.forced:
            look = dataclasses.replace(look, result=ScanResult.LACK_REFERENCED_PAGE)
        if look.result is not ScanResult.SUCCEED and len(look.heads):
            self.release(look)
        parts.trace.emit(Isolate(self.order, look.result, look.none_or_zero, referenced))
        return look

    def _writable(self, look: Look) -> bool:
        """Return whether the run may be collapsed, considering whether any of its pages is writable."""
        if self.parts.kernel.wants_writable:
            return look.writable
        leaves = self.parts.kernel.leaves_empty_runs and self.policy.leaves_empty_runs and self.rules.forced
        return bool(len(look.offsets)) or not leaves

    def _count_exceeded(self, result: ScanResult) -> None:
        names = {ScanResult.EXCEED_NONE_PTE: ("none", "none"), ScanResult.EXCEED_SHARED_PTE: ("shared", "share")}
        if result in names:
            of_size, of_machine = names[result]
            names_of_both = f"thp_scan_exceed_{of_machine}_pte", f"collapse_exceed_{of_size}_pte"
            self.parts.count_order(self.order, *names_of_both)

    def release(self, look: Look) -> None:
        """Put back the isolated pages: small folios from the last to the first, then large ones (release_pte_pages)."""
        memory, lru = self.parts.memory, self.parts.lru
        small, large = self._folios(look)
        memory.flags[small] &= ~Fl.LOCKED
        lru.putback_small(small[::-1])
        for head in large:
            memory.clear(head, Fl.LOCKED)
            lru.putback(head)

    def _folios(self, look: Look) -> tuple[Frames, list[int]]:
        """Return the isolated folios: those of order 0, and the heads of large ones, each in order of address."""
        is_large = self.parts.memory.order[look.pfns] > 0
        return look.pfns[~is_large], list(dict.fromkeys(look.heads[is_large].tolist()))

    def copy(self, folio: int, look: Look) -> bool:
        """Copy the pages' contents; the rest of the folio is clear already. Return False at a poisoned page."""
        memory = self.parts.memory
        if (memory.flags[look.pfns] & Fl.POISONED).any():
            return False
        memory.content[folio + look.offsets] = memory.content[look.pfns]
        page = self.parts.geometry.page_size
        self.parts.clock.spend("copy_byte", len(look.pfns) * page)
        self.parts.clock.spend("zero_byte", (self.size - len(look.pfns)) * page)
        return True

    def remove_old(self, vma: SimVma, look: Look) -> None:
        """Unmap and release the old pages (__collapse_huge_page_copy_succeeded)."""
        memory, lru, rmap, swap = self.parts.memory, self.parts.lru, self.parts.rmap, self.parts.swap
        small, large = self._folios(look)
        # none entries and zero pages become memory of the process: the bloat.
        self.mm.anon_pages += self.size - len(look.pfns)
        memory.flags[small] &= ~Fl.LOCKED
        lru.putback_small(small)
        rmap.remove_small(small)
        # free_swap_cache() after each page's mapping is removed; it drops slots that no entry uses.
        in_cache = small[(memory.flags[small] & Fl.SWAPCACHE) != 0]
        for head in in_cache[memory.mapcount[in_cache] == 0].tolist():
            swap.free_cache(head)
        memory.put_small(small)
        is_large = memory.order[look.pfns] > 0
        batches = rmap.batches(look.offsets[is_large], look.pfns[is_large])
        # Before 6.17, so that each large folio counts as partially mapped for a moment.
        if self.parts.kernel.unmaps_one_by_one:
            batches = [(pfn, 1) for pfn in look.pfns[is_large].tolist()]
        for pfn, count in batches:
            head = memory.head(pfn)
            rmap.remove_large(pfn, count, self.mm.id)
            memory.put(head, count)
        for head in large:
            memory.clear(head, Fl.LOCKED)
            # The folio loses its mappings in a locked mapping (munlock_vma_folio() in folio_remove_rmap_ptes()).
            if vma.locked:
                memory.clear(head, Fl.MLOCKED)
            if not memory.mapcount[head : head + memory.size(head)].any():
                swap.free_cache(head)
            lru.putback(head)

    def install(self, folio: int, vma: SimVma) -> None:
        """Map the new folio (map_anon_folio_pmd_nopf, map_anon_folio_pte_nopf), with one reference per page."""
        parts, ptes = self.parts, self.ptes
        memory = parts.memory
        memory.set(folio, Fl.UPTODATE)
        parts.rmap.add_new_anon(folio, self.mm.id, swapbacked=not vma.droppable)
        # One from the allocation, and one for each further page (folio_ref_add() in map_anon_folio_pte_nopf()).
        memory.refcount[folio] = self.size
        parts.add_lru_vma(vma, folio)
        ptes.value[:] = np.arange(folio, folio + self.size)
        ptes.bits[:] = P.PRESENT | P.YOUNG
        # Writable at once, because no other address space has the folio.
        if vma.permits(write=True):
            ptes.bits[:] |= P.DIRTY | P.WRITE
        if self.order == self.pmd_order:
            # Dirty also where it may not be written, unlike PTEs.
            ptes.bits[:] |= P.DIRTY
            self.mm.set_pmd(self.address, Pmd.HUGE)


def revalidate(parts: Parts, mm: Mm, address: int, order: int, trigger: Trigger) -> SimVma | ScanResult:
    """Return the mapping of a PMD range if it allows a collapse to `order` (hugepage_vma_revalidate), or why not."""
    # collapse_test_exit_or_disable().
    if mm.exiting or mm.thp_disabled:
        return ScanResult.ANY_PROCESS
    vma = mm.find_vma(address)
    if vma is None:
        return ScanResult.VMA_NULL
    # Always the whole PMD range, so that the page table belongs to one mapping only.
    if not vma.covers(address, address + parts.geometry.pmd_size):
        return ScanResult.ADDRESS_RANGE
    return vma if order in parts.collapse_orders(mm, vma, trigger) else ScanResult.VMA_CHECK


def _unmapped(ptes: Ptes) -> NDArray[np.bool_]:
    """Return which entries are neither none nor present: bool, shape (pages,)."""
    mask: NDArray[np.bool_] = (ptes.bits != 0) & ((ptes.bits & P.PRESENT) == 0)
    return mask
