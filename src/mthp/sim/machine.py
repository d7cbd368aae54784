"""The simulated machine: memory, swap, address spaces, and the two who collapse.

>>> from mthp.sim import Machine
>>> machine = Machine()
>>> mm = machine.create_mm()
>>> vma = machine.map(mm, 1 << 21, 2 << 21, flags={"hg"})
"""

from __future__ import annotations

import dataclasses
import errno
from collections import Counter
from collections.abc import Iterable, Sequence

from mthp.collapse.policy import Policy, Rules, policy_named
from mthp.collapse.single_pmd import check_policy, collapse_single_pmd
from mthp.eligibility import Trigger
from mthp.errors import UsageError
from mthp.geometry import X86_64, Geometry
from mthp.results import ScanResult
from mthp.sim import syscalls
from mthp.sim.access import Fault, access
from mthp.sim.check import check
from mthp.sim.counters import Counters
from mthp.sim.khugepaged import Khugepaged
from mthp.sim.lru import LruAddBatch
from mthp.sim.memory import Memory
from mthp.sim.mm import Mm, Pmd, SimVma
from mthp.sim.parts import Parts
from mthp.sim.rmap import Rmap
from mthp.sim.scan import CollapseControl, SimRange
from mthp.sim.swap import Swap
from mthp.sim.trace import Trace
from mthp.tunables import Switches, Tunables

GUP_PIN = 1024
"""References that a pin takes of a folio of order 0 (GUP_PIN_COUNTING_BIAS, include/linux/mm.h)."""

MAX_MMS = 0x7FFE
"""Address spaces that a machine can have at a time; a large folio has 15 bits for the number of one."""

ADDRESS_LIMIT = 1 << 47
"""The address behind the last one of user space, as on x86-64."""


