"""The state of a golden case, built from the frames up, and observed.

A *stage* is a machine with one mapping of one PMD range, and a child process that shares some of its pages. The events
that led a kernel to a state (a fault, a fork, MADV_FREE, a pin) are not repeated: pages get the flags and references
that those events leave.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mthp.engine.policy import Policy
from mthp.sim.address_space.mremap import Remap
from mthp.sim.frames.buddy import Frames
from mthp.sim.frames.memory import Fl
from mthp.sim.golden.cases import LARGE, NO_PAGE, SMALL, SWAPPED, Case, Runs
from mthp.sim.golden.passcalls import Call
from mthp.sim.kernel import Kernel
from mthp.sim.machine import Machine
from mthp.sim.mm import DROPPABLE, HUGEPAGE, LOCKED, NOHUGEPAGE, UFFD_MISSING, UFFD_WP, Mm, P, Pmd, Ptes
from mthp.sim.page_tables.split import split_huge_pages
from mthp.tunables import Switches

_VMA_WORDS = {
    "uffd_wp_registered": UFFD_WP,
    "uffd_missing_registered": UFFD_MISSING,
    "mlocked": LOCKED,
    "droppable": DROPPABLE,
}

_CLEAN, _DIRTY = P.PRESENT, P.PRESENT | P.DIRTY
_ENTRIES = {
    "none": np.uint16(0),
    "zero": P.PRESENT | P.ZERO | P.YOUNG,
    "uffd_zero": P.PRESENT | P.ZERO | P.YOUNG | P.UFFD_WP,
    "guard": P.GUARD,
    "uffd_marker": P.UFFD_MARKER | P.UFFD_WP,
    "swap": P.SWAP,
    "swap_shared": P.SWAP,
    "uffd_swap": P.SWAP | P.UFFD_WP,
    "anon": _DIRTY,
    "shared": _DIRTY,
    "swapcache": _CLEAN,
    "swapped_back": _CLEAN,
    "cold": _DIRTY,
    "lazyfree": _CLEAN,
    "lazyfree_dirty": _DIRTY,
    "mlocked": _DIRTY,
    "pinned": _DIRTY,
    "uffdwp": _DIRTY | P.UFFD_WP,
    "large": _DIRTY,
    "large_shared": _DIRTY,
}
"""Bits of an entry, by its kind. PTEs are old, because the case's references are those of the folio."""

_CHILD_HAS = ("shared", "large_shared", "swap_shared")
_REWRITTEN = ("anon", "cold", "lazyfree", "lazyfree_dirty", "mlocked", "pinned", "swapped_back")
"""Kinds that the recorder wrote to again after its fork, so that they are writable again (tests/vm/recorder.c)."""

_WRITTEN = ("anon", "cold", "lazyfree_dirty", "mlocked", "pinned", "large", "swap")
"""Kinds that a process can write if it never forked: a swapped page is then its own, and is read for writing."""
_NEVER_WRITTEN = {"none", "zero", "uffd_zero", "uffd_marker"}
"""Kinds that a mapping without an anon_vma can hold."""

_ZERO_FRAME = -1
"""Frame number for the zero page."""

_AWAY = 8
"""PMD ranges between a page and the address that it is moved to."""

_FOLIO_FLAGS = {"r": Fl.REFERENCED, "m": Fl.MLOCKED}


@dataclass(frozen=True)
class Observation:
    """The PMD range as pagemap and kpageflags show it.

    Attributes:
        orders: per entry the order of the folio, or a word.
        frames: int64, shape (pages,): frame of a mapped page, else 0; the zero page has a number of its own.
        flags: per entry the letters of its state, sorted.
        swap: [first entry, slot, count] of adjoining entries with adjoining slots.
        pmd_mapped: whether one PMD entry maps the range.
        rss_kb: its Rss in smaps, in KiB, without the zero page.
    """

    orders: list[int | str]
    frames: Frames
    flags: list[str]
    swap: Runs
    pmd_mapped: bool
    rss_kb: int


