"""The simulated page tables as the seam shows them: entries as :class:`~mthp.ptes.PteColumns`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from mthp.ptes import ORDER_NONE, Pte, PteColumns, Segment
from mthp.sim.frames.memory import Fl
from mthp.sim.mm import Mm, P, PageTables, Pmd, Ptes
from mthp.sim.parts import Parts

_NOT_PRESENT = P.SWAP | P.GUARD | P.UFFD_MARKER | P.MIGRATION
_REFERENCED = Fl.REFERENCED | Fl.YOUNG


def columns_of(parts: Parts, mm: Mm, segments: Sequence[Segment]) -> PteColumns:
    """Return the entries of `segments`, one after another; unmapped addresses have none entries."""
    geometry = parts.geometry
    pages = [(end - start) // geometry.page_size for start, end in segments]
    state = np.zeros(sum(pages), np.uint16)
    order = np.full(len(state), ORDER_NONE, np.int8)
    pfn = np.zeros(len(state), np.uint64)
    base = 0
    for (start, _), count in zip(segments, pages, strict=True):
        first = start // geometry.page_size
        for table, low, high in tables_in(mm, first, first + count, geometry.ptes_per_pmd):
            here = slice(base + low - first, base + high - first)
            _fill(parts, table, low, high, state[here], order[here], pfn[here])
        base += count
    return PteColumns(tuple(segments), state, order, pfn)


def tables_in(mm: Mm, first: int, end: int, ptes_per_pmd: int) -> Iterator[tuple[PageTables, int, int]]:
    """Yield (table, first page, page behind the last) for the tables of pages `first` to `end`."""
    for table in mm.tables:
        low = max(first, table.first * ptes_per_pmd)
        high = min(end, (table.last + 1) * ptes_per_pmd)
        if low < high:
            yield table, low, high


def _fill(
    parts: Parts,
    table: PageTables,
    low: int,
    high: int,
    state: NDArray[np.uint16],
    order: NDArray[np.int8],
    pfn: NDArray[np.uint64],
) -> None:
    """Fill columns with the entries of pages `low` to `high`, all of one table."""
    memory, n = parts.memory, parts.geometry.ptes_per_pmd
    run = slice(low - table.first * n, high - table.first * n)
    ptes = Ptes(table.bits.reshape(-1)[run], table.value.reshape(-1)[run])
    bits = ptes.bits
    state[(bits & P.PRESENT) != 0] |= np.uint16(Pte.PRESENT)
    state[(bits & P.ZERO) != 0] |= np.uint16(Pte.ZERO)
    state[(bits & P.SPECIAL) != 0] |= np.uint16(Pte.FILE)
    order[(bits & (P.ZERO | P.SPECIAL)) != 0] = 0
    # As pagemap shows them: markers and migration entries have its swap bit.
    state[(bits & _NOT_PRESENT) != 0] |= np.uint16(Pte.SWAP)
    state[(bits & P.GUARD) != 0] |= np.uint16(Pte.GUARD)
    state[(bits & P.UFFD_WP) != 0] |= np.uint16(Pte.UFFD_WP)
    at = np.flatnonzero(ptes.pages())
    pfns = ptes.value[at].astype(np.int64)
    heads = memory.heads(pfns)
    flags = memory.flags[heads]
    order[at] = memory.order[pfns].astype(np.int8)
    pfn[at] = pfns.astype(np.uint64)
    # Better than a live process shows it: the dirty bit is in no file.
    lazyfree = ((flags & (Fl.ANON | Fl.SWAPBACKED)) == Fl.ANON) & ((bits[at] & P.DIRTY) == 0)
    unreferenced = ((bits[at] & P.YOUNG) == 0) & ((flags & _REFERENCED) == 0)
    # The order of a page, and whether it is shared, are properties of its folio.
    shared = parts.rmap.maybe_shared(pfns, heads)
    for mask, bit in ((lazyfree, Pte.LAZYFREE), (unreferenced, Pte.UNREFERENCED), (shared, Pte.SHARED)):
        state[at[mask]] |= np.uint16(bit)
    huge = np.repeat(table.pmd == Pmd.HUGE, n)[run]
    state[huge & ((bits & P.PRESENT) != 0)] |= np.uint16(Pte.PMD_MAPPED)
