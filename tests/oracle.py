"""The five policies again, one PMD range at a time, in plain loops: a second implementation.

The engine in ``mthp.engine`` is fast, and works on many ranges at once with bit planes; this module must be obviously
right. It was written from ``mm/khugepaged.c`` (``collapse_scan_pmd``, ``mthp.engine``,
``__collapse_huge_page_isolate``, ``collapse_max_ptes_*``), from the patches of Dev Jain's series
(``hpage_collapse_scan_ptes``) and of the seed's second version (``khugepaged_scan_pmd``, ``khugepaged_scan_bitmap``),
and from recordings of kernels built with the series. It shares no code with the engine. The property tests compare the
two; the recorded cases check both.

All runs are aligned here, as in a plan. (Dev Jain's series continues after a large folio at any page.)

Every policy has three steps. :func:`scan` reads each PTE in turn, and may stop the policy. A walk chooses aligned runs
that are full enough. :func:`isolate` reads such a run again, under the limits of its order, and returns the result of
the attempt.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from mthp.results import ScanResult

SMALLEST_ORDER = 2
"""The smallest order of an anonymous folio above order 0."""


@dataclass(frozen=True)
class Range:
    """One PMD range: a list of 0 and 1 per property, with one entry per PTE.

    Attributes:
        present: maps a page; the zero page counts.
        zero: maps the zero page.
        swap: swap entry, or a marker that counts as one.
        guard: such a marker, which cannot be read back.
        shared, lazyfree, unreferenced: of a page.
        uffd: write-protected by userfaultfd, a page or a swap entry.
        folio_order: order of the folio that a page lies in.
        pmd_mapped, uffd_armed, droppable: of the range, or of its VMA.
    """

    present: list[int]
    zero: list[int]
    swap: list[int]
    shared: list[int]
    lazyfree: list[int]
    unreferenced: list[int]
    uffd: list[int]
    folio_order: list[int]
    guard: list[int]
    pmd_mapped: bool = False
    uffd_armed: bool = False
    droppable: bool = False

    @classmethod
    def of_pages(cls, present: list[int]) -> Range:
        """Return a range of ordinary pages and none PTEs."""
        no = [0] * len(present)
        return cls(
            present, zero=no, swap=no, shared=no, lazyfree=no, unreferenced=no, uffd=no, folio_order=no, guard=no
        )

    @property
    def size(self) -> int:
        """PTEs in the range."""
        return len(self.present)

    @property
    def pmd_order(self) -> int:
        """Order of the whole range."""
        return self.size.bit_length() - 1

    def is_page(self, i: int) -> bool:
        """Return whether PTE `i` maps a page that is not the zero page."""
        return bool(self.present[i]) and not self.zero[i]

    def has_contents(self, i: int) -> bool:
        """Return whether PTE `i` stands for something that a collapse would have to copy."""
        return self.is_page(i) or bool(self.swap[i])


@dataclass(frozen=True)
class Rules:
    """The settings of a caller, or of sysfs.

    Attributes:
        orders: enabled orders.
        always: those of them whose own switch is ``always``.
        khugepaged: whether khugepaged collapses; otherwise MADV_COLLAPSE does.
        max_ptes_none, max_ptes_swap, max_ptes_shared: limits per PMD range.
        mthp_min_order: order of a chunk of `rfc`.
    """

    orders: frozenset[int]
    khugepaged: bool
    max_ptes_none: int
    max_ptes_swap: int
    max_ptes_shared: int
    mthp_min_order: int = 3
    always: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Limits:
    """Limits of PTEs of each kind in a run."""

    none: int
    swap: int
    shared: int


@dataclass
class Walk:
    """The result of a policy for one range.

    Attributes:
        scan_result: what ended the range without an attempt; None if nothing did.
        attempts: (offset, order, result), in order.
    """

    scan_result: ScanResult | None = None
    attempts: list[tuple[int, int, ScanResult]] = field(default_factory=list)

    def add(self, offset: int, order: int, result: ScanResult) -> ScanResult:
        """Record an attempt and return its result."""
        self.attempts.append((offset, order, result))
        return result


@dataclass(frozen=True)
class Expected:
    """One range's part of a plan."""

    orders: list[int]
    scan_result: ScanResult
    copied: int
    filled: int
    attempts: list[tuple[int, int, ScanResult]]