class Stage:
    """A machine in the state of a case.

    Args:
        policy: policy of the simulated kernel.
        kernel: its other rules.
        doubtful_writable: make entries writable if it is not recorded whether they were. By default only those entries
            are writable that the recorder's way of staging made writable.
    """

    def __init__(self, case: Case, policy: str | Policy, kernel: Kernel, *, doubtful_writable: bool = False) -> None:
        geometry = case.geometry
        self.n = geometry.ptes_per_pmd
        self._case = case
        self._doubtful_writable = doubtful_writable
        self.machine = Machine(
            geometry,
            # Room for the case, its child, what it moves away, and a few collapses.
            node_frames=[24 << max(geometry.pmd_order, 10)],
            swap_slots=int(case.slots.max()),
            # Only the mapping of the case is advised, so that khugepaged leaves the child alone.
            switches=Switches("madvise", dict.fromkeys(case.orders, "madvise")),
            policy=policy,
            kernel=kernel,
            tunables=case.tunables,
        )
        self.start = geometry.pmd_size
        self.mm = self._space({HUGEPAGE} | {_VMA_WORDS[word] for word in case.vma})
        self.child = self._space({NOHUGEPAGE})
        # Every page has a content of its own, so that a page in the wrong place shows.
        self._contents = np.where(self._are(*NO_PAGE), 0, np.arange(1, self.n + 1))
        self._child_has = self._are(*_CHILD_HAS) | case.seen("s")
        self._held = [(self.child, np.where(self._child_has, self._contents, 0), "the child's page")]
        self._calls = iter(case.calls)
        self._build()
        self.machine.trace.enabled = True

    def _space(self, flags: set[str]) -> Mm:
        mm = self.machine.create_mm()
        # A mapping that was only read has no anon_vma, and is not collapsed.
        written = not _NEVER_WRITTEN.issuperset(kind for kind, _ in self._case.kinds)
        self.machine.map(mm, self.start, self.start + self.machine.geometry.pmd_size, flags=flags, anon_vma=written)
        return mm

    def _ptes(self, mm: Mm) -> Ptes:
        return mm.ptes(self.start, self.n)

    def _are(self, *kinds: str) -> NDArray[np.bool_]:
        """Return which entries are of one of these kinds: bool, shape (pages,)."""
        return self._case.are(kinds)

    # Building.

    def _build(self) -> None:
        ptes = self._ptes(self.mm)
        kinds, counts = zip(*self._case.kinds, strict=True)
        ptes.bits[:] = np.repeat([_ENTRIES[kind] for kind in kinds], counts)
        ptes.bits[self._writable()] |= P.WRITE
        self._build_swapped(ptes, np.flatnonzero(self._are(*SWAPPED)))
        small = np.flatnonzero(self._are(*SMALL))
        if len(small):
            self._build_small(ptes, small)
        large, orders = np.flatnonzero(self._are(*LARGE)), self._case.folio_orders
        # A folio may be mapped in part only: its aligned block and order identify it.
        blocks = {(int(order), int(i >> order)) for i, order in zip(large, orders[large], strict=True)}
        for order, block in sorted(blocks):
            self._build_large(ptes, order, block << order)
        self._share(ptes, np.flatnonzero(self._child_has))
        for mm in (self.mm, self.child):
            if self._ptes(mm).bits.any():
                mm.set_pmd(self.start, Pmd.TABLE)
        # Last, because pinning is an access: it needs the entries in place.
        for i in np.flatnonzero(self._are("pinned")).tolist():
            self.machine.pin(self.mm, self.start + i * self.machine.geometry.page_size)

    def _writable(self) -> NDArray[np.bool_]:
        """Return which entries are writable, or, if swapped out, become so once read: bool, shape (pages,)."""
        alone = ~self._child_has & self._are(*SMALL, *LARGE, "swap") & ~self._are("uffdwp")
        if self._doubtful_writable:
            return alone
        return alone & self._are(*(_WRITTEN if self._case.setup == "no_fork" else _REWRITTEN))

    def _build_swapped(self, ptes: Ptes, offsets: NDArray[np.intp]) -> None:
        swap = self.machine.parts.swap
        for i in offsets.tolist():
            swap.take(int(self._case.slots[i]), i + 1)
        ptes.value[offsets] = self._case.slots[offsets]
        self.mm.swap_entries += len(offsets)

    def _build_small(self, ptes: Ptes, offsets: NDArray[np.intp]) -> None:
        memory = self.machine.parts.memory
        pfns = memory.alloc_small(len(offsets))
        self.machine.parts.rmap.add_new_anon_small(pfns, swapbacked=True)
        memory.content[pfns] = offsets + 1
        memory.flags[pfns] |= Fl.UPTODATE | Fl.LRU
        for letter, flag in _FOLIO_FLAGS.items():
            memory.flags[pfns[self._case.seen(letter)[offsets]]] |= flag
        memory.flags[pfns[self._case.seen("l")[offsets]]] &= ~Fl.SWAPBACKED
        ptes.value[offsets] = pfns
        self.mm.anon_pages += len(pfns)
        for i in np.flatnonzero(self._are("swapcache")).tolist():
            self.machine.parts.swap.add_to_cache(int(ptes.value[i]), int(self._case.slots[i]))

    def _build_large(self, ptes: Ptes, order: int, first: int) -> None:
        """Build a folio that was mapped throughout, then unmapped where the case has something else."""
        memory, rmap = self.machine.parts.memory, self.machine.parts.rmap
        size = 1 << order
        head = memory.alloc(order)
        assert head is not None, "a stage has room for every case"
        rmap.add_new_anon(head, self.mm.id, swapbacked=True)
        memory.refcount[head] = size
        memory.content[head : head + size] = np.arange(first + 1, first + 1 + size)
        block = slice(first, first + size)
        mapped = self._case.folio_orders[block] == order
        offsets = np.flatnonzero(mapped)
        memory.set(head, Fl.UPTODATE | Fl.LRU)
        seen = {letter: self._case.seen(letter)[first + offsets] for letter in "lmr"}
        for letter, flag in _FOLIO_FLAGS.items():
            if seen[letter].all():
                memory.set(head, flag)
        if seen["l"].any():
            memory.clear(head, Fl.SWAPBACKED)
        if not seen["r"].all():
            # A reference of only some pages is in their PTEs.
            ptes.bits[first + offsets[seen["r"]]] |= P.YOUNG
        ptes.value[first + offsets] = head + offsets
        # One by one, as a fault or an unmap does it: so the folio is on the deferred split list.
        for i in np.flatnonzero(~mapped).tolist():
            rmap.remove_large(head + i, 1, self.mm.id)
            memory.put(head)
        self.mm.anon_pages += len(offsets)

    def _share(self, ptes: Ptes, offsets: NDArray[np.intp]) -> None:
        """Share the pages at `offsets` with the child."""
        parts, child = self.machine.parts, self._ptes(self.child)
        child.bits[offsets] = ptes.bits[offsets]
        child.value[offsets] = ptes.value[offsets]
        swapped = (ptes.bits[offsets] & P.SWAP) != 0
        parts.swap.count[ptes.value[offsets[swapped]]] += 1
        pfns = ptes.value[offsets[~swapped]].astype(np.int64)
        parts.rmap.add(pfns, self.child.id)
        # Not `+=`, which would count several pages of one folio once.
        np.add.at(parts.memory.refcount, parts.memory.heads(pfns), 1)
        self.child.swap_entries += int(swapped.sum())
        self.child.anon_pages += len(pfns)

    # Running, and observing.

    def run_pass(self) -> int | None:
        """Run a full scan of khugepaged, or one call; return the errno of a call."""
        if self._case.calls:
            return self._make(next(self._calls))
        if self._case.forced:
            return self.machine.madvise_collapse(self.mm, self.start, self.start + self.machine.geometry.pmd_size)
        self.machine.khugepaged.full_scan()
        return None

    def _make(self, call: Call) -> int:
        """Make a call, and update the expected contents."""
        machine, mm, page = self.machine, self.mm, self.machine.geometry.page_size
        start, end = self.start + call.first * page, self.start + call.pages.stop * page
        if call.name in ("split", "split_at"):
            words = f"{mm.id},{start:#x},{end:#x},{call.order}" + (f",{call.at}" if call.name == "split_at" else "")
            return split_huge_pages(machine.parts, words)
        if call.name == "collapse":
            return machine.madvise_collapse(mm, self.start, self.start + machine.geometry.pmd_size)
        if call.name == "mlock":
            return machine.mlock(mm, self.start, self.start + machine.geometry.pmd_size)
        if call.name == "cold":
            return machine.madvise(mm, start, end, "COLD")
        if call.name == "fork":
            self._held.append((machine.fork(mm), self._contents.copy(), "the forked child's page"))
        elif call.name == "pin":
            for address in range(start, end, page):
                machine.pin(mm, address)
        elif call.name in ("fill", "zero"):
            self._contents[call.pages] = np.arange(1, self.n + 1)[call.pages] if call.name == "fill" else 0
            machine.touch(mm, np.arange(start, end, page), contents=self._contents[call.pages])
        elif call.name == "dontneed":
            if error := machine.madvise(mm, start, end, "DONTNEED"):
                return error
            self._contents[call.pages] = 0
        elif call.name == "move":
            how, to = Remap.MAYMOVE | Remap.FIXED | Remap.DONTUNMAP, start + _AWAY * machine.geometry.pmd_size
            assert machine.mremap(mm, start, end, end - start, how, to) == to, "there is room"
            self._contents[call.pages] = 0
        return 0

    @property
    def release(self) -> tuple[int, int]:
        """Release of the case's kernel."""
        return self._case.release

    def known_entries(self) -> int | None:
        """Return the number of entries before a run that was read beyond the page table; None if none was."""
        beyond = self.machine.parts.beyond_table
        return None if beyond is None else (beyond - self.start) // self.machine.geometry.page_size

    def observe(self) -> Observation:
        """Return what pagemap and kpageflags show now."""
        memory, ptes = self.machine.parts.memory, self._ptes(self.mm)
        frames = np.where(ptes.pages(), ptes.value, 0).astype(np.int64)
        orders: list[int | str] = memory.order[frames].tolist()
        words = {"zero": P.ZERO, "swap": P.SWAP, "guard": P.GUARD, "marker": P.UFFD_MARKER}
        for word, bit in words.items():
            for i in np.flatnonzero(ptes.bits & bit).tolist():
                orders[i] = word
        for i in np.flatnonzero(ptes.bits == 0).tolist():
            orders[i] = "none"
        huge = self.mm.pmd(self.start) is Pmd.HUGE
        rss_kb = int(ptes.pages().sum()) * self.machine.geometry.page_size >> 10
        shown = np.where(ptes.bits & P.ZERO, _ZERO_FRAME, frames)
        return Observation(orders, shown, self._letters(ptes, frames), _swapped(ptes), huge, rss_kb)

    def _letters(self, ptes: Ptes, frames: Frames) -> list[str]:
        memory = self.machine.parts.memory
        flags = memory.flags[memory.heads(frames)]
        pages = ptes.pages()
        planes = {
            "c": pages & ((flags & Fl.SWAPCACHE) != 0),
            "l": pages & ((flags & (Fl.ANON | Fl.SWAPBACKED)) == Fl.ANON),
            "m": pages & ((flags & Fl.MLOCKED) != 0),
            # As /proc/kpagecount shows it, page by page.
            "s": pages & (memory.mapcount[frames] > 1),
            "w": (ptes.bits & P.UFFD_WP) != 0,
        }
        letters = [""] * self.n
        for letter, plane in planes.items():
            for i in np.flatnonzero(plane).tolist():
                letters[i] += letter
        return letters

    def contents(self) -> str:
        """Return ``intact``, or a message about the first page, of the child too, that lost its contents."""
        parts = self.machine.parts
        for mm, wanted, name in ((self.mm, self._contents, "page"), *self._held):
            ptes = self._ptes(mm)
            held = np.where(ptes.pages(), parts.memory.content[np.where(ptes.pages(), ptes.value, 0)], 0)
            swapped = (ptes.bits & P.SWAP) != 0
            held[swapped] = parts.swap.content[ptes.value[swapped]]
            wrong = np.flatnonzero(held != wanted)
            if len(wrong):
                return f"{name} {wrong[0]} holds the contents of page {int(held[wrong[0]]) - 1}"
        return "intact"


def _swapped(ptes: Ptes) -> Runs:
    """Return [first entry, slot, count] of adjoining swap entries with adjoining slots."""
    offsets = np.flatnonzero(ptes.bits & P.SWAP)
    slots = ptes.value[offsets].astype(np.int64)
    starts = np.flatnonzero(np.diff(offsets, prepend=-2) + np.abs(np.diff(slots, prepend=-2) - 1) != 1)
    counts = np.diff(np.append(starts, len(offsets)))
    return [list(run) for run in zip(offsets[starts].tolist(), slots[starts].tolist(), counts.tolist(), strict=True)]
