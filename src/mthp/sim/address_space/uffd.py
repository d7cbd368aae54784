"""userfaultfd: ranges with faults that the program itself resolves (fs/userfaultfd.c, mm/userfaultfd.c)."""

from __future__ import annotations

import errno
from collections.abc import Sequence

from mthp.sim.address_space.syscalls import change_flags, whole_pages
from mthp.sim.allocation.alloc import new_folio
from mthp.sim.frames.memory import Fl
from mthp.sim.mm import UFFD_MISSING, UFFD_WP, Mm, P, SimVma
from mthp.sim.page_tables.zap import split_at
from mthp.sim.parts import Parts

_MODES = {"missing": UFFD_MISSING, "wp": UFFD_WP}


def register(parts: Parts, mm: Mm, start: int, end: int, modes: Sequence[str]) -> int:
    """UFFDIO_REGISTER for ``"missing"``, ``"wp"`` or both; return EINVAL for other words, or an unmapped range."""
    if not modes or not set(modes) <= _MODES.keys() or not whole_pages(parts, start, end):
        return errno.EINVAL
    if not mm.vmas_in(start, end):
        return errno.EINVAL
    wanted = {_MODES[mode] for mode in modes}
    # Registering again replaces the modes; it does not add to them.
    change_flags(parts, mm, start, end, wanted, set(_MODES.values()) - wanted)
    return 0


def unregister(parts: Parts, mm: Mm, start: int, end: int) -> int:
    """UFFDIO_UNREGISTER, which also removes write-protection."""
    if not whole_pages(parts, start, end) or not mm.vmas_in(start, end):
        return errno.EINVAL
    for vma in mm.vmas_in(start, end):
        if UFFD_WP in vma.flags:
            _protect(parts, mm, max(start, vma.start), min(end, vma.end), on=False)
    change_flags(parts, mm, start, end, set(), set(_MODES.values()))
    return 0


def writeprotect(parts: Parts, mm: Mm, start: int, end: int, *, on: bool) -> int:
    """UFFDIO_WRITEPROTECT; return ENOENT if a mapping of the range is not registered for it, or none is mapped."""
    if not whole_pages(parts, start, end):
        return errno.EINVAL
    vmas = mm.vmas_in(start, end)
    for vma in vmas:
        if UFFD_WP not in vma.flags:
            return errno.ENOENT
        _protect(parts, mm, max(start, vma.start), min(end, vma.end), on=on)
    return 0 if vmas else errno.ENOENT


def _protect(parts: Parts, mm: Mm, start: int, end: int, *, on: bool) -> None:
    """Set or clear the protection of present, swap and migration entries."""
    split_at(parts, mm, start, end)
    for _, _, ptes in mm.ranges(start, end):
        if on:
            # Without UFFD_FEATURE_WP_UNPOPULATED a none entry cannot be protected.
            able = (ptes.bits & (P.PRESENT | P.SWAP | P.MIGRATION)) != 0
            ptes.bits[able] = (ptes.bits[able] | P.UFFD_WP) & ~P.WRITE
        else:
            ptes.bits[(ptes.bits & P.UFFD_MARKER) != 0] = 0
            ptes.bits[:] &= ~P.UFFD_WP


def copy(parts: Parts, mm: Mm, address: int, content: int) -> int:
    """UFFDIO_COPY of one missing page.

    Returns:
        0 or EINVAL; ENOENT if the mapping is not registered, EEXIST if the entry is not none, ENOMEM if memory ran out.
    """
    vma = _registered(mm, address)
    if address % parts.geometry.page_size:
        return errno.EINVAL
    if vma is None:
        return errno.ENOENT
    ptes = mm.ptes(address, 1)
    # A marker that only notes protection may be overwritten; anything else is EEXIST (mfill_atomic_install_pte()).
    if ptes.bits[0] & ~(P.UFFD_MARKER | P.UFFD_WP):
        return errno.EEXIST
    head = new_folio(parts, 0, mm.charge, may_wait=True)
    if head is None:
        return errno.ENOMEM
    parts.anon_vma_prepare(mm, vma)
    parts.memory.set(head, Fl.UPTODATE)
    parts.memory.content[head] = content
    parts.rmap.add_new_anon(head, mm.id, swapbacked=not vma.droppable)
    parts.add_lru_vma(vma, head)
    ptes.bits[0] = P.PRESENT | P.DIRTY | (P.WRITE if vma.permits(write=True) else 0)
    ptes.value[0] = head
    mm.anon_pages += 1
    mm.have_table(address)
    return 0


def zeropage(parts: Parts, mm: Mm, address: int) -> int:
    """UFFDIO_ZEROPAGE of one page; return the errors of :func:`copy`."""
    vma = _registered(mm, address)
    if address % parts.geometry.page_size:
        return errno.EINVAL
    if vma is None:
        return errno.ENOENT
    ptes = mm.ptes(address, 1)
    if ptes.bits[0]:
        return errno.EEXIST
    ptes.bits[0] = P.PRESENT | P.ZERO
    mm.have_table(address)
    return 0


def _registered(mm: Mm, address: int) -> SimVma | None:
    vma = mm.find_vma(address)
    return vma if vma is not None and vma.start <= address and vma.userfaultfd_armed else None
