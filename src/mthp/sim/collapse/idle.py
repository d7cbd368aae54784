"""Idle PMD ranges, in which no collapse can succeed: many of them are skipped at once.

khugepaged leaves most ranges alone: those without a page table, those that a PMD entry maps already, those with too
many none PTEs. A single scan (:mod:`mthp.sim.collapse.look`) makes many checks of every entry and of its folio. Here
the results for ordinary entries are computed in a few passes over whole columns. An *ordinary* entry is none, or maps
the zero page, or maps a folio that passes all checks: on the LRU lists, unlocked, not shared, with no references but
from its mappings, not lazyfree. Any other range ends the run of idle ones, and is scanned on its own.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from mthp.engine.bits import Bits, set_bits
from mthp.engine.occupancy import Occupancy
from mthp.engine.planes import Planes
from mthp.engine.policy import BUILT_IN
from mthp.engine.visited import Passage
from mthp.ptes import Segment
from mthp.results import BlockOutcome, ScanResult
from mthp.sim.collapse.fullness import Fullness
from mthp.sim.collapse.scan import CollapseControl
from mthp.sim.frames.memory import Fl, Memory
from mthp.sim.mm import Mm, P, Pmd, SimVma
from mthp.sim.parts import Parts
from mthp.sim.trace import ScanPmd

MAX_RANGES = 1024
"""Most PMD ranges scanned together; the fixed cost of the column passes is then small per range."""

SPARSE = 8
"""Look frames up one by one if the span from the lowest to the highest has more than this many frames per entry."""

_WANTED = Fl.LRU | Fl.ANON | Fl.SWAPBACKED
_LOOKED_AT = _WANTED | Fl.LOCKED | Fl.SWAPCACHE
_ORDINARY = P.PRESENT | P.YOUNG | P.DIRTY | P.WRITE | P.ZERO


@dataclass(frozen=True, slots=True)
class _Idle:
    """Results for some adjoining PMD ranges, from the first on.

    Attributes:
        idle: bool, shape (ranges,): no collapse can succeed there.
        results: int8, shape (ranges,): ScanResult where `idle`.
        entries: int64, shape (ranges,): entries that the scan reads where `idle`.
        scanned: bool, shape (ranges,): the range has a page table.
        passed: bool, shape (ranges,): the range passes its scan, but nothing in it can be collapsed.
        tried: by order, runs that are tried without success: bool, shape (ranges, runs per range).
    """

    idle: Bits
    results: NDArray[np.int8]
    entries: NDArray[np.int64]
    scanned: Bits
    passed: Bits
    tried: dict[int, Bits] = field(default_factory=dict)


def pass_over(
    parts: Parts, mm: Mm, vma: SimVma, stretch: Segment, control: CollapseControl, budget: int, ahead: int
) -> Passage | None:
    """Skip the idle ranges at the start of `stretch`.

    Args:
        ahead: ranges with page tables to scan together; 0 for none.

    Returns:
        Their results, counted and timed as if they had been scanned one after another; None if the first is not idle.
    """
    start, end = stretch
    found = mm.row(start)
    assert found is not None, f"nothing is mapped at {start:#x}"
    table, row = found
    size = parts.geometry.pmd_size
    rows = min((end - start) // size, budget)
    pmds = table.pmd[row : row + rows]
    tables = pmds == Pmd.TABLE
    leading = int(tables.argmax()) if tables.any() else len(pmds)
    # Trace events of ranges with page tables need counts of entries, zone_reclaim_mode needs the distance of nodes, and
    # wants_writable needs the writable entries: none of them are computed here.
    everything = parts.trace.enabled or parts.knobs.zone_reclaim_mode or parts.kernel.wants_writable
    if everything or leading >= ahead:
        seen = _without_tables(pmds[:leading])
    else:
        rows = min(len(pmds), ahead)
        seen = _look(parts, mm, vma, control, (table.pmd, table.bits, table.value), slice(row, row + rows))
    busy = np.flatnonzero(~seen.idle)
    count = int(busy[0]) if len(busy) else len(seen.idle)
    if not count:
        return None
    return _passage(parts, mm, seen, count, start, budget)


def _passage(parts: Parts, mm: Mm, seen: _Idle, count: int, start: int, budget: int) -> Passage:
    """Count the first `count` ranges, until the budget is used up."""
    # A range that passes its scan ends the visit; the next visit, which counts as an entry, continues behind it.
    progress = np.cumsum(seen.entries[:count] + seen.passed[:count]) - seen.passed[:count]
    count = min(count, int(progress.searchsorted(budget)) + 1)
    results, scanned = seen.results[:count], seen.scanned[:count]
    exceeded = int(np.count_nonzero(results == ScanResult.EXCEED_NONE_PTE))
    if exceeded:
        parts.counters.count("thp_scan_exceed_none_pte", exceeded)
        parts.counters.count_mthp(parts.geometry.pmd_order, "collapse_exceed_none_pte", exceeded)
    if scanned.any():
        parts.clock.spend("scan_range", int(np.count_nonzero(scanned)))
        parts.clock.spend("scan_pte", int(seen.entries[:count][scanned].sum()))
    size = parts.geometry.pmd_size
    addresses = np.arange(start, start + count * size, size, dtype=np.uint64)
    if parts.trace.enabled:
        for address, result in zip(addresses.tolist(), results.tolist(), strict=True):
            parts.trace.emit(ScanPmd(mm.id, address, ScanResult(result), 0, 0, 0))
    last = ScanResult(int(results[-1]))
    end, released = start + count * size, bool(seen.passed[count - 1])
    attempts = _attempts(parts, seen, count, start)
    return Passage(end, int(progress[count - 1]), addresses, results, last, released, attempts)


def _attempts(parts: Parts, seen: _Idle, count: int, start: int) -> tuple[BlockOutcome, ...]:
    """Count and time the attempts in the first `count` ranges, which begin at `start`; return them in order."""
    geometry, found = parts.geometry, []
    for order, runs in seen.tried.items():
        rows, indices = np.nonzero(runs[:count])
        at = start + (rows * geometry.ptes_per_pmd + (indices << order)) * geometry.page_size
        parts.count_order(order, "thp_collapse_alloc", "collapse_alloc", len(at))
        parts.clock.spend("alloc_large", len(at))
        parts.clock.spend("free_folio", len(at))
        found += [BlockOutcome(address, order, ScanResult.PTE_MAPPED_HUGEPAGE) for address in at.tolist()]
    return tuple(sorted(found, key=lambda attempt: (attempt.address, -attempt.order)))


def _without_tables(pmds: NDArray[np.uint8]) -> _Idle:
    """Return results for ranges that are not mapped, or mapped by a PMD entry.

    Args:
        pmds: uint8 :class:`Pmd`, shape (ranges,).
    """
    no_table, huge = np.int8(ScanResult.NO_PTE_TABLE), np.int8(ScanResult.PMD_MAPPED)
    count = len(pmds)
    results = np.where(pmds == Pmd.HUGE, huge, no_table)
    scanned, passed = np.zeros(count, np.bool_), np.zeros(count, np.bool_)
    return _Idle(np.ones(count, np.bool_), results, np.ones(count, np.int64), scanned, passed)


def _look(
    parts: Parts,
    mm: Mm,
    vma: SimVma,
    control: CollapseControl,
    columns: tuple[NDArray[np.uint8], NDArray[np.uint16], NDArray[np.uint32]],
    rows: slice,
) -> _Idle:
    """Scan ranges that may have page tables; `columns` are the PMD entries, and bits and values of PTEs, of a table."""
    pmds = columns[0][rows]
    seen = _without_tables(pmds)
    tables = np.flatnonzero(pmds == Pmd.TABLE)
    limit = _none_limit(vma, control)
    if not len(tables):
        return seen
    if limit is None:
        seen.idle[tables] = False
        return seen
    # Mostly all ranges have page tables, and then these are views.
    everywhere = len(tables) == len(pmds)
    bits = columns[1][rows] if everywhere else columns[1][rows][tables]
    values = columns[2][rows] if everywhere else columns[2][rows][tables]
    none, young, plain = _kinds(bits)
    packed = np.packbits(none, axis=1, bitorder="little")
    counts = set_bits(packed)
    total = counts.sum(axis=1, dtype=np.int64)
    # Only none entries and zero pages count against a limit, so the scan ends at the one that exceeds it, or passes.
    ordinary = plain & _all_ordinary(parts.memory, values, none)
    exceeded = total > limit
    # Without a young entry the scan of khugepaged ends with LACK_REFERENCED_PAGE; such a range is scanned on its own.
    passed = ordinary & ~exceeded & young
    if passed.any():
        rows_passed = np.flatnonzero(passed)
        done, tried = _nothing_to_do(parts, mm, control, ~none[passed], values[passed])
        passed[rows_passed] = done
        for order, runs in tried.items():
            seen.tried[order] = np.zeros((len(pmds), runs.shape[1]), np.bool_)
            seen.tried[order][tables[rows_passed]] = runs
    seen.idle[tables] = ordinary & exceeded | passed
    seen.results[tables] = np.where(exceeded, np.int8(ScanResult.EXCEED_NONE_PTE), np.int8(ScanResult.FAIL))
    entries: NDArray[np.int64] = np.full(len(tables), bits.shape[1], np.int64)
    # The scan reads the entry that exceeds the limit, and no further.
    entries[exceeded] = _nth_set(packed[exceeded], counts[exceeded], limit) + 1
    seen.entries[tables] = entries
    seen.passed[tables] = passed
    seen.scanned[tables] = True
    return seen


def _kinds(bits: NDArray[np.uint16]) -> tuple[Bits, Bits, Bits]:
    """Return the none entries and zero pages, the ranges with a young page, and those with ordinary entries only.

    Returns:
        bool, shape of `bits`; and twice bool, shape (ranges,).
    """
    # All bits of a range at once: most ranges have none that needs a closer look.
    known = np.bitwise_or.reduce(bits, axis=1)
    none, young = bits == 0, (known & P.YOUNG) != 0
    if np.bitwise_or.reduce(known) & P.ZERO:
        none |= (bits & P.ZERO) != 0
        young = (((bits & P.YOUNG) != 0) & ~none).any(axis=1)
    return none, young, (known & ~_ORDINARY) == 0


def _none_limit(vma: SimVma, control: CollapseControl) -> int | None:
    """Return the none PTEs that the scan allows; None if ranges are not scanned as a whole."""
    policy, rules = control.policy, control.rules
    limits = policy.scan_limits(rules)
    if limits is None or policy.scans_each_run:
        return None
    return 0 if vma.userfaultfd_armed and policy.scan_honours_uffd(rules) else limits.none


def _all_ordinary(memory: Memory, values: NDArray[np.uint32], none: Bits) -> Bits:
    """Return the ranges in which all folios are ordinary: bool, shape (ranges,).

    Args:
        values: uint32, shape (ranges, ptes_per_pmd): frames, 0 where `none`.
    """
    # Subtracting 1 makes 0 wrap around, so that it is not the lowest.
    lowest = (values - np.uint32(1)).min(axis=1).astype(np.int64) + 1
    highest = values.max(axis=1).astype(np.int64)
    mapped = highest > 0
    if not mapped.any():
        return np.ones(len(values), np.bool_)
    first, last = int(lowest[mapped].min()), int(highest.max())
    if last - first > SPARSE * values.size:
        return _ordinary_one_by_one(memory, values, none)
    # The frames of a range mostly adjoin: slices from the lowest to the highest cost less than looking up each frame.
    odd = _odd_frames(memory, first, last + 1)
    if not len(odd):
        return np.ones(len(values), np.bool_)
    between = odd.searchsorted(np.where(mapped, highest + 1, 0)) - odd.searchsorted(np.where(mapped, lowest, 0))
    ordinary: Bits = np.equal(between, 0)
    # An odd frame in between may belong to another range, or to another process.
    unclear = np.flatnonzero(~ordinary)
    if len(unclear):
        ordinary[unclear] = _ordinary_one_by_one(memory, values[unclear], none[unclear])
    return ordinary


def _odd_frames(memory: Memory, first: int, end: int) -> NDArray[np.intp]:
    """Return the frames from `first` to `end` in folios that are not ordinary: intp, shape (frames,), ascending."""
    first = memory.head(first)
    run = slice(first, end)
    odd = (memory.flags[run] & _LOOKED_AT) != _WANTED
    # A mapped folio with one reference is mapped once.
    odd |= memory.refcount[run] != 1
    order = memory.order[run]
    if order.any():
        # A large folio is checked at its head, for all its frames.
        odd &= order == 0
        large = np.flatnonzero(order)
        heads = large[(large + first) & ((1 << order[large].astype(np.int64)) - 1) == 0] + first
        for head in heads[~_ordinary_folios(memory, heads, heads)].tolist():
            odd[head - first : head - first + memory.size(head)] = True
    return np.flatnonzero(odd) + first


def _ordinary_folios(memory: Memory, pfns: NDArray[np.int64], heads: NDArray[np.int64]) -> Bits:
    """Return whether the folios of some pages are ordinary: bool, shape (pages,)."""
    large = memory.order[pfns] > 0
    # The first tail frame of a large folio counts its mappings, the second those of its first address space.
    mappings = np.where(large, memory.refcount[heads + large], memory.mapcount[pfns])
    alone = np.where(large, memory.refcount[heads + 2 * large], 1)
    ordinary: Bits = (memory.flags[heads] & _LOOKED_AT) == _WANTED
    ordinary &= (memory.refcount[heads] == mappings) & (mappings <= alone)
    return ordinary


def _ordinary_one_by_one(memory: Memory, values: NDArray[np.uint32], none: Bits) -> Bits:
    """Return the same as :func:`_all_ordinary`, looking up only the mapped frames."""
    rows, columns = np.nonzero(~none)
    pfns = values[rows, columns].astype(np.int64)
    ordinary = _ordinary_folios(memory, pfns, memory.heads(pfns))
    every: Bits = np.ones(len(values), np.bool_)
    every[rows[~ordinary]] = False
    return every


def _nothing_to_do(
    parts: Parts, mm: Mm, control: CollapseControl, pages: Bits, values: NDArray[np.uint32]
) -> tuple[Bits, dict[int, Bits]]:
    """Return the ranges without a run to collapse, and the runs tried in them.

    Follows the walk: a run that is full enough is tried. If its first page lies in a folio of the order, its halves are
    not tried, unless the policy tries halves after failures.

    Args:
        pages: bool, shape (ranges, ptes_per_pmd): pages other than the zero page.
        values: uint32, same shape: their frames.

    Returns:
        bool, shape (ranges,), all False if the policy needs more data; and by order: bool, shape (ranges, runs).
    """
    policy, rules, pmd_order = control.policy, control.rules, parts.geometry.pmd_order
    nothing: Bits = np.zeros(len(pages), np.bool_)
    orders = policy.orders_walked(rules)
    # Another policy may decide by data that is not computed here, and a hook must see every step.
    if type(policy) not in BUILT_IN.values() or parts.hook is not None or not orders:
        return nothing, {}
    # The walk of the seed then tries orders that are not enabled.
    if policy.orders_allocated(rules) != orders:
        return nothing, {}
    fullness = Fullness(Occupancy(Planes(pages), parts.geometry), policy, rules)
    nothing[:] = True
    reached: Bits = np.ones((len(pages), 1), np.bool_)
    tried: dict[int, Bits] = {}
    for order in range(pmd_order, min(orders) - 1, -1):
        if order in orders:
            enough = fullness.of(order)
            runs = reached if enough is None else reached & enough
            if runs.any():
                # khugepaged repeats such an attempt in every pass: it takes a free folio, finds that the run's first
                # page has one as large, and frees it again. Only counters change.
                nothing &= ~(runs & ~_can_be_tried_in_vain(parts, mm, order, pages, values)).any(axis=1)
                if not nothing.any():
                    return nothing, {}
                tried[order] = runs
                reached = reached if policy.halves_after_failure else reached & ~runs
        if order > min(orders):
            reached = np.repeat(reached, 2, axis=1)
    return nothing, {order: runs & nothing[:, None] for order, runs in tried.items()}


def _can_be_tried_in_vain(parts: Parts, mm: Mm, order: int, pages: Bits, values: NDArray[np.uint32]) -> Bits:
    """Return the runs that begin in a folio of the order, if a folio for the attempt is free: bool, by run."""
    memory = parts.memory
    first: Bits = pages[:, :: 1 << order]
    # An attempt at the PMD order takes large folios apart; one without room or a free folio ends otherwise, and may
    # reclaim.
    if order == parts.geometry.pmd_order or memory.cgroups.room(mm.charge) < 1 << order:
        return np.zeros_like(first)
    if not all(any(zone.has(order, low=True) for zone in memory.zonelist([node])) for node in range(memory.nodes)):
        return np.zeros_like(first)
    return first & (memory.order[values[:, :: 1 << order]] >= order)


def _nth_set(packed: NDArray[np.uint8], counts: NDArray[np.uint8], before: int) -> NDArray[np.int64]:
    """Return the position of set bit number `before` of each row: int64, shape (rows,).

    Args:
        before: number of the set bit, from 0.
        packed: uint8, shape (rows, bytes): bit i of byte j is position 8 * j + i; each row has enough set bits.
        counts: uint8, same shape: set bits of each byte.
    """
    if before == 0:
        at = (packed != 0).argmax(axis=1)
        left = np.zeros(len(packed), np.int64)
    else:
        through = np.cumsum(counts, axis=1, dtype=np.uint16)
        at = (through > before).argmax(axis=1)
        rows = np.arange(len(packed))
        left = before - (through[rows, at].astype(np.int64) - counts[rows, at])
    positions: NDArray[np.int64] = at * 8 + _NTH_OF_BYTE[packed[np.arange(len(packed)), at], left]
    return positions


def _nth_of_byte() -> NDArray[np.int64]:
    """Return a table of (byte, n): the position of the byte's set bit number n, from 0; 0 if it has fewer."""
    table = np.zeros((256, 8), np.int64)
    for byte in range(256):
        places = [bit for bit in range(8) if byte >> bit & 1]
        table[byte, : len(places)] = places
    return table


_NTH_OF_BYTE = _nth_of_byte()
