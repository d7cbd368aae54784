"""What the paths through the machine work on, and where others are let in between their steps."""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from mthp.eligibility import Trigger
from mthp.engine.policy import Policy
from mthp.geometry import Geometry
from mthp.sim.clock import Clock
from mthp.sim.counters import Counters
from mthp.sim.frames.lru import LruAddBatch
from mthp.sim.frames.memory import Fl, Memory
from mthp.sim.frames.rmap import Rmap
from mthp.sim.frames.swap import Swap
from mthp.sim.kernel import NEWEST, Kernel
from mthp.sim.knobs import Knobs
from mthp.sim.mm import HUGEPAGE, NOHUGEPAGE, Mm, SimVma
from mthp.sim.trace import Trace
from mthp.tunables import Switches, Tunables


class Step(enum.Enum):
    """The steps of collapse_huge_page, and what others may do just before each of them.

    The kernel holds no lock of the address space before ALLOC_CHARGE, REVALIDATE and REVALIDATE_AGAIN: anything may
    happen there. Before SWAPIN it holds mmap_lock for reading: faults, pins and reclaim go on. From ISOLATE on it
    holds it for writing and has taken the PMD entry away: memory may still fail, and pages that other address spaces
    map may be pinned from there.
    """

    ALLOC_CHARGE = enum.auto()
    REVALIDATE = enum.auto()
    SWAPIN = enum.auto()
    REVALIDATE_AGAIN = enum.auto()
    ISOLATE = enum.auto()
    COPY = enum.auto()
    INSTALL = enum.auto()


Hook = Callable[[Step, Mm, int, int], None]
"""Called before a step with the step, the address space, the address of the run and its order."""


@dataclass
class Parts:
    """The parts of a machine.

    Attributes:
        policy: what khugepaged and MADV_COLLAPSE collapse to.
        mthp_min_order: the seed's MTHP_MIN_ORDER, for the policy ``rfc``.
        mms: the address spaces, by number.
        pins: references that pins hold, by the head of the folio.
        migrating: heads of the folios that are on their way to other frames.
        anon_vmas: numbers of anon_vmas given out so far.
        reclaim_at: number of the address space, and address in it, where reclaim goes on.
        hook: lets other actors in between the steps of a collapse.
        kernel: the rules of the kernel, apart from the policy.
        beyond_table: address of the first run in which a series read entries behind the end of a page table; nothing
            tells what they hold.
    """

    geometry: Geometry
    policy: Policy
    mthp_min_order: int
    tunables: Tunables
    switches: Switches
    memory: Memory
    swap: Swap
    lru: LruAddBatch
    rmap: Rmap
    counters: Counters
    trace: Trace
    clock: Clock = field(default_factory=Clock)
    knobs: Knobs = field(default_factory=Knobs)
    mms: dict[int, Mm] = field(default_factory=dict)
    pins: Counter[int] = field(default_factory=Counter)
    migrating: dict[int, None] = field(default_factory=dict)
    reclaim_at: tuple[int, int] = (0, 0)
    anon_vmas: int = 0
    hook: Hook | None = None
    kernel: Kernel = NEWEST
    beyond_table: int | None = None

    def count_order(self, order: int, of_machine: str, of_size: str, by: int = 1) -> None:
        """Count under a name of ``/proc/vmstat``, which most kernels do for the PMD order alone, and under a size's."""
        if order == self.geometry.pmd_order or self.kernel.counts_every_order:
            self.counters.count(of_machine, by)
        self.counters.count_mthp(order, of_size, by)

    def let_in(self, step: Step, mm: Mm, address: int, order: int) -> None:
        """Give other actors their turn."""
        if self.hook is not None:
            self.hook(step, mm, address, order)

    def new_anon_vma(self) -> int:
        """The number of a new anon_vma."""
        self.anon_vmas += 1
        return self.anon_vmas

    def anon_vma_prepare(self, mm: Mm, vma: SimVma) -> None:
        """Something is about to be written to a mapping: give it an anon_vma, a neighbour's if they could be one."""
        if vma.anon_vma:
            return
        beside = (mm.find_vma(vma.end), mm.find_vma(vma.start - 1))
        near = [other for other in beside if other and (other.start == vma.end or other.end == vma.start)]
        theirs = [other.anon_vma for other in near if other.anon_vma and other.alike(vma)]
        vma.anon_vma = theirs[0] if theirs else self.new_anon_vma()

    def add_lru_vma(self, vma: SimVma, head: int) -> None:
        """Put a new folio on the LRU lists (folio_add_lru_vma).

        In a locked mapping it goes through the batch of mlock instead of lru_add: what waits there goes on waiting.
        """
        if vma.locked:
            self.memory.set(head, Fl.MLOCKED | Fl.LRU)
            self.counters.count("unevictable_pgs_mlocked", self.memory.size(head))
        else:
            self.lru.add(head)

    def collapse_orders(self, mm: Mm, vma: SimVma, trigger: Trigger) -> tuple[int, ...]:
        """Orders to which `vma` may be collapsed, ascending (collapse_possible_orders).

        What :func:`mthp.eligibility.eligibility` says of anonymous memory, without its reasons: this is asked twice
        for every attempt.
        """
        if mm.thp_disabled or NOHUGEPAGE in vma.flags or not vma.anon_vma:
            return ()
        if trigger == "madvise":
            return self.geometry.anon_orders
        return self.switches.orders(advised=HUGEPAGE in vma.flags)

    def fault_orders(self, mm: Mm, vma: SimVma) -> tuple[int, ...]:
        """Orders that a fault in `vma` may allocate, ascending (thp_vma_allowable_orders with TVA_PAGEFAULT)."""
        if mm.thp_disabled or NOHUGEPAGE in vma.flags:
            return ()
        return self.switches.orders(advised=HUGEPAGE in vma.flags)
