"""A mapping of the simulated machine, as khugepaged looks at it and works on it."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from mthp.collapse.machine_seam import RangeScan
from mthp.collapse.policy import Limits, Policy, Rules
from mthp.errors import UnsupportedError
from mthp.results import ScanResult
from mthp.sim.collapse import collapse_huge_page
from mthp.sim.look import scan_look
from mthp.sim.mm import Mm, Pmd, SimVma
from mthp.sim.parts import Parts
from mthp.sim.trace import ScanPmd

_EXCEEDED = {
    ScanResult.EXCEED_NONE_PTE: ("thp_scan_exceed_none_pte", "collapse_exceed_none_pte"),
    ScanResult.EXCEED_SWAP_PTE: ("thp_scan_exceed_swap_pte", "collapse_exceed_swap_pte"),
    ScanResult.EXCEED_SHARED_PTE: ("thp_scan_exceed_share_pte", "collapse_exceed_shared_pte"),
}
"""The counter of the machine and the counter of the size for each limit that was exceeded."""


@dataclass
class CollapseControl:
    """Who collapses, by what rules, and how far it got (struct collapse_control).

    Attributes:
        rules: the circumstances, the orders enabled for the mapping at hand among them.
        progress: entries looked at, and ranges and mappings passed over.
        node_load: int64, shape (nodes,): pages of the PMD range at hand on each node.
        lock_dropped: the range at hand passed its scan, so that mmap_lock was let go of for the attempts.
    """

    policy: Policy
    rules: Rules
    progress: int = 0
    node_load: NDArray[np.int64] = field(default_factory=lambda: np.zeros(1, np.int64))
    lock_dropped: bool = False


class SimRange:
    """The :class:`~mthp.collapse.machine_seam.RangeTarget` of the simulated machine."""

    def __init__(self, parts: Parts, mm: Mm, vma: SimVma, control: CollapseControl) -> None:
        self._parts = parts
        self._mm = mm
        self._vma = vma
        self._control = control

    def scan_pmd(self, address: int) -> RangeScan:
        parts, control = self._parts, self._control
        pmd = self._mm.pmd(address)
        if pmd is not Pmd.TABLE:
            control.progress += 1
            return RangeScan(ScanResult.PMD_MAPPED if pmd is Pmd.HUGE else ScanResult.NO_PTE_TABLE)
        ptes = self._mm.ptes(address, parts.geometry.ptes_per_pmd)
        look = scan_look(parts, self._vma, ptes, self._limits(), forced=control.rules.forced)
        entries = min(look.at + 1, parts.geometry.ptes_per_pmd)
        control.progress += entries
        parts.clock.spend("scan_range")
        parts.clock.spend("scan_pte", entries)
        referenced = 0 if control.rules.forced else look.referenced
        result = look.result
        if result in _EXCEEDED:
            of_machine, of_size = _EXCEEDED[result]
            parts.counters.count(of_machine)
            parts.counters.count_mthp(parts.geometry.pmd_order, of_size)
        elif result is ScanResult.SUCCEED and not control.rules.forced:
            wanted = parts.geometry.ptes_per_pmd // 2 if look.unmapped else 1
            if referenced < wanted:
                result = ScanResult.LACK_REFERENCED_PAGE
        if result is not ScanResult.SUCCEED:
            return RangeScan(result, None, referenced, look.none_or_zero, look.unmapped)
        control.lock_dropped = True
        nodes = parts.memory.nodes_of(look.heads)
        control.node_load = np.bincount(nodes, minlength=len(parts.memory.zones)).astype(np.int64)
        return RangeScan(result, ptes.pages(), referenced, look.none_or_zero, look.unmapped)

    def _limits(self) -> Limits:
        """What the scan lets pass."""
        policy, rules = self._control.policy, self._control.rules
        limits = policy.scan_limits(rules)
        if limits is None:
            raise UnsupportedError(f"the simulated machine has no walk for policy {policy.name!r}")
        if self._vma.userfaultfd_armed and policy.scan_honours_uffd(rules):
            limits = limits._replace(none=0)
        return limits

    def collapse_huge_page(self, address: int, order: int, scan: RangeScan) -> ScanResult:
        control = self._control
        return collapse_huge_page(
            self._parts, self._mm, address, order, scan, control.policy, control.rules, control.node_load
        )

    def scanned(self, address: int, scan: RangeScan, result: ScanResult) -> None:
        event = ScanPmd(self._mm.id, address, result, scan.referenced, scan.none_or_zero, scan.unmapped)
        self._parts.trace.emit(event)
