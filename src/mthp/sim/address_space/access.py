"""Reads and writes of a program, with page faults resolved as by handle_mm_fault() (mm/memory.c).

A write to a none entry allocates the largest folio that fits. A read of a none entry maps the zero page, or the huge
one where a folio of the PMD order would fit. A write to a page that others may share copies it.
"""

from __future__ import annotations

import enum

import numpy as np

from mthp.sim.address_space.faults import do_swap_page
from mthp.sim.allocation.alloc import new_folio
from mthp.sim.frames.memory import ZERO_CONTENT, Fl
from mthp.sim.mm import HUGEPAGE, UFFD_MISSING, Mm, P, Pmd, SimVma
from mthp.sim.page_tables.zap import munlock_folio, split_pmd, unmap_entries
from mthp.sim.parts import Parts


class Fault(enum.Enum):
    """How an access ended."""

    DONE = "done"
    SIGSEGV = "SIGSEGV"
    """The address is not mapped, or has a guard marker."""
    SIGBUS = "SIGBUS"
    """The page is poisoned."""
    OOM = "OOM"
    """Memory ran out, or the memory cgroup is at its limit."""
    USERFAULT = "userfaultfd"
    """The program's own userfaultfd handler must resolve it; nothing was changed."""


def access(parts: Parts, mm: Mm, address: int, content: int | None) -> tuple[Fault, int]:
    """Read the page at `address`, or write `content` to it.

    Returns:
        How it ended, and the content of the page.
    """
    page = parts.geometry.page_size
    address = address // page * page
    vma = mm.find_vma(address)
    if vma is None or address < vma.start or not vma.permits(write=content is not None):
        return Fault.SIGSEGV, ZERO_CONTENT
    outcome = make_present(parts, mm, vma, address, write=content is not None)
    if outcome is not Fault.DONE:
        return outcome, ZERO_CONTENT
    ptes = mm.ptes(address, 1)
    if not ptes.pages()[0]:
        return Fault.DONE, ZERO_CONTENT
    pfn = int(ptes.value[0])
    if parts.memory.flags[pfn] & Fl.POISONED:
        return Fault.SIGBUS, ZERO_CONTENT
    # A PMD entry has one young bit and one dirty bit for all its pages.
    mm.entry(address).bits[:] |= P.YOUNG if content is None else P.YOUNG | P.DIRTY
    if content is not None:
        parts.memory.content[pfn] = content
    return Fault.DONE, int(parts.memory.content[pfn])


def make_present(parts: Parts, mm: Mm, vma: SimVma, address: int, *, write: bool) -> Fault:
    """Resolve the faults of one access to the page at `address`, which `vma` covers and permits."""
    return _Access(parts, mm, vma, address).make_present(write=write)