def plan(range_: Range, policy: str, rules: Rules) -> Expected:
    """What `policy` makes of `range_`."""
    walk = _unfit(range_, policy, rules) or POLICIES[policy](range_, rules)
    orders = [range_.folio_order[i] if range_.is_page(i) else 0 if range_.zero[i] else -1 for i in range(range_.size)]
    copied = filled = 0
    for offset, order, result in walk.attempts:
        if result == ScanResult.SUCCEED:
            for i in range(offset, offset + (1 << order)):
                orders[i] = order
                copied += range_.has_contents(i)
                filled += not range_.has_contents(i)
    return Expected(orders, _range_result(walk), copied, filled, walk.attempts)


def _unfit(range_: Range, policy: str, rules: Rules) -> Walk | None:
    """What keeps the range from being scanned at all, under any policy."""
    if range_.pmd_mapped:
        return Walk(ScanResult.PMD_MAPPED)
    if not any(range_.present) and not any(range_.swap):
        return Walk(ScanResult.NO_PTE_TABLE)
    if policy in ("pmd-only", "rfc", "rfc2") and rules.khugepaged and range_.pmd_order not in rules.orders:
        return Walk(ScanResult.FAIL)
    if not any(range_.has_contents(i) for i in range(range_.size)):
        return Walk(ScanResult.EXCEED_NONE_PTE)
    return None


def _range_result(walk: Walk) -> ScanResult:
    results = [result for _, _, result in walk.attempts]
    if ScanResult.SUCCEED in results:
        return ScanResult.SUCCEED
    if results:
        return results[-1]
    return ScanResult.FAIL if walk.scan_result is None else walk.scan_result


def scan(
    range_: Range, rules: Rules, offset: int, order: int, limits: Limits, *, skip_large: bool = False
) -> ScanResult:
    """Read each PTE of a run, and return the first reason against a collapse (collapse_scan_pmd).

    Args:
        skip_large: whether a page of a folio of `order` or larger is such a reason.
    """
    none = swapped = shared = referenced = 0
    for i in range(offset, offset + (1 << order)):
        if not range_.has_contents(i):
            none += 1
            if none > limits.none:
                return ScanResult.EXCEED_NONE_PTE
            continue
        if range_.swap[i]:
            swapped += 1
            if swapped > limits.swap:
                return ScanResult.EXCEED_SWAP_PTE
            if range_.uffd[i]:
                return ScanResult.PTE_UFFD
            continue
        if range_.uffd[i]:
            return ScanResult.PTE_UFFD
        if rules.khugepaged and range_.lazyfree[i] and not range_.droppable:
            return ScanResult.PAGE_LAZYFREE
        if skip_large and range_.folio_order[i] >= order:
            return ScanResult.PTE_MAPPED_HUGEPAGE
        if range_.shared[i]:
            shared += 1
            if shared > limits.shared:
                return ScanResult.EXCEED_SHARED_PTE
        referenced += not range_.unreferenced[i]
    enough = referenced >= (1 << order) // 2 if swapped else referenced > 0
    return ScanResult.SUCCEED if enough or not rules.khugepaged else ScanResult.LACK_REFERENCED_PAGE


def isolate(
    range_: Range, rules: Rules, offset: int, order: int, limits: Limits, *, series: bool = False
) -> ScanResult:
    """Attempt a run: read swap entries back, then check each PTE again under the limits of the order.

    Follows __collapse_huge_page_swapin, which goes before everything else, and __collapse_huge_page_isolate.

    Args:
        series: the kernel was built with one. Those look for a large folio before they count a shared page, and their
            kernels, before 6.18, collapse nothing without a page that may be written.
    """
    run = range(offset, offset + (1 << order))
    if sum(range_.swap[i] for i in run) > limits.swap:
        return ScanResult.EXCEED_SWAP_PTE
    if any(range_.guard[i] for i in run):
        return ScanResult.FAIL
    none = shared = referenced = 0
    for i in run:
        if not range_.has_contents(i):
            none += 1
            if none > limits.none:
                return ScanResult.EXCEED_NONE_PTE
        elif not range_.swap[i]:
            large = order < range_.pmd_order and range_.folio_order[i] >= order
            if series and large:
                return ScanResult.PTE_MAPPED_HUGEPAGE
            shared += range_.shared[i]
            if shared > limits.shared:
                return ScanResult.EXCEED_SHARED_PTE
            if large:
                return ScanResult.PTE_MAPPED_HUGEPAGE
            referenced += not range_.unreferenced[i]
    if series and not rules.khugepaged and none == 1 << order:
        return ScanResult.PAGE_RO
    return ScanResult.SUCCEED if referenced or not rules.khugepaged else ScanResult.LACK_REFERENCED_PAGE


