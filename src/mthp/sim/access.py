"""What a program's reads and writes do: page faults, as handle_mm_fault() (mm/memory.c) resolves them.

A write to nothing allocates the largest folio that the switches, the mapping and the emptiness of the aligned block
allow (do_huge_pmd_anonymous_page, alloc_anon_folio); a read of nothing maps the zero page; a write to a page that
somebody else may see copies it. The huge zero page is not modelled: a read maps the small one.
"""

from __future__ import annotations

import enum

import numpy as np

from mthp.sim.faults import do_swap_page
from mthp.sim.memory import ZERO_CONTENT, Fl
from mthp.sim.mm import UFFD_MISSING, Mm, P, Pmd, SimVma
from mthp.sim.parts import Parts
from mthp.sim.zap import split_pmd, unmap_entries


class Fault(enum.Enum):
    """How an access ended."""

    DONE = "done"
    SIGSEGV = "SIGSEGV"
    """Nothing is mapped there, or a guard marker is."""
    SIGBUS = "SIGBUS"
    """The page is poisoned."""
    OOM = "OOM"
    """There is no memory, or the memory cgroup is at its limit."""
    USERFAULT = "userfaultfd"
    """The program's own handler is to resolve it; nothing was changed."""


def access(parts: Parts, mm: Mm, address: int, content: int | None) -> tuple[Fault, int]:
    """Read the page at `address`, or write `content` to it.

    Returns:
        How it ended, and what the page holds.
    """
    page = parts.geometry.page_size
    address = address // page * page
    vma = mm.find_vma(address)
    if vma is None or address < vma.start:
        return Fault.SIGSEGV, ZERO_CONTENT
    outcome = _Access(parts, mm, vma, address).make_present(write=content is not None)
    if outcome is not Fault.DONE:
        return outcome, ZERO_CONTENT
    ptes = mm.ptes(address, 1)
    if not ptes.pages()[0]:
        return Fault.DONE, ZERO_CONTENT
    pfn = int(ptes.value[0])
    if parts.memory.flags[pfn] & Fl.POISONED:
        return Fault.SIGBUS, ZERO_CONTENT
    ptes.bits[0] |= P.YOUNG
    if content is not None:
        ptes.bits[0] |= P.DIRTY
        parts.memory.content[pfn] = content
    return Fault.DONE, int(parts.memory.content[pfn])


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
        if bits & P.UFFD_MARKER or (write and bits & P.UFFD_WP and not bits & P.SWAP):
            return Fault.USERFAULT
        if bits == 0:
            if UFFD_MISSING in self.vma.flags:
                return Fault.USERFAULT
            self.vma.anon_vma |= write
            return self.allocate() if write else self.map_zero()
        if bits & P.SWAP:
            if not do_swap_page(self.parts, self.mm, self.vma, self.address):
                return Fault.OOM
            bits = self.ptes.bits[0]
            if write and bits & P.UFFD_WP:
                return Fault.USERFAULT
        if write and not bits & P.WRITE:
            return self.unshare()
        return Fault.DONE

    def map_zero(self) -> Fault:
        """Map the zero page."""
        self.ptes.bits[0] = P.PRESENT | P.ZERO | P.YOUNG
        self._have_table()
        return Fault.DONE

    def _have_table(self) -> None:
        if self.mm.pmd(self.address) is Pmd.NONE:
            self.mm.set_pmd(self.address, Pmd.TABLE)

    def allocate(self) -> Fault:
        """A new folio of the largest order that fits here and can be had (do_anonymous_page)."""
        parts = self.parts
        for order in self._orders():
            head = parts.memory.alloc(order)
            charged = head is not None and parts.memory.charge(head, self.mm.charge)
            if order:
                self._count(order, "alloc" if charged else "fallback")
            if charged:
                assert head is not None
                self._install(head, order)
                return Fault.DONE
            if head is not None:
                parts.memory.put(head)
        return Fault.OOM

    def _count(self, order: int, outcome: str) -> None:
        if order == self.parts.geometry.pmd_order:
            self.parts.counters.count(f"thp_fault_{outcome}")
        self.parts.counters.count_mthp(order, f"anon_fault_{outcome}")

    def _orders(self) -> list[int]:
        """Orders to be tried, the largest first, 0 last: enabled, aligned within the mapping, and all none there."""
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
            elif not self.vma.userfaultfd_armed and not self.mm.ptes(start, 1 << order).bits.any():
                fitting.append(order)
        return [*fitting, 0]

    def _install(self, head: int, order: int) -> None:
        parts, size = self.parts, 1 << order
        span = parts.geometry.size_of(order)
        ptes = self.mm.ptes(self.address // span * span, size)
        # A faulted page starts out referenced: the multi-generational LRU counts the fault itself.
        parts.memory.set(head, Fl.UPTODATE | Fl.REFERENCED)
        parts.rmap.add_new_anon(head, self.mm.id, swapbacked=not self.vma.droppable)
        parts.memory.refcount[head] = size
        parts.add_lru_vma(self.vma, head)
        ptes.bits[:] = P.PRESENT | P.YOUNG | P.DIRTY | P.WRITE
        ptes.value[:] = np.arange(head, head + size)
        self.mm.anon_pages += size
        self._have_table()
        if order == parts.geometry.pmd_order:
            self.mm.set_pmd(self.address, Pmd.HUGE)

    def unshare(self) -> Fault:
        """Make a present page writable: as it is if nobody else may see it, else as a copy (do_wp_page)."""
        parts, mm = self.parts, self.mm
        self.vma.anon_vma = True
        content = ZERO_CONTENT
        if self.ptes.pages()[0]:
            pfn = self.ptes.value[:1].astype(np.int64)
            head = parts.memory.head(int(pfn[0]))
            shared = parts.rmap.maybe_shared(pfn, np.array([head]))[0]
            if not shared and (not parts.memory.has(head, Fl.SWAPCACHE) or parts.swap.free_cache(head)):
                self.ptes.bits[0] |= P.WRITE
                return Fault.DONE
            split_pmd(parts, mm, self.address)
            content = int(parts.memory.content[int(pfn[0])])
        new = parts.memory.alloc(0)
        if new is None:
            return Fault.OOM
        if not parts.memory.charge(new, mm.charge):
            parts.memory.put(new)
            return Fault.OOM
        unmap_entries(parts, mm, self.ptes, np.flatnonzero(self.ptes.pages()))
        self._install(new, 0)
        parts.memory.content[new] = content
        return Fault.DONE
