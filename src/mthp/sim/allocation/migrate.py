"""Migration of a folio in two halves, so that other events can happen between them (mm/migrate.c).

Between the halves, every entry that mapped a page of it is a migration entry. An access to one waits for the end of the
migration; khugepaged sees an entry that is neither present nor none.
"""

from __future__ import annotations

import errno

import numpy as np

from mthp.sim.allocation.alloc import take_folio
from mthp.sim.allocation.compact import relocate
from mthp.sim.frames.memory import Fl
from mthp.sim.mm import Mm, P, Pmd
from mthp.sim.page_tables.mappings import mappings_of
from mthp.sim.page_tables.split import unexplained_references
from mthp.sim.parts import Parts


def start_migration(parts: Parts, mm: Mm, address: int) -> int:
    """Replace the mappings of the folio at `address` by migration entries; return 0, EFAULT (no page) or EBUSY."""
    page = parts.geometry.page_size
    if mm.pmd(address) is Pmd.NONE or not (ptes := mm.ptes(address // page * page, 1)).pages()[0]:
        return errno.EFAULT
    parts.lru.drain()
    memory = parts.memory
    head = memory.head(int(ptes.value[0]))
    size = memory.size(head)
    movable = (memory.flags[head] & (Fl.LRU | Fl.ANON | Fl.LOCKED)) == Fl.LRU | Fl.ANON
    if not movable or unexplained_references(parts, head) or (memory.flags[head : head + size] & Fl.POISONED).any():
        return errno.EBUSY
    # Held, because it loses the references of its mappings: migration entries hold none.
    memory.refcount[head] += 1
    for mapped in mappings_of(parts, head, size):
        parts.counters.count("thp_split_pmd", mapped.split_pmd())
        mapped.set((mapped.bits() & ~P.PRESENT) | P.MIGRATION, mapped.frames())
        memory.refcount[head] -= len(mapped.entries)
    memory.mapcount[head : head + size] = 0
    parts.rmap.forget(head)
    memory.clear(head, Fl.LRU)
    memory.set(head, Fl.LOCKED)
    parts.migrating[head] = None
    return 0


def finish_migration(parts: Parts, head: int) -> None:
    """Map the folio again, at new frames if they can be allocated, or else at the old ones."""
    memory, order, size = parts.memory, int(parts.memory.order[head]), parts.memory.size(head)
    del parts.migrating[head]
    memory.clear(head, Fl.LOCKED)
    memory.set(head, Fl.LRU)
    back = mappings_of(parts, head, size, P.MIGRATION)
    for mapped in back:
        mapped.set((mapped.bits() & ~P.MIGRATION) | P.PRESENT, mapped.frames())
        parts.rmap.add(mapped.frames(), mapped.mm.id)
        memory.refcount[head] += len(mapped.entries)
    # All its mappings were removed meanwhile.
    if not back:
        parts.swap.free_cache(head)
        memory.put(head)
        return
    # Some entries were unmapped meanwhile, when the folio could not be put on the list.
    if order and not memory.mapcount[head : head + size].all():
        parts.rmap.partially_mapped(head)
    # Held until the allocation is done, so that reclaim leaves it alone.
    # No waiting: a migration that finds no frames fails, and its mappings come back.
    new = take_folio(parts, order, may_wait=False)
    memory.put(head)
    if new is not None:
        relocate(parts, {head: new})


def wait_for_migration(parts: Parts, mm: Mm, address: int) -> None:
    """Wait for the page behind the migration entry at `address` (migration_entry_wait)."""
    pfn = int(mm.ptes(address, 1).value[0])
    head = next(head for head in parts.migrating if head <= pfn < head + parts.memory.size(head))
    finish_migration(parts, head)


def migrating(parts: Parts) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Return the heads of the folios under migration: int64, shape (folios,)."""
    return np.array(list(parts.migrating), np.int64)
