"""One look at adjoining page table entries: the first hindrance, and what was counted until then.

The scan of a PMD range and the isolation of a run go over the entries in the same manner: they count none, swapped
and shared entries against limits, and end at the first entry that hinders. They differ in the limits and in the
order in which they look at a page's folio. Both orders are here, as the checks of collapse_scan_pmd() and
__collapse_huge_page_isolate() (mm/khugepaged.c); the entries are looked at all at once, and the first one that
hinders is picked afterwards. Nothing is changed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mthp.engine.policy import Limits
from mthp.results import ScanResult
from mthp.sim.frames.buddy import Frames
from mthp.sim.frames.memory import Fl
from mthp.sim.mm import P, Ptes, SimVma
from mthp.sim.parts import Parts

_SUCCEED = np.int8(ScanResult.SUCCEED)
RECLAIM_DISTANCE = 30
"""Nodes farther apart do not help each other out (node_reclaim_distance, mm/page_alloc.c)."""

_REFERENCED = Fl.REFERENCED | Fl.YOUNG
_PLAIN = P.PRESENT | P.ZERO | P.SPECIAL | P.UFFD_WP


@dataclass(frozen=True, slots=True)
class Look:
    """What was seen.

    Attributes:
        result: SUCCEED, or the first hindrance.
        at: the number of the entry that hindered; that of all entries if none did.
        none_or_zero, unmapped: entries without a page, and swap entries or markers, up to and with that entry.
        referenced: pages before it that were used recently.
        writable: one of the pages up to and with that entry may be written, or the kernel does not ask.
        offsets: intp, shape (pages,): the entries before it that map a page other than the zero page.
        pfns, heads: int64, same shape: their frames, and the heads of the folios.
    """

    result: ScanResult
    at: int
    none_or_zero: int
    unmapped: int
    referenced: int
    writable: bool
    offsets: NDArray[np.intp]
    pfns: Frames
    heads: Frames


def scan_look(parts: Parts, vma: SimVma, ptes: Ptes, limits: Limits, *, forced: bool) -> Look:
    """Look at a PMD range as collapse_scan_pmd does.

    Args:
        limits: how many none, swap and shared entries may be there.
        forced: MADV_COLLAPSE asks, which minds neither lazyfree pages nor references.
    """
    look = _Looker(parts, ptes, limits)
    look.count_swap()
    if look.some_pages:
        look.folios()
        look.count_shared()
        look.page_itself(vma, forced=forced)
    return look.taken()


def isolate_look(
    parts: Parts,
    vma: SimVma,
    ptes: Ptes,
    limits: Limits,
    *,
    forced: bool,
    large: int | None = None,
    large_first: bool = False,
) -> Look:
    """Look at a run as __collapse_huge_page_isolate does.

    Args:
        limits: how many none and shared entries may be there; any swap entry hinders.
        forced: MADV_COLLAPSE asks.
        large: a page of a folio of this order or larger hinders.
        large_first: that is looked for before a shared page is counted.
    """
    if large is not None and _begins_with_large(parts, ptes, large):
        nothing = np.zeros(0, np.int64)
        return Look(ScanResult.PTE_MAPPED_HUGEPAGE, 0, 0, 0, 0, False, nothing.astype(np.intp), nothing, nothing)
    look = _Looker(parts, ptes, limits)
    look.no_swap()
    if look.some_pages:
        look.page(~look.folio_has(Fl.LRU), ScanResult.DEL_PAGE_LRU)
        look.page(look.expected_references != parts.memory.refcount[look.heads], ScanResult.PAGE_COUNT)
        look.page(look.folio_has(Fl.LOCKED), ScanResult.PAGE_LOCK)
        if large_first:
            look.count_shared()
        if large is not None:
            look.page(parts.memory.order[look.pfns] >= large, ScanResult.PTE_MAPPED_HUGEPAGE)
        if not large_first:
            look.count_shared()
        look.page_itself(vma, forced=forced)
    return look.taken()


def _begins_with_large(parts: Parts, ptes: Ptes, large: int) -> bool:
    """Whether the first entry already says that the run has a folio of this order or larger.

    Mostly it does where folios were made by an earlier scan. What is asked before that must not hinder: userfaultfd,
    lazyfree, a folio that others map.
    """
    bits, pfn = ptes.bits[0], int(ptes.value[0])
    if bits & _PLAIN != P.PRESENT or parts.memory.order[pfn] < large:
        return False
    head, refcount = parts.memory.head(pfn), parts.memory.refcount
    swapbacked = parts.memory.flags[head] & Fl.SWAPBACKED
    # The first tail frame counts the mappings, the second those of the first address space.
    return bool(swapbacked and refcount[head + 1] == refcount[head + 2])


def run_look(parts: Parts, vma: SimVma, ptes: Ptes, limits: Limits, *, forced: bool, large: int | None) -> Look:
    """Look at one run as is done where each run is scanned for itself.

    Args:
        forced: MADV_COLLAPSE asks.
        large: a page of a folio of this order or larger hinders.
    """
    look = _Looker(parts, ptes, limits)
    look.count_swap()
    if look.some_pages:
        look.folios()
        look.count_shared()
        if large is not None:
            look.page(parts.memory.order[look.pfns] >= large, ScanResult.PTE_MAPPED_HUGEPAGE)
        look.page_itself(vma, forced=forced)
    return look.taken()


class _Looker:
    """Notes for each entry the first check that it fails: later calls stand for earlier checks, and overwrite."""

    def __init__(self, parts: Parts, ptes: Ptes, limits: Limits) -> None:
        self._parts = parts
        self._ptes = ptes
        self._limits = limits
        self._found: NDArray[np.int8] = np.full(len(ptes.bits), _SUCCEED, np.int8)
        pages = ptes.pages()
        self._none = (ptes.bits == 0) | ((ptes.bits & P.ZERO) != 0)
        special = (ptes.bits & P.SPECIAL) != 0
        self._unmapped = ~(pages | self._none | special)
        self._offsets = np.flatnonzero(pages)
        self.some_pages = len(self._offsets) > 0
        self.pfns = ptes.value[self._offsets].astype(np.int64)
        self.heads = parts.memory.heads(self.pfns)
        self._folio_flags = parts.memory.flags[self.heads]
        self._found[self._over(self._none, limits.none)] = ScanResult.EXCEED_NONE_PTE
        self._found[special] = ScanResult.PAGE_NULL

    @staticmethod
    def _over(mask: NDArray[np.bool_], limit: int) -> NDArray[np.bool_]:
        """Which of the marked entries are more than `limit`, counted from the first."""
        if limit >= len(mask):
            return np.zeros_like(mask)
        over: NDArray[np.bool_] = mask & (np.cumsum(mask, dtype=np.int32) > limit)
        return over

    @property
    def expected_references(self) -> NDArray[np.int32]:
        """References of each page's folio that its mappings and the swap cache explain (folio_expected_ref_count)."""
        memory, rmap = self._parts.memory, self._parts.rmap
        sizes = np.left_shift(np.int32(1), memory.order[self.pfns].astype(np.int32))
        expected: NDArray[np.int32] = rmap.mapcounts(self.pfns, self.heads) + sizes * self.folio_has(Fl.SWAPCACHE)
        return expected

    def folio_has(self, flag: np.uint16) -> NDArray[np.bool_]:
        """Which pages' folios have a flag: bool, shape (pages,)."""
        mask: NDArray[np.bool_] = (self._folio_flags & flag) != 0
        return mask

    def page(self, mask: NDArray[np.bool_], result: ScanResult) -> None:
        """Note a hindrance of the pages that `mask` (shape (pages,)) marks."""
        self._found[self._offsets[mask]] = result

    def count_swap(self) -> None:
        """Swap entries: write-protected by userfaultfd, or, before that is asked, too many."""
        protected = self._unmapped & ((self._ptes.bits & P.UFFD_WP) != 0)
        self._found[protected] = ScanResult.PTE_UFFD
        self._found[self._over(self._unmapped, self._limits.swap)] = ScanResult.EXCEED_SWAP_PTE

    def no_swap(self) -> None:
        """Any entry that is neither none nor present hinders."""
        self._found[self._unmapped] = ScanResult.PTE_NON_PRESENT

    def folios(self) -> None:
        """What a scan asks of every page's folio."""
        self.page(self.expected_references != self._parts.memory.refcount[self.heads], ScanResult.PAGE_COUNT)
        self.page(self.folio_has(Fl.LOCKED), ScanResult.PAGE_LOCK)
        self.page(~self.folio_has(Fl.LRU), ScanResult.PAGE_LRU)
        self.far_nodes()

    def far_nodes(self) -> None:
        """A page too far from an earlier one, where nodes reclaim for themselves (hpage_collapse_scan_abort)."""
        memory = self._parts.memory
        if not self._parts.knobs.zone_reclaim_mode:
            return
        nodes, first = np.unique(memory.nodes_of(self.pfns), return_index=True)
        for at, node in sorted(zip(first.tolist(), nodes.tolist(), strict=True)):
            earlier = nodes[first < at]
            if (memory.distances[node, earlier] > RECLAIM_DISTANCE).any():
                self._found[self._offsets[at]] = ScanResult.SCAN_ABORT
                return

    def count_shared(self) -> None:
        """Pages that another address space maps too: too many."""
        shared = self._parts.rmap.maybe_shared(self.pfns, self.heads)
        self.page(self._over(shared, self._limits.shared), ScanResult.EXCEED_SHARED_PTE)

    def page_itself(self, vma: SimVma, *, forced: bool) -> None:
        """What is looked at before anything is counted: write-protected pages, pages of a driver, clean lazyfree."""
        bits = self._ptes.bits[self._offsets]
        if self._parts.kernel.lazyfree_stops and not forced and not vma.droppable:
            lazyfree = (self._folio_flags & (Fl.ANON | Fl.SWAPBACKED)) == Fl.ANON
            self.page(lazyfree & ((bits & P.DIRTY) == 0), ScanResult.PAGE_LAZYFREE)
        self.page(~self.folio_has(Fl.ANON), ScanResult.PAGE_ANON)
        self.page((bits & P.UFFD_WP) != 0, ScanResult.PTE_UFFD)

    def _writable(self, at: int) -> bool:
        """Whether one of the pages up to entry `at` may be written; True where the kernel does not ask."""
        if not self._parts.kernel.wants_writable:
            return True
        return bool((self._ptes.bits[self._offsets[self._offsets <= at]] & P.WRITE).any())

    def taken(self) -> Look:
        """The look as a whole."""
        hindered = self._found != _SUCCEED
        at = int(hindered.argmax())
        if not hindered[at]:
            at = len(hindered)
        result = ScanResult.SUCCEED if at == len(hindered) else ScanResult(int(self._found[at]))
        through = slice(0, at + 1)
        before = slice(0, int(self._offsets.searchsorted(at)))
        offsets = self._offsets[before]
        young = (self._ptes.bits[offsets] & P.YOUNG) != 0
        referenced = young | ((self._folio_flags[before] & _REFERENCED) != 0)
        return Look(
            result,
            at,
            int(np.count_nonzero(self._none[through])),
            int(np.count_nonzero(self._unmapped[through])),
            int(np.count_nonzero(referenced)),
            self._writable(at),
            offsets,
            self.pfns[before],
            self.heads[before],
        )