class Machine:
    """One simulated machine with one CPU.

    Args:
        geometry: page size and PMD order.
        node_frames: frames of each NUMA node; by default one node of 64 PMD ranges.
        swap_slots: pages of the swap device.
        switches, tunables: by default those that a kernel starts with.
        policy: what khugepaged and MADV_COLLAPSE collapse to.

    Raises:
        UnsupportedError: `policy` walks in a manner that is not modelled here.

    Attributes:
        parts: memory, swap, LRU, reverse map, counters and trace.
        mms: the address spaces, by number.
        pins: references that pins hold, by the head of the folio.
    """

    def __init__(
        self,
        geometry: Geometry = X86_64,
        *,
        node_frames: Sequence[int] | None = None,
        swap_slots: int = 0,
        switches: Switches | None = None,
        tunables: Tunables | None = None,
        policy: str | Policy = "mainline",
    ) -> None:
        counters = Counters(geometry)
        memory = Memory(geometry, node_frames or [64 * geometry.ptes_per_pmd], counters)
        self.parts = Parts(
            geometry,
            (tunables or Tunables.defaults(geometry)).checked(geometry),
            switches or Switches.defaults(geometry),
            memory,
            Swap(memory, swap_slots),
            LruAddBatch(memory),
            Rmap(memory, counters),
            counters,
            Trace(),
        )
        self.policy = check_policy(policy_named(policy))
        self.mms: dict[int, Mm] = {}
        self.pins: Counter[int] = Counter()
        self.khugepaged = Khugepaged(self)

    @property
    def geometry(self) -> Geometry:
        """Page size and PMD order."""
        return self.parts.geometry

    @property
    def counters(self) -> Counters:
        """vmstat, khugepaged's counts and the per-size stats."""
        return self.parts.counters

    @property
    def trace(self) -> Trace:
        """The trace events of the collapse path."""
        return self.parts.trace

    def create_mm(self, cgroup: int = 0) -> Mm:
        """A new, empty address space.

        Raises:
            UsageError: there are too many already.
        """
        number = next((n for n in range(1, MAX_MMS + 1) if n not in self.mms), None)
        if number is None:
            raise UsageError(f"a machine has at most {MAX_MMS} address spaces")
        mm = Mm(number, self.geometry, cgroup)
        self.mms[number] = mm
        return mm

    def map(self, mm: Mm, start: int, end: int, *, flags: Iterable[str] = (), anon_vma: bool = False) -> SimVma:
        """Add a private anonymous mapping.

        Args:
            start, end: half-open range of addresses.
            flags: two-letter words of VmFlags.
            anon_vma: as if something had been written there already.

        Raises:
            UsageError: not whole pages, outside user space, or over another mapping.
        """
        page = self.geometry.page_size
        if start % page or end % page or not 0 < start < end <= ADDRESS_LIMIT:
            raise UsageError(f"{start:#x}-{end:#x} is not a range of whole pages of {page} bytes in user space")
        next_vma = mm.find_vma(start)
        if next_vma is not None and next_vma.start < end:
            raise UsageError(f"{start:#x}-{end:#x} overlaps the mapping at {next_vma.start:#x}")
        vma = SimVma(start, end, set(flags), anon_vma)
        mm.insert_vma(vma)
        self.khugepaged.enter(mm, vma)
        return vma

    def control(self, trigger: Trigger, orders: tuple[int, ...] = ()) -> CollapseControl:
        """A fresh account of a collapse, under the limits of this moment."""
        return CollapseControl(self.policy, Rules(self.geometry, orders, trigger, self.parts.tunables))

    def collapse_range(self, mm: Mm, vma: SimVma, address: int, control: CollapseControl) -> ScanResult:
        """Collapse what is to be collapsed of one PMD range, for khugepaged and MADV_COLLAPSE alike."""
        control.rules = dataclasses.replace(
            control.rules,
            orders=self.parts.collapse_orders(mm, vma, control.rules.trigger),
            tunables=self.parts.tunables,
        )
        result = collapse_single_pmd(SimRange(self.parts, mm, vma, control), address, control.policy, control.rules)
        if result is ScanResult.SUCCEED and not control.rules.forced:
            self.counters.count("pages_collapsed")
        return result

    def read(self, mm: Mm, address: int) -> tuple[Fault, int]:
        """A program reads the page at `address`: how that ended, and what the page holds."""
        return access(self.parts, mm, address, None)

    def write(self, mm: Mm, address: int, content: int) -> Fault:
        """A program writes to the page at `address`, which holds `content` from then on."""
        outcome, _ = access(self.parts, mm, address, content)
        return outcome

    def munmap(self, mm: Mm, start: int, end: int) -> int:
        """Unmap a range: 0 or an error number."""
        return syscalls.munmap(self.parts, mm, start, end)

    def madvise(self, mm: Mm, start: int, end: int, advice: str) -> int:
        """madvise(2) with ``"COLLAPSE"`` or an advice of :func:`mthp.sim.syscalls.madvise`: 0 or an error number."""
        if advice == "COLLAPSE":
            return self.madvise_collapse(mm, start, end)
        error = syscalls.madvise(self.parts, mm, start, end, advice)
        for vma in mm.vmas_in(start, end) if advice == "HUGEPAGE" else ():
            self.khugepaged.enter(mm, vma)
        return error

    def fork(self, parent: Mm) -> Mm:
        """A child with all that `parent` maps."""
        child = self.create_mm(parent.charge)
        child.thp_disabled = parent.thp_disabled
        syscalls.fork(self.parts, parent, child)
        if parent in self.khugepaged.mms:
            self.khugepaged.mms.append(child)
        return child

    def exit(self, mm: Mm) -> None:
        """The last thread of a process ends."""
        syscalls.exit_mm(self.parts, mm)
        self.khugepaged.exit(mm)
        del self.mms[mm.id]

    def pin(self, mm: Mm, address: int) -> int:
        """Pin the page at `address` as I/O does (pin_user_pages with FOLL_PIN), and give its frame to unpin it by.

        Raises:
            UsageError: no page is mapped there.
        """
        page = self.geometry.page_size
        if mm.pmd(address) is Pmd.NONE or not (ptes := mm.ptes(address // page * page, 1)).pages()[0]:
            raise UsageError(f"no page is mapped at {address:#x}")
        pfn = int(ptes.value[0])
        self._hold(pfn, GUP_PIN if self.parts.memory.order[pfn] == 0 else 1)
        return pfn

    def unpin(self, pfn: int) -> None:
        """Take back one pin of a frame."""
        head = self.parts.memory.head(pfn)
        references = GUP_PIN if self.parts.memory.order[pfn] == 0 else 1
        self.pins[head] -= references
        self.parts.memory.put(head, references)

    def _hold(self, pfn: int, references: int) -> None:
        head = self.parts.memory.head(pfn)
        self.pins[head] += references
        self.parts.memory.refcount[head] += references

    def check(self) -> list[str]:
        """Everything that does not add up, as sentences; empty if all does (:mod:`mthp.sim.check`)."""
        return check(self)

    def madvise_collapse(self, mm: Mm, start: int, end: int) -> int:
        """madvise(start, end - start, MADV_COLLAPSE) over one mapping: 0 or the error number (madvise_collapse)."""
        vma = mm.find_vma(start)
        if vma is None or not vma.covers(start, end):
            return errno.ENOMEM
        if not self.parts.collapse_orders(mm, vma, "madvise"):
            return errno.EINVAL
        first, stop = dataclasses.replace(vma.described(), start=start, end=end).pmd_ranges(self.geometry)
        if first >= stop:
            return 0
        control = self.control("madvise")
        self.parts.lru.drain()
        last_fail, done, address = ScanResult.FAIL, 0, first
        while address < stop:
            result = self.collapse_range(mm, vma, address, control)
            address += self.geometry.pmd_size
            if result in (ScanResult.SUCCEED, ScanResult.PMD_MAPPED):
                done += 1
                continue
            last_fail = result
            if result not in _GOES_ON_AFTER:
                break
        return 0 if done * self.geometry.pmd_size == stop - first else _ERRNO.get(last_fail, errno.EINVAL)


_GOES_ON_AFTER = frozenset(
    {
        ScanResult.NO_PTE_TABLE,
        ScanResult.PTE_NON_PRESENT,
        ScanResult.PTE_UFFD,
        ScanResult.LACK_REFERENCED_PAGE,
        ScanResult.PAGE_NULL,
        ScanResult.PAGE_COUNT,
        ScanResult.PAGE_LOCK,
        ScanResult.PAGE_LRU,
        ScanResult.DEL_PAGE_LRU,
    }
)
"""Failures of one PMD range after which MADV_COLLAPSE goes on with the next."""

_ERRNO = {
    ScanResult.ALLOC_HUGE_PAGE_FAIL: errno.ENOMEM,
    ScanResult.CGROUP_CHARGE_FAIL: errno.EBUSY,
    ScanResult.EXCEED_NONE_PTE: errno.EBUSY,
    ScanResult.PAGE_COUNT: errno.EAGAIN,
    ScanResult.PAGE_LOCK: errno.EAGAIN,
    ScanResult.PAGE_LRU: errno.EAGAIN,
    ScanResult.DEL_PAGE_LRU: errno.EAGAIN,
}
"""madvise_collapse_errno (mm/khugepaged.c); EINVAL for the rest."""
