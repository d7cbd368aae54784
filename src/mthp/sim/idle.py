"""What khugepaged passes over without trying anything, many PMD ranges at once."""

from __future__ import annotations

import numpy as np

from mthp.addrspace import Segment
from mthp.collapse.machine_seam import Passage
from mthp.results import ScanResult
from mthp.sim.mm import Mm, Pmd, SimVma
from mthp.sim.parts import Parts
from mthp.sim.scan import CollapseControl
from mthp.sim.trace import ScanPmd


def pass_over(
    parts: Parts, mm: Mm, vma: SimVma, stretch: Segment, control: CollapseControl, budget: int
) -> Passage | None:
    """Pass over the ranges at the start of `stretch` that have no page table to look at.

    Returns:
        What came of them; None if the first range has a page table.
    """
    start, end = stretch
    found = mm.row(start)
    assert found is not None, f"nothing is mapped at {start:#x}"
    table, row = found
    size = parts.geometry.pmd_size
    pmds = table.pmd[row : row + min((end - start) // size, budget)]
    tables = pmds == Pmd.TABLE
    count = int(tables.argmax()) if tables.any() else len(pmds)
    if not count:
        return None
    huge = pmds[:count] == Pmd.HUGE
    results = np.where(huge, np.int8(ScanResult.PMD_MAPPED), np.int8(ScanResult.NO_PTE_TABLE))
    addresses = np.arange(start, start + count * size, size, dtype=np.uint64)
    if parts.trace.enabled:
        for address, result in zip(addresses.tolist(), results.tolist(), strict=True):
            parts.trace.emit(ScanPmd(mm.id, address, ScanResult(result), 0, 0, 0))
    return Passage(start + count * size, count, addresses, results, ScanResult(int(results[-1])))
