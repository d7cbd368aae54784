"""System calls on address spaces: munmap, mprotect, mlock, fork, exit.

Each returns 0 or an error number, as the kernel does; a call that returns an address returns the negative of the error
number instead. madvise, userfaultfd and mremap have their own modules: advice, uffd, mremap.
"""

from __future__ import annotations

import dataclasses
import errno
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from mthp.sim.address_space.access import Fault
from mthp.sim.address_space.touch import fault_in
from mthp.sim.allocation.alloc import new_folio
from mthp.sim.frames.memory import Fl
from mthp.sim.mm import DROPPABLE, LOCKED, UFFD_MISSING, UFFD_WP, Mm, P, Pmd, Ptes, SimVma
from mthp.sim.page_tables.zap import split_at, split_pmd, zap
from mthp.sim.parts import Parts

NOT_INHERITED = {LOCKED, UFFD_WP, UFFD_MISSING}
"""Flags of a mapping that a child does not inherit (dup_mmap)."""

Change = Callable[[SimVma], tuple[set[str], str]]
"""A function that returns the new flags and permissions of a mapping."""


def whole_pages(parts: Parts, start: int, end: int) -> bool:
    """Return whether a range consists of whole pages, and is not empty."""
    page = parts.geometry.page_size
    return start % page == 0 and end % page == 0 and start < end


def munmap(parts: Parts, mm: Mm, start: int, end: int) -> int:
    """Unmap a range, even if only parts of it are mapped."""
    if not whole_pages(parts, start, end):
        return errno.EINVAL
    # Before anything is unmapped: a mapping that reaches beyond the range keeps the rest.
    for edge in (start, end):
        cut(parts, mm, edge)
    for vma in mm.vmas_in(start, end):
        if vma.locked:
            _unlock_pages(parts, mm, vma.start, vma.end)
        zap(parts, mm, vma.start, vma.end)
    mm.remove_vmas(start, end)
    return 0


def cut(parts: Parts, mm: Mm, address: int) -> None:
    """Split the mapping at `address`, if one covers it, and a PMD entry that would map memory of both halves."""
    if mm.split_vma(address) and address % parts.geometry.pmd_size:
        split_pmd(parts, mm, address)


def modify(parts: Parts, mm: Mm, start: int, end: int, change: Change) -> tuple[list[SimVma], int]:
    """Change the mappings of a range, with splits and merges (vma_modify).

    Returns:
        The changed mappings before merging; bytes of the range that are mapped.
    """
    changed, covered = [], 0
    for vma in mm.vmas_in(start, end):
        first, last = max(start, vma.start), min(end, vma.end)
        covered += last - first
        flags, permissions = change(vma)
        if (flags, permissions) == (vma.flags, vma.permissions):
            continue
        cut(parts, mm, first)
        cut(parts, mm, last)
        piece = mm.find_vma(first)
        assert piece is not None, "a mapping was cut, and is gone"
        if permissions != piece.permissions:
            # mprotect_fixup() (mm/mprotect.c) takes back what was never written, and counts what becomes writable.
            piece.accounted = "w" in permissions or (piece.accounted and piece.anon_vma > 0)
        piece.flags, piece.permissions = flags, permissions
        changed.append(dataclasses.replace(piece, start=first, end=last, flags=set(flags)))
    mm.merge_vmas(start, end)
    return changed, covered


def change_flags(parts: Parts, mm: Mm, start: int, end: int, add: set[str], remove: set[str]) -> int:
    """Change mapping flags in a range, as for MADV_HUGEPAGE or userfaultfd.

    Returns:
        0 or EINVAL; ENOMEM if some of the range is not mapped; the mapped part was changed.
    """
    if not whole_pages(parts, start, end):
        return errno.EINVAL
    _, covered = modify(parts, mm, start, end, lambda vma: ((vma.flags - remove) | add, vma.permissions))
    return 0 if covered == end - start else errno.ENOMEM


def _first_hole(mm: Mm, start: int, end: int) -> int:
    """Return the first address of a range that is not mapped; its end if all is mapped."""
    for vma in mm.vmas_in(start, end):
        if vma.start > start:
            break
        start = vma.end
    return min(start, end)


