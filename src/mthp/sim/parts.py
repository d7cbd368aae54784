"""The parts of the machine, which all its paths share, and the hook for other actors between steps."""

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
from mthp.sim.trace import EventTrace
from mthp.tunables import Switches, Tunables


class CollapseStep(enum.Enum):
    """The steps of collapse_huge_page, and what other actors may do just before each of them."""

    # The kernel holds no lock of the address space before the next two and REVALIDATE_AGAIN: anything may happen there.
    ALLOC_CHARGE = enum.auto()
    REVALIDATE = enum.auto()
    # mmap_lock is held for reading: faults, pins and reclaim continue.
    SWAPIN = enum.auto()
    REVALIDATE_AGAIN = enum.auto()
    # mmap_lock is held for writing, and the PMD entry is cleared: memory may still fail, and pages that other address
    # spaces map may be pinned through those.
    ISOLATE = enum.auto()
    COPY = enum.auto()
    INSTALL = enum.auto()


Hook = Callable[[CollapseStep, Mm, int, int], None]
"""Called before a step with the step, the address space, the address of the run and its order."""


@dataclass
class Parts:
    """The parts of a machine.

    Attributes:
        policy: policy of khugepaged and MADV_COLLAPSE.
        mthp_min_order: the seed's MTHP_MIN_ORDER, for the policy ``rfc``.
        mms: the address spaces, by number.
        pins: references that pins hold, by the head of the folio.
        migrating: heads of the folios under migration.
        anon_vmas: numbers of anon_vmas used so far.
        reclaim_at: number of the address space, and address in it, where reclaim continues.
        hook: called between the steps of a collapse, for other actors.
        kernel: rules of the kernel, apart from the policy.
        beyond_table: address of the first run in which a series read entries beyond the end of a page table; their
            contents are not known.
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
    trace: EventTrace
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
        """Count in ``/proc/vmstat``, which most kernels do for the PMD order only, and in the stats of the size."""
        if order == self.geometry.pmd_order or self.kernel.counts_every_order:
            self.counters.count(of_machine, by)
        self.counters.count_mthp(order, of_size, by)

    def let_in(self, step: CollapseStep, mm: Mm, address: int, order: int) -> None:
        """Let other actors run."""
        if self.hook is not None:
            self.hook(step, mm, address, order)

    def new_anon_vma(self) -> int:
        """Return the number of a new anon_vma."""
        self.anon_vmas += 1
        return self.anon_vmas

    def anon_vma_prepare(self, mm: Mm, vma: SimVma) -> None:
        """Before a write, set the anon_vma of a mapping: that of a mergeable neighbour, else a new one."""
        if vma.anon_vma:
            return
        # The next mapping first, as in find_mergeable_anon_vma() (mm/vma.c).
        beside = (mm.find_vma(vma.end), mm.find_vma(vma.start - 1))
        near = [other for other in beside if other and (other.start == vma.end or other.end == vma.start)]
        # So that the two can still merge (reusable_anon_vma(), mm/vma.c).
        theirs = [other.anon_vma for other in near if other.anon_vma and other.alike(vma)]
        vma.anon_vma = theirs[0] if theirs else self.new_anon_vma()

    def add_lru_vma(self, vma: SimVma, head: int) -> None:
        """Put a new folio on the LRU lists (folio_add_lru_vma)."""
        # Through the batch of mlock instead of lru_add, which it does not drain (mlock_new_folio(), mm/mlock.c).
        if vma.locked:
            self.memory.set(head, Fl.MLOCKED | Fl.LRU)
            self.counters.count("unevictable_pgs_mlocked", self.memory.size(head))
        else:
            self.lru.add(head)

    def collapse_orders(self, mm: Mm, vma: SimVma, trigger: Trigger) -> tuple[int, ...]:
        """Return the orders to which `vma` may be collapsed, ascending (collapse_possible_orders)."""
        # The same as mthp.eligibility for anonymous memory, without the reasons: every attempt calls this twice.
        if mm.thp_disabled or NOHUGEPAGE in vma.flags or not vma.anon_vma:
            return ()
        # MADV_COLLAPSE ignores the switches (TVA_FORCED_COLLAPSE in __thp_vma_allowable_orders(), mm/huge_memory.c).
        if trigger == "madvise":
            return self.geometry.anon_orders
        return self.switches.orders(advised=HUGEPAGE in vma.flags)

    def fault_orders(self, mm: Mm, vma: SimVma) -> tuple[int, ...]:
        """Return the orders that a fault in `vma` may allocate, ascending (thp_vma_allowable_orders, TVA_PAGEFAULT)."""
        if mm.thp_disabled or NOHUGEPAGE in vma.flags:
            return ()
        return self.switches.orders(advised=HUGEPAGE in vma.flags)
