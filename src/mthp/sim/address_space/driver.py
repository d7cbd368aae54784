"""Pages that a driver maps into a program's memory (vm_insert_page, vmf_insert_pfn)."""

from __future__ import annotations

import errno

import numpy as np

from mthp.sim.allocation.alloc import take_folio
from mthp.sim.mm import Mm, P
from mthp.sim.parts import Parts


def insert_page(parts: Parts, mm: Mm, address: int, *, managed: bool) -> int:
    """Map a page of a driver.

    Args:
        managed: the page is one of the machine's frames, held by the driver and not anonymous; otherwise it is device
            memory without a frame.

    Returns:
        0; EFAULT if the address is not mapped, EBUSY if its entry is not none, ENOMEM if no frame is free.
    """
    vma = mm.find_vma(address)
    if vma is None or vma.start > address or address % parts.geometry.page_size:
        return errno.EFAULT
    ptes = mm.ptes(address, 1)
    if ptes.bits[0]:
        return errno.EBUSY
    if managed:
        pfn = take_folio(parts, 0, may_wait=True)
        if pfn is None:
            return errno.ENOMEM
        # Not anonymous, so a scan that meets it ends with PAGE_ANON.
        parts.memory.own(np.array([pfn]))
        parts.memory.mapcount[pfn] = 1
        parts.memory.refcount[pfn] += 1
        ptes.value[0] = pfn
        mm.anon_pages += 1
    # pte_special: vm_normal_page() finds no page, and a scan ends with PAGE_NULL.
    ptes.bits[0] = P.PRESENT if managed else P.PRESENT | P.SPECIAL
    mm.have_table(address)
    return 0
