"""One scan of page table entries: the first failing entry, and counts up to it.

The scan of a PMD range and the isolation of a run go over the entries in the same manner: they count none, swap and
shared entries against limits, and end at the first entry that fails a check. They differ in the limits and in the order
of the checks of a page's folio. All entries are checked at once, and the first failing one is picked afterwards.
Nothing is changed.
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
"""Pages on nodes farther apart than this are not collapsed together (node_reclaim_distance, mm/page_alloc.c)."""

_REFERENCED = Fl.REFERENCED | Fl.YOUNG
_PLAIN = P.PRESENT | P.ZERO | P.SPECIAL | P.UFFD_WP


@dataclass(frozen=True, slots=True)
class Look:
    """Result of a scan.

    Attributes:
        result: SUCCEED, or the result of the first entry that fails a check.
        at: the number of that entry; the number of entries if none fails.
        none_or_zero, unmapped: none entries and zero pages, and swap entries or markers, up to and with that entry.
        referenced: pages before it that were used recently.
        writable: whether a page up to and with that entry is writable, or the kernel does not check.
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
    """Scan a PMD range as collapse_scan_pmd does.

    Args:
        limits: none, swap and shared entries allowed.
        forced: scan for MADV_COLLAPSE, which ignores lazyfree and references.
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
    """Scan a run as __collapse_huge_page_isolate does.

    Args:
        limits: none and shared entries allowed; swap entries are not.
        forced: scan for MADV_COLLAPSE.
        large: fail at a page of a folio of this order or larger.
        large_first: whether the check for `large` comes before the count of shared pages.
    """
    # One comparison instead of all checks of all entries, for the most frequent outcome.
    if large is not None and _begins_with_large(parts, ptes, large):
        nothing = np.zeros(0, np.int64)
        return Look(ScanResult.PTE_MAPPED_HUGEPAGE, 0, 0, 0, 0, False, nothing.astype(np.intp), nothing, nothing)
    look = _Looker(parts, ptes, limits)
    look.no_swap()
    if look.some_pages:
        # The reverse of the kernel's order (__collapse_huge_page_isolate()), because later calls overwrite: there a
        # page is checked for lazyfree, then counted as shared, and only last taken off its list.
        look.page(~look.folio_has(Fl.LRU), ScanResult.DEL_PAGE_LRU)
        look.page(look.expected_references != parts.memory.refcount[look.heads], ScanResult.PAGE_COUNT)
        look.page(look.folio_has(Fl.LOCKED), ScanResult.PAGE_LOCK)
        # Noted first, and so overwritten: Dev Jain's series and the seed look for a large folio before they count
        # shared pages.
        if large_first:
            look.count_shared()
        if large is not None:
            look.page(parts.memory.order[look.pfns] >= large, ScanResult.PTE_MAPPED_HUGEPAGE)
        if not large_first:
            look.count_shared()
        look.page_itself(vma, forced=forced)
    return look.taken()


def _begins_with_large(parts: Parts, ptes: Ptes, large: int) -> bool:
    """Return whether the run begins with a folio of this order or larger.

    It mostly does where an earlier scan made folios. The checks before that one must pass: userfaultfd, lazyfree,
    shared folios.
    """
    bits, pfn = ptes.bits[0], int(ptes.value[0])
    if bits & _PLAIN != P.PRESENT or parts.memory.order[pfn] < large:
        return False
    head, refcount = parts.memory.head(pfn), parts.memory.refcount
    swapbacked = parts.memory.flags[head] & Fl.SWAPBACKED
    # The first tail frame counts the mappings, the second those of the first address space.
    return bool(swapbacked and refcount[head + 1] == refcount[head + 2])


def run_look(parts: Parts, vma: SimVma, ptes: Ptes, limits: Limits, *, forced: bool, large: int | None) -> Look:
    """Scan one run on its own, for policies that scan each run.

    Args:
        forced: scan for MADV_COLLAPSE.
        large: fail at a page of a folio of this order or larger.
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
    """Notes the first check that each entry fails: later calls are for earlier checks, and overwrite."""

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
        # A none entry has no page to check, so nothing overwrites this.
        self._found[self._over(self._none, limits.none)] = ScanResult.EXCEED_NONE_PTE
        self._found[special] = ScanResult.PAGE_NULL

    @staticmethod
    def _over(mask: NDArray[np.bool_], limit: int) -> NDArray[np.bool_]:
        """Return the marked entries beyond the first `limit`: bool, shape of `mask`."""
        if limit >= len(mask):
            return np.zeros_like(mask)
        over: NDArray[np.bool_] = mask & (np.cumsum(mask, dtype=np.int32) > limit)
        return over

    @property
    def expected_references(self) -> NDArray[np.int32]:
        """References to each page's folio that its mappings and the swap cache explain (folio_expected_ref_count)."""
        memory, rmap = self._parts.memory, self._parts.rmap
        sizes = np.left_shift(np.int32(1), memory.order[self.pfns].astype(np.int32))
        expected: NDArray[np.int32] = rmap.mapcounts(self.pfns, self.heads) + sizes * self.folio_has(Fl.SWAPCACHE)
        return expected

    def folio_has(self, flag: np.uint16) -> NDArray[np.bool_]:
        """Return which pages' folios have a flag: bool, shape (pages,)."""
        mask: NDArray[np.bool_] = (self._folio_flags & flag) != 0
        return mask

    def page(self, mask: NDArray[np.bool_], result: ScanResult) -> None:
        """Note `result` for the pages marked in `mask` (shape (pages,))."""
        self._found[self._offsets[mask]] = result

    def count_swap(self) -> None:
        """Note swap entries: those write-protected by userfaultfd, and, checked before that, too many."""
        # The kernel counts first and looks for write-protection afterwards (collapse_scan_pmd()): here the other way
        # round.
        protected = self._unmapped & ((self._ptes.bits & P.UFFD_WP) != 0)
        self._found[protected] = ScanResult.PTE_UFFD
        self._found[self._over(self._unmapped, self._limits.swap)] = ScanResult.EXCEED_SWAP_PTE

    def no_swap(self) -> None:
        """Note any entry that is neither none nor present."""
        self._found[self._unmapped] = ScanResult.PTE_NON_PRESENT

    def folios(self) -> None:
        """Run a scan's checks of every page's folio."""
        # From the last check of collapse_scan_pmd() to the first.
        self.page(self.expected_references != self._parts.memory.refcount[self.heads], ScanResult.PAGE_COUNT)
        self.page(self.folio_has(Fl.LOCKED), ScanResult.PAGE_LOCK)
        self.page(~self.folio_has(Fl.LRU), ScanResult.PAGE_LRU)
        self.far_nodes()

    def far_nodes(self) -> None:
        """Note a page too far from an earlier one, if nodes reclaim locally (hpage_collapse_scan_abort)."""
        memory = self._parts.memory
        if not self._parts.knobs.zone_reclaim_mode:
            return
        # A node with a page already is acceptable: only the first page on each node can end the scan
        # (collapse_scan_abort()).
        nodes, first = np.unique(memory.nodes_of(self.pfns), return_index=True)
        for at, node in sorted(zip(first.tolist(), nodes.tolist(), strict=True)):
            earlier = nodes[first < at]
            if (memory.distances[node, earlier] > RECLAIM_DISTANCE).any():
                self._found[self._offsets[at]] = ScanResult.SCAN_ABORT
                return

    def count_shared(self) -> None:
        """Note shared pages beyond the limit."""
        shared = self._parts.rmap.maybe_shared(self.pfns, self.heads)
        self.page(self._over(shared, self._limits.shared), ScanResult.EXCEED_SHARED_PTE)

    def page_itself(self, vma: SimVma, *, forced: bool) -> None:
        """Run the checks that precede all counts: write-protected pages, pages of a driver, clean lazyfree."""
        bits = self._ptes.bits[self._offsets]
        # The new folio of a droppable mapping is lazyfree, too, so nothing is lost; elsewhere it would not be.
        if self._parts.kernel.lazyfree_stops and not forced and not vma.droppable:
            lazyfree = (self._folio_flags & (Fl.ANON | Fl.SWAPBACKED)) == Fl.ANON
            self.page(lazyfree & ((bits & P.DIRTY) == 0), ScanResult.PAGE_LAZYFREE)
        self.page(~self.folio_has(Fl.ANON), ScanResult.PAGE_ANON)
        self.page((bits & P.UFFD_WP) != 0, ScanResult.PTE_UFFD)

    def _writable(self, at: int) -> bool:
        """Return whether a page up to entry `at` is writable; True if the kernel does not check."""
        if not self._parts.kernel.wants_writable:
            return True
        return bool((self._ptes.bits[self._offsets[self._offsets <= at]] & P.WRITE).any())

    def taken(self) -> Look:
        """Return the result of the scan."""
        hindered = self._found != _SUCCEED
        at = int(hindered.argmax())
        if not hindered[at]:
            at = len(hindered)
        result = ScanResult.SUCCEED if at == len(hindered) else ScanResult(int(self._found[at]))
        # The failing entry is counted: the kernel counts before it compares with the limit.
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