def scaled(range_: Range, rules: Rules, order: int) -> Limits:
    """Return the limits of a run of `order`, each divided down from those of the PMD range (`per-order`)."""
    if not rules.khugepaged:
        return Limits(0 if range_.uffd_armed else range_.size, range_.size, range_.size)
    shift = range_.pmd_order - order
    none = 0 if range_.uffd_armed else rules.max_ptes_none >> shift
    return Limits(none, rules.max_ptes_swap >> shift, rules.max_ptes_shared >> shift)


def pmd_only(range_: Range, rules: Rules) -> Walk:
    """Linux up to 7.1: one scan, and if nothing hinders, one attempt at the whole range."""
    order = range_.pmd_order
    limits = scaled(range_, rules, order)
    result = scan(range_, rules, 0, order, limits)
    if result != ScanResult.SUCCEED:
        return Walk(result)
    walk = Walk()
    walk.add(0, order, isolate(range_, rules, 0, order, limits))
    return walk


def per_order(range_: Range, rules: Rules) -> Walk:
    """Jain's series: scan the run again at each order; an order that failed is not tried again in the range.

    MADV_COLLAPSE begins with the PMD order, then tries those that are enabled.
    """
    left = set(rules.orders) if rules.khugepaged else rules.orders | {range_.pmd_order}
    walk = Walk()
    offset, order = 0, max(left)
    while left and offset < range_.size:
        limits = scaled(range_, rules, order)
        result = scan(range_, rules, offset, order, limits, skip_large=order < range_.pmd_order)
        run = range(offset, offset + (1 << order))
        scanned = result == ScanResult.SUCCEED
        if scanned and not rules.khugepaged and not any(range_.has_contents(i) for i in run):
            result, scanned = ScanResult.PAGE_RO, False
        if scanned and any(range_.guard[i] for i in run):
            # The scan lets a guard marker pass as a swap entry; reading it back fails.
            result = ScanResult.FAIL
        if scanned or result == ScanResult.PTE_MAPPED_HUGEPAGE:
            walk.add(offset, order, result)
        if result in (ScanResult.SUCCEED, ScanResult.PTE_MAPPED_HUGEPAGE):
            # The largest order that the address allows if that is left, else the largest that is left.
            offset, aligned = _behind(range_, offset, order)
            order = aligned if aligned in left else max(left)
            continue
        if scanned and offset + (1 << order) == range_.size:
            # The loop is left when an attempt, successful or not, has reached the end of the range.
            break
        walk.scan_result = result
        left -= {order}
        order = max(left, default=0)
    return walk


def rfc(range_: Range, rules: Rules) -> Walk:
    """Return the walk of the seed: a bit per full chunk, a percentage of bits for each order."""
    percent = (range_.size - rules.max_ptes_none - 1) * 100 // (range_.size - 1)

    def enough(offset: int, order: int) -> bool:
        chunks = 1 << order - rules.mthp_min_order
        return _chunk_bits(range_, rules, offset, order, 0) >= percent * chunks // 100

    return _seed(range_, rules, enough, swap_below_pmd=True)


def rfc2(range_: Range, rules: Rules) -> Walk:
    """Return the walk of the seed's second version: chunks may have none PTEs; swap, shared at the PMD order only."""
    scaled_none = rules.max_ptes_none >> range_.pmd_order - rules.mthp_min_order

    def enough(offset: int, order: int) -> bool:
        threshold = (range_.size - rules.max_ptes_none - 1) >> range_.pmd_order - (order - rules.mthp_min_order)
        # A bit needs fewer none PTEs than the scaled limit, so a limit of 0 allows none.
        bits = _chunk_bits(range_, rules, offset, order, scaled_none - 1) if scaled_none else 0
        return order in rules.always or bits > threshold

    return _seed(range_, rules, enough, swap_below_pmd=False)