def mprotect(parts: Parts, mm: Mm, start: int, end: int, permissions: str) -> int:
    """Change the permissions of a range.

    Args:
        permissions: for example ``"rw-"`` or ``"---"``.

    Returns:
        0; EINVAL if the range does not consist of whole pages, or the permissions are not valid; ENOMEM if some of it
        is not mapped: then the part before the hole was changed.
    """
    words = zip(permissions, "rwx", strict=False)
    if len(permissions) != 3 or any(letter not in (word, "-") for letter, word in words):
        return errno.EINVAL
    if start % parts.geometry.page_size or end < start:
        return errno.EINVAL
    if start == end:
        return 0
    if not whole_pages(parts, start, end):
        return errno.EINVAL
    # The kernel works mapping by mapping, and finds the hole only when it gets there.
    stop = _first_hole(mm, start, end)
    changed, _ = modify(parts, mm, start, stop, lambda vma: (vma.flags, permissions + vma.permissions[3:]))
    for piece in changed:
        split_at(parts, mm, piece.start, piece.end)
        if "w" not in permissions:
            for _, _, ptes in mm.ranges(piece.start, piece.end):
                ptes.bits[:] &= ~P.WRITE
    return 0 if stop == end else errno.ENOMEM


def mlock(parts: Parts, mm: Mm, start: int, end: int) -> int:
    """Lock a range in memory, and make all of it present.

    Returns:
        0 or EINVAL; ENOMEM if some of it is not mapped: then the part before the hole was locked; EAGAIN if memory
        ran out.
    """
    if not whole_pages(parts, start, end):
        return errno.EINVAL
    stop = _first_hole(mm, start, end)
    pieces, _ = modify(parts, mm, start, stop, lambda vma: (vma.flags | {LOCKED}, vma.permissions))
    parts.lru.drain()
    for piece in pieces:
        _lock_pages(parts, mm, piece)
    if stop < end:
        return errno.ENOMEM
    for vma in list(mm.vmas_in(start, end)):
        if vma.permits(write=False):
            write = vma.permits(write=True)
            if fault_in(parts, mm, max(start, vma.start), min(end, vma.end), write=write) is Fault.OOM:
                return errno.EAGAIN
    return 0


def _lock_pages(parts: Parts, mm: Mm, piece: SimVma) -> None:
    """Mark the present pages (mlock_pte_range); a large folio only if all of it lies in the mapping."""
    memory = parts.memory
    for _, _, ptes in mm.ranges(piece.start, piece.end):
        heads = memory.heads(ptes.value[ptes.pages()].astype(np.int64))
        folios, counts = np.unique(heads, return_counts=True)
        sizes = np.left_shift(1, memory.order[folios].astype(np.int64))
        new = (counts == sizes) & ((memory.flags[folios] & Fl.MLOCKED) == 0)
        memory.flags[folios[new]] |= Fl.MLOCKED
        parts.counters.count("unevictable_pgs_mlocked", int(sizes[new].sum()))


def munlock(parts: Parts, mm: Mm, start: int, end: int) -> int:
    """Unlock a range; ENOMEM if some of it is not mapped: then the part before the hole was unlocked."""
    if not whole_pages(parts, start, end):
        return errno.EINVAL
    stop = _first_hole(mm, start, end)
    pieces, _ = modify(parts, mm, start, stop, lambda vma: (vma.flags - {LOCKED}, vma.permissions))
    for piece in pieces:
        _unlock_pages(parts, mm, piece.start, piece.end)
    return 0 if stop == end else errno.ENOMEM


def _unlock_pages(parts: Parts, mm: Mm, start: int, end: int) -> None:
    memory = parts.memory
    for _, _, ptes in mm.ranges(start, end):
        folios = np.unique(memory.heads(ptes.value[ptes.pages()].astype(np.int64)))
        locked = folios[(memory.flags[folios] & Fl.MLOCKED) != 0]
        memory.flags[locked] &= ~Fl.MLOCKED
        pages = int(np.left_shift(1, memory.order[locked].astype(np.int64)).sum())
        parts.counters.count("unevictable_pgs_munlocked", pages)


