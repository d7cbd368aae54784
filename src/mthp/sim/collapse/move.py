"""The mover on the simulated machine.

It makes blocks in no whole PMD range of their mapping, which no kernel collapses. The pages of a block become one folio
by the steps of a collapse. The conditions differ: the mapping has to cover the block, not the PMD range, and be one
that the mover accepts (:mod:`mthp.movechecks`); swap entries are not read, shared pages are not copied, and holes are
filled only on request.
"""

from __future__ import annotations

from mthp.engine.policy import Limits
from mthp.movechecks import refuse_vma
from mthp.results import ScanResult
from mthp.sim.collapse.huge_page import Attempt
from mthp.sim.collapse.look import run_look
from mthp.sim.collapse.scan import CollapseControl
from mthp.sim.collapse.single_pmd import RangeScan
from mthp.sim.mm import Mm, Pmd, SimVma
from mthp.sim.parts import Parts


def move_block(parts: Parts, mm: Mm, address: int, order: int, *, fill: bool) -> tuple[ScanResult, str]:
    """Make one folio of the aligned block at `address`; return result and reason.

    Args:
        order: order of the folio, below the PMD order.
        fill: whether to fill holes.
    """
    vma = mm.find_vma(address)
    if vma is None or not vma.covers(address, address + parts.geometry.size_of(order)):
        return ScanResult.ADDRESS_RANGE, "it does not lie inside one mapping"
    if refusal := refuse_vma(vma.described()):
        return ScanResult.VMA_CHECK, refusal.reason
    if mm.pmd(address) is not Pmd.TABLE or not mm.ptes(address, 1 << order).bits.any():
        return ScanResult.NO_PTE_TABLE, ""
    parts.lru.drain()
    control = CollapseControl.begun(parts, "madvise", parts.collapse_orders(mm, vma, "madvise"))
    limits = Limits((1 << order) - 1 if fill else 0, 0, 0)
    ptes = mm.ptes(address, 1 << order)
    # forced: the mover asks neither whether pages were used nor whether they are lazyfree.
    look = run_look(parts, vma, ptes, limits, forced=True, large=order)
    if look.result is not ScanResult.SUCCEED:
        return look.result, ""
    attempt = _Move(parts, mm, address, order, RangeScan(look.result), control.policy, control.rules)
    attempt.limits = limits
    return attempt.run(control.node_load), ""


class _Move(Attempt):
    """A move of one block."""

    def revalidate(self) -> SimVma | ScanResult:
        """Return the mapping if it still covers the block and allows the order, or why not."""
        vma = self.mm.find_vma(self.address)
        if vma is None or self.mm.exiting:
            return ScanResult.VMA_NULL if vma is None else ScanResult.ANY_PROCESS
        if not vma.covers(self.address, self.address + self.parts.geometry.size_of(self.order)):
            return ScanResult.ADDRESS_RANGE
        if self.order not in self.parts.collapse_orders(self.mm, vma, self.rules.trigger):
            return ScanResult.VMA_CHECK
        return vma if self.mm.pmd(self.address) is Pmd.TABLE else ScanResult.NO_PTE_TABLE