def _seed(range_: Range, rules: Rules, enough: Callable[[int, int], bool], *, swap_below_pmd: bool) -> Walk:
    """Scan a range as the seed does, then go over its halves on a stack, those of every run that was not collapsed.

    MADV_COLLAPSE has the same thresholds, over all orders from the smallest chunk up; isolation has no limits then.
    """
    limits = scaled(range_, rules, range_.pmd_order)
    # The series took the limit of none PTEs out of the scan: the whole range is to be seen. Only where userfaultfd is
    # armed one of them ends it.
    scan_none = 0 if range_.uffd_armed else range_.size
    result = scan(range_, rules, 0, range_.pmd_order, Limits(scan_none, limits.swap, limits.shared))
    if result != ScanResult.SUCCEED:
        return Walk(result)
    walk = Walk()
    enabled = rules.orders if rules.khugepaged else frozenset(range(SMALLEST_ORDER, range_.pmd_order + 1))
    stack = [(range_.pmd_order, 0)]
    while stack:
        order, offset = stack.pop()
        if order in enabled and enough(offset, order):
            # Swap entries and shared pages keep the whole range's limits at every order, or are refused below it.
            none, swap, shared = scaled(range_, rules, order).none, limits.swap, limits.shared
            if order < range_.pmd_order and not swap_below_pmd:
                swap = shared = 0
            result = isolate(range_, rules, offset, order, Limits(none, swap, shared), series=True)
            if walk.add(offset, order, result) == ScanResult.SUCCEED:
                continue
        if order > rules.mthp_min_order:
            stack.append((order - 1, offset + (1 << (order - 1))))
            stack.append((order - 1, offset))
    return walk


def _chunk_bits(range_: Range, rules: Rules, offset: int, order: int, allowed_none: int) -> int:
    """Return how many chunks of a run have a bit: few none PTEs, and the scan got past a page at the chunk's end."""
    chunk = 1 << rules.mthp_min_order
    bits = 0
    for first in range(offset, offset + (1 << order), chunk):
        none = sum(not range_.has_contents(i) for i in range(first, first + chunk))
        bits += none <= allowed_none and range_.is_page(first + chunk - 1)
    return bits


def mainline(range_: Range, rules: Rules) -> Walk:
    """Linux 7.2 and later: scan, then at each offset the orders downwards (mthp_collapse)."""
    pmd_order, unlimited = range_.pmd_order, range_.size
    enabled = rules.orders if rules.khugepaged else frozenset({pmd_order})
    limits = scaled(range_, rules, pmd_order)
    # The scan stops early at empty PTEs only if just the PMD size is possible.
    scan_none = limits.none if enabled == {pmd_order} else range_.size - 1
    result = scan(range_, rules, 0, pmd_order, Limits(scan_none, limits.swap, limits.shared))
    if result != ScanResult.SUCCEED:
        return Walk(result)
    walk = Walk()
    offset, order = 0, pmd_order
    while offset < range_.size:
        if order in enabled:
            if order == pmd_order:
                needed = range_.size - (rules.max_ptes_none if rules.khugepaged else unlimited)
                found = sum(range_.has_contents(i) for i in range(range_.size))
                run_limits = limits
            else:
                allowed = (1 << order) - 1 if rules.max_ptes_none == range_.size - 1 else 0
                needed = (1 << order) - allowed
                found = sum(range_.is_page(i) for i in range(offset, offset + (1 << order)))
                run_limits = Limits(0 if range_.uffd_armed else allowed, 0, 0)
            if found >= needed:
                result = walk.add(offset, order, isolate(range_, rules, offset, order, run_limits))
                if result == ScanResult.FAIL:
                    break
                if result in (ScanResult.SUCCEED, ScanResult.PTE_MAPPED_HUGEPAGE):
                    offset, order = _behind(range_, offset, order)
                    continue
        if order > SMALLEST_ORDER and any(smaller < order for smaller in enabled):
            order -= 1
        else:
            offset, order = _behind(range_, offset, order)
    return walk


def _behind(range_: Range, offset: int, order: int) -> tuple[int, int]:
    """Return the offset after a run, and the largest order that its alignment allows."""
    offset += 1 << order
    order = 0
    while order < range_.pmd_order and offset % (2 << order) == 0:
        order += 1
    return offset, order


POLICIES: dict[str, Callable[[Range, Rules], Walk]] = {
    "pmd-only": pmd_only,
    "rfc": rfc,
    "rfc2": rfc2,
    "per-order": per_order,
    "mainline": mainline,
}