def fork(parts: Parts, parent: Mm, child: Mm) -> int:
    """Fill a new address space with all mappings of `parent`, to be copied on write (dup_mmap).

    Droppable mappings come without their pages. Pinned pages are copied at once, so that the pin stays valid for the
    parent.

    Returns:
        0, or ENOMEM if memory for such a copy ran out; the child keeps what was copied until then.
    """
    # MAP_DROPPABLE sets VM_WIPEONFORK, too (do_mmap(), mm/mmap.c): the child's mapping is empty.
    inherited = [vma for vma in parent.vmas if DROPPABLE not in vma.flags]
    for vma in parent.vmas:
        # An anon_vma for each mapping, also where mappings of the parent share one (anon_vma_fork(), mm/rmap.c).
        forked = vma.anon_vma > 0 and vma in inherited
        anon_vma = parts.new_anon_vma() if forked else 0
        flags = vma.flags - NOT_INHERITED
        child.insert_vma(dataclasses.replace(vma, flags=flags, anon_vma=anon_vma, forked=forked))
    parts.clock.spend("syscall")
    for vma in inherited:
        if not _copy_range(parts, parent, child, vma):
            return errno.ENOMEM
    return 0


def _copy_range(parts: Parts, parent: Mm, child: Mm, vma: SimVma) -> bool:
    for address, pages, ours in parent.ranges(vma.start, vma.end):
        # A device writes to the pinned page: if it were shared, the parent's next write would copy it, and leave the
        # device behind.
        pinned = _pinned(parts, ours)
        if pinned.any():
            split_pmd(parts, parent, address)
        theirs = child.ptes(address, pages)
        page = ours.pages() & ~pinned
        pfns = ours.value[page].astype(np.int64)
        parts.rmap.add(pfns, child.id)
        np.add.at(parts.memory.refcount, parts.memory.heads(pfns), 1)
        slots = ours.value[(ours.bits & P.SWAP) != 0]
        parts.swap.count[slots] += np.uint16(1)
        # In the parent, too: whichever writes first gets a copy.
        ours.bits[page | ((ours.bits & P.MIGRATION) != 0)] &= ~P.WRITE
        marker = (ours.bits & P.UFFD_MARKER) != 0
        # The child's mapping is not registered with userfaultfd, so its protection would mean nothing.
        theirs.bits[:] = np.where(marker | pinned, 0, ours.bits & ~P.UFFD_WP)
        theirs.value[:] = np.where(marker | pinned, 0, ours.value)
        child.anon_pages += len(pfns) + int(np.count_nonzero(ours.bits & P.MIGRATION))
        child.swap_entries += len(slots)
        if child.pmd(address) is Pmd.NONE:
            child.set_pmd(address, parent.pmd(address))
        if not all(_copy_page(parts, child, vma, ours, theirs, at) for at in np.flatnonzero(pinned).tolist()):
            return False
    return True


def _pinned(parts: Parts, ptes: Ptes) -> NDArray[np.bool_]:
    """Return which entries map pages of pinned folios: bool, shape (pages,)."""
    page = ptes.pages()
    if not parts.pins:
        return np.zeros_like(page)
    heads = parts.memory.heads(np.where(page, ptes.value, 0).astype(np.int64))
    held = [head for head, references in parts.pins.items() if references]
    pinned: NDArray[np.bool_] = page & np.isin(heads, held)
    return pinned


def _copy_page(parts: Parts, child: Mm, vma: SimVma, ours: Ptes, theirs: Ptes, at: int) -> bool:
    """Copy one page for the child (copy_present_page)."""
    new = new_folio(parts, 0, child.charge, may_wait=True)
    if new is None:
        return False
    parts.memory.content[new] = parts.memory.content[ours.value[at]]
    parts.memory.set(new, Fl.UPTODATE)
    parts.rmap.add_new_anon(new, child.id, swapbacked=not vma.droppable)
    parts.lru.add(new)
    theirs.bits[at] = ours.bits[at] & ~P.UFFD_WP
    theirs.value[at] = new
    child.anon_pages += 1
    return True


def exit_mm(parts: Parts, mm: Mm) -> None:
    """Unmap everything (exit_mmap)."""
    # First, so that khugepaged leaves the address space alone (collapse_test_exit(), mm/khugepaged.c).
    mm.exiting = True
    for vma in list(mm.vmas):
        if vma.locked:
            _unlock_pages(parts, mm, vma.start, vma.end)
        zap(parts, mm, vma.start, vma.end)
    mm.remove_vmas(0, 1 << 64)
