"""mremap(2): grow, shrink and move mappings with their pages, without a copy (mm/mremap.c)."""

from __future__ import annotations

import dataclasses
import enum
import errno

from mthp.sim.address_space.syscalls import cut, munmap
from mthp.sim.mm import LOCKED, UFFD_MISSING, UFFD_WP, Mm, P, Pmd
from mthp.sim.page_tables.zap import split_pmd
from mthp.sim.parts import Parts

_UFFD = {UFFD_WP, UFFD_MISSING}


class Remap(enum.Flag):
    """Flags of mremap."""

    NONE = 0
    MAYMOVE = enum.auto()
    FIXED = enum.auto()
    """Move to the given address, and unmap that range first."""
    DONTUNMAP = enum.auto()
    """Move the pages, and leave the old mapping empty."""


def mremap(
    parts: Parts, mm: Mm, start: int, end: int, size: int, flags: Remap, new_address: int | None, limit: int
) -> int:
    """Resize the mapping of a range to `size` bytes, in place or elsewhere.

    Args:
        new_address: address for FIXED, or a hint for DONTUNMAP.
        limit: the end of user space.

    Returns:
        The new address; or the negative of EINVAL, of EFAULT if one mapping does not cover the range, which may have
        several if all of it moves to a given address, or of ENOMEM if no range is free.
    """
    page = parts.geometry.page_size
    size = -(-size // page) * page
    if start % page or end < start or not size or not _possible(start, end, size, flags, new_address, page, limit):
        return -errno.EINVAL
    vma = mm.find_vma(start)
    if vma is None or vma.start > start:
        return -errno.EFAULT
    if new_address is not None and flags & Remap.FIXED and size == end - start:
        return _move_each(parts, mm, start, end, flags, new_address, limit)
    if vma.end < end:
        return -errno.EFAULT
    if start == end:
        return -errno.EINVAL  # This would duplicate the mapping, which only shared memory allows.
    if not flags & (Remap.FIXED | Remap.DONTUNMAP):
        if size <= end - start:
            if size < end - start:
                munmap(parts, mm, start + size, end)
            return start
        if vma.end == end and mm.is_free(end, start + size) and start + size <= limit:
            mm.grow_vma(vma, start + size)
            return start
        if not flags & Remap.MAYMOVE:
            return -errno.ENOMEM
    return _move(parts, mm, start, end, size, flags, new_address, limit)


def _move_each(parts: Parts, mm: Mm, start: int, end: int, flags: Remap, new_address: int, limit: int) -> int:
    """Move all mappings in a range one by one, and keep the gaps between them (remap_move(), mm/mremap.c, in 6.17)."""
    at = start
    while at < end and (vma := mm.find_vma(at)) is not None and vma.start < end:
        first, last = max(at, vma.start), min(vma.end, end)
        # The kernel would have to notify the userfaultfd in between. Mappings before this one stay moved.
        if vma.userfaultfd_armed and (first > start or vma.end < end):
            return -errno.EFAULT
        error = _move(parts, mm, first, last, last - first, flags, new_address + first - start, limit)
        if error < 0:
            return error
        at = last
    return new_address


def _possible(start: int, end: int, size: int, flags: Remap, new_address: int | None, page: int, limit: int) -> bool:
    """Return whether the combination of arguments is valid."""
    if flags & (Remap.FIXED | Remap.DONTUNMAP) and not flags & Remap.MAYMOVE:
        return False
    if flags & Remap.DONTUNMAP and size != end - start:
        return False
    if not flags & Remap.FIXED:
        return True
    if new_address is None or new_address % page or not 0 < new_address <= limit - size:
        return False
    return new_address + size <= start or new_address >= end


def _move(
    parts: Parts, mm: Mm, start: int, end: int, size: int, flags: Remap, new_address: int | None, limit: int
) -> int:
    if flags & Remap.FIXED:
        assert new_address is not None, "FIXED was checked to come with an address"
        munmap(parts, mm, new_address, new_address + size)
        if size < end - start:
            munmap(parts, mm, start + size, end)
            end = start + size
        to = new_address
    else:
        found = mm.free_range(size, limit)
        if found is None:
            return -errno.ENOMEM
        to = found
    if not flags & Remap.DONTUNMAP:
        cut(parts, mm, start)
        cut(parts, mm, end)
    vma = mm.find_vma(start)
    assert vma is not None, "the mapping was there before"
    # userfaultfd does not follow the pages, unless it asked for the event (mremap_userfaultfd_prep()), which none does
    # here.
    # Where nothing was written yet, the place in the mapping is that of the new address (copy_vma(), mm/vma.c).
    moved = vma.moved + to - start if vma.anon_vma else 0
    mm.insert_vma(dataclasses.replace(vma, start=to, end=to + size, flags=vma.flags - _UFFD, moved=moved))
    move_entries(parts, mm, start, end, to)
    parts.clock.spend("syscall")
    if flags & Remap.DONTUNMAP:
        # All of the mapping is unlocked, even if only a part was moved (dontunmap_complete, mm/mremap.c).
        vma.flags = vma.flags - {LOCKED}
        # The old mapping is empty, and so needs no anon_vma until it is written again (dontunmap_complete()).
        if (vma.start, vma.end) == (start, end):
            vma.anon_vma, vma.forked = 0, False
    else:
        mm.remove_vmas(start, end)
    # Only there: what DONTUNMAP leaves is not compared with its neighbours.
    # Nor is the new mapping merged with the one that it left, as recorded on 7.3; 6.18 did merge the two.
    mm.merge_vmas(to, to + size, apart=vma if flags & Remap.DONTUNMAP else None)
    return to


def move_entries(parts: Parts, mm: Mm, start: int, end: int, to: int) -> None:
    """Move the page table entries of a range (move_page_tables); a PMD entry as a whole if both ends are aligned."""
    size, page = parts.geometry.pmd_size, parts.geometry.page_size
    while start < end:
        # Up to the next border of a page table, of the old place or of the new one.
        stop = min(end, start // size * size + size, start + size - to % size)
        if mm.pmd(start) is not Pmd.NONE:
            whole = stop - start == size
            if not whole:
                split_pmd(parts, mm, start)
                split_pmd(parts, mm, to)
            pages = (stop - start) // page
            ours, theirs = mm.ptes(start, pages), mm.ptes(to, pages)
            theirs.bits[:] = ours.bits & ~P.UFFD_WP
            theirs.bits[(theirs.bits & P.UFFD_MARKER) != 0] = 0
            theirs.value[:] = ours.value
            ours.bits[:] = 0
            ours.value[:] = 0
            if whole:
                mm.set_pmd(to, mm.pmd(start))
                mm.set_pmd(start, Pmd.NONE)
            else:
                mm.have_table(to)
        to += stop - start
        start = stop