class _Access:
    """One access to one page."""

    def __init__(self, parts: Parts, mm: Mm, vma: SimVma, address: int) -> None:
        self.parts = parts
        self.mm = mm
        self.vma = vma
        self.address = address
        self.ptes = mm.ptes(address, 1)

    def make_present(self, *, write: bool) -> Fault:
        """Resolve the faults of the access, one after another."""
        bits = self.ptes.bits[0]
        if bits & P.GUARD:
            return Fault.SIGSEGV
        if bits & P.UFFD_MARKER or (write and bits & P.UFFD_WP and bits & P.PRESENT):
            return Fault.USERFAULT
        if bits & P.PRESENT and (not write or bits & P.WRITE):
            return Fault.DONE
        # Before anything is counted: a fault that userfaultfd takes is repeated once it is resolved.
        if bits == 0 and UFFD_MISSING in self.vma.flags:
            return Fault.USERFAULT
        self.parts.counters.count("pgfault")
        self.parts.clock.spend("fault")
        if bits == 0:
            return self.allocate(write=write)
        if bits & (P.SWAP | P.MIGRATION):
            if not do_swap_page(self.parts, self.mm, self.vma, self.address):
                return Fault.OOM
            bits = self.ptes.bits[0]
            # Read from swap with its protection (pte_swp_uffd_wp()): the write faults once more.
            if write and bits & P.UFFD_WP:
                return Fault.USERFAULT
        if write and not bits & P.WRITE:
            return self.unshare()
        return Fault.DONE

    def allocate(self, *, write: bool) -> Fault:
        """Map a new folio, or the zero page, at a none entry.

        The folio has the largest order that fits and can be allocated. Follows do_huge_pmd_anonymous_page() and
        do_anonymous_page(). A read gets a folio of the PMD order only if the huge zero page is switched off.
        """
        if write:
            self.parts.anon_vma_prepare(self.mm, self.vma)
        for order in self.orders():
            huge = order == self.parts.geometry.pmd_order
            if huge:
                self.parts.anon_vma_prepare(self.mm, self.vma)
            # Without the huge zero page a read gets a real folio of the PMD order, and no smaller one.
            if not write and huge and self.parts.knobs.use_zero_page:
                self.map_huge_zero()
                return Fault.DONE
            if not write and not huge:
                self.map_zero()
                return Fault.DONE
            head = self.new_folio(order)
            if head is not None:
                self._install(head, order)
                return Fault.DONE
        return Fault.OOM

    def map_zero(self) -> None:
        """Map the zero page."""
        self.ptes.bits[0] = P.PRESENT | P.ZERO | P.YOUNG
        self.mm.have_table(self.address)

    def map_huge_zero(self) -> None:
        """Map the huge zero page; the first mapping allocates it (mm_get_huge_zero_folio)."""
        if not self.parts.counters["thp_zero_page_alloc"]:
            self.parts.counters.count("thp_zero_page_alloc")
        self.mm.set_pmd(self.address, Pmd.HUGE)
        self.mm.entry(self.address).bits[:] = P.PRESENT | P.ZERO | P.YOUNG

    def new_folio(self, order: int) -> int | None:
        """Allocate and count a folio for this fault; return its head, or None."""
        # A base page is always worth waiting for; a large folio only where `defrag` says so.
        may_wait = not order or self.parts.knobs.fault_may_wait(advised=HUGEPAGE in self.vma.flags)
        head = new_folio(self.parts, order, self.mm.charge, may_wait=may_wait)
        if order:
            self._count(order, "fallback" if head is None else "alloc")
        return head

    def _count(self, order: int, outcome: str) -> None:
        if order == self.parts.geometry.pmd_order:
            self.parts.counters.count(f"thp_fault_{outcome}")
        self.parts.counters.count_mthp(order, f"anon_fault_{outcome}")

    def orders(self) -> list[int]:
        """Return the orders to try, the largest first, 0 last: enabled, fitting the mapping, all entries none."""
        geometry = self.parts.geometry
        fitting = []
        for order in reversed(self.parts.fault_orders(self.mm, self.vma)):
            size = geometry.size_of(order)
            start = self.address // size * size
            if not self.vma.covers(start, start + size):
                continue
            if order == geometry.pmd_order:
                if self.mm.pmd(self.address) is Pmd.NONE:
                    fitting.append(order)
            # userfaultfd wants a fault for each page (alloc_anon_folio(), mm/memory.c); and a folio replaces no entry.
            elif not self.vma.userfaultfd_armed and not self.mm.ptes(start, 1 << order).bits.any():
                fitting.append(order)
        return [*fitting, 0]

    def _install(self, head: int, order: int) -> None:
        parts, size = self.parts, 1 << order
        span = parts.geometry.size_of(order)
        ptes = self.mm.ptes(self.address // span * span, size)
        # A faulted page starts as referenced: the multi-generational LRU counts the fault itself.
        parts.memory.set(head, Fl.UPTODATE | Fl.REFERENCED)
        parts.rmap.add_new_anon(head, self.mm.id, swapbacked=not self.vma.droppable)
        parts.memory.refcount[head] = size
        parts.add_lru_vma(self.vma, head)
        ptes.bits[:] = P.PRESENT | P.YOUNG | P.DIRTY | P.WRITE
        ptes.value[:] = np.arange(head, head + size)
        self.mm.anon_pages += size
        self.mm.have_table(self.address)
        if order == parts.geometry.pmd_order:
            self.mm.set_pmd(self.address, Pmd.HUGE)

    def unshare(self) -> Fault:
        """Make a present page writable: in place if it is not shared, else as a copy (do_wp_page)."""
        parts, mm = self.parts, self.mm
        parts.anon_vma_prepare(mm, self.vma)
        if not self.ptes.pages()[0]:
            return self.replace_zero()
        pfn = self.ptes.value[:1].astype(np.int64)
        head = parts.memory.head(int(pfn[0]))
        # Older kernels guess from the first page whether a large folio is shared, but not for a write.
        shared = parts.rmap.maybe_shared(pfn, np.array([head]))[0] or parts.memory.mapcount[pfn[0]] > 1
        # Entries that refer to the slot could bring another process to this very page (wp_can_reuse_anon_folio()).
        if not shared and (not parts.memory.has(head, Fl.SWAPCACHE) or parts.swap.free_cache(head)):
            mm.entry(self.address).bits[:] |= P.WRITE
            return Fault.DONE
        # Only the one page is copied, so a PMD entry is split first (do_huge_pmd_wp_page(), mm/huge_memory.c).
        split_pmd(parts, mm, self.address)
        # Held, so that reclaim does not move or free it.
        parts.memory.refcount[head] += 1
        new = new_folio(parts, 0, mm.charge, may_wait=True)
        if new is not None:
            parts.memory.content[new] = parts.memory.content[int(pfn[0])]
            parts.clock.spend("copy_byte", parts.geometry.page_size)
            unmap_entries(parts, mm, self.ptes, np.array([0]))
            if self.vma.locked:
                munlock_folio(parts, head)
            self._install(new, 0)
        parts.memory.put(head)
        return Fault.OOM if new is None else Fault.DONE

    def replace_zero(self) -> Fault:
        """Write to the zero page; a huge one is replaced as a whole if possible (do_huge_zero_wp_pmd)."""
        pmd_order = self.parts.geometry.pmd_order
        if self.mm.pmd(self.address) is Pmd.HUGE:
            head = self.new_folio(pmd_order) if pmd_order in self.parts.fault_orders(self.mm, self.vma) else None
            if head is not None:
                self._install(head, pmd_order)
                return Fault.DONE
            split_pmd(self.parts, self.mm, self.address)
        head = self.new_folio(0)
        if head is None:
            return Fault.OOM
        self._install(head, 0)
        return Fault.DONE
