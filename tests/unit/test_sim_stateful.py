"""A machine under a random life: after every step everything adds up, and every page holds what was last written."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from mthp.geometry import Geometry
from mthp.sim import Machine
from mthp.sim.access import Fault
from mthp.sim.memory import ZERO_CONTENT
from mthp.sim.mm import HUGEPAGE, Mm
from mthp.sim.parts import Step
from mthp.tunables import Switches, Tunables

GEOMETRY = Geometry("small", 4096, 4)
PAGES = 40
BASE = GEOMETRY.pmd_size
SPAN = st.tuples(st.integers(0, PAGES - 1), st.integers(1, 20)).map(
    lambda span: (BASE + span[0] * 4096, BASE + min(PAGES, span[0] + span[1]) * 4096)
)
WHICH = st.integers(0, 5)
PAGE = st.integers(0, PAGES - 1).map(lambda page: BASE + page * 4096)


class Life(RuleBasedStateMachine):
    """Programs and khugepaged on a machine with little memory and less swap."""

    @initialize(none=st.sampled_from([0, 3, 15]), limit=st.sampled_from([None, None, 60]))
    def start(self, none: int, limit: int | None) -> None:
        self.machine = Machine(
            GEOMETRY,
            node_frames=[1024],
            swap_slots=32,
            tunables=Tunables(none, 15, 15, 64),
        )
        self.shadow: dict[int, dict[int, int]] = {}
        self.lazy: dict[int, set[int]] = {}
        self.pins: list[int] = []
        self.next_content = 1
        mm = self.machine.create_mm(self.machine.parts.memory.cgroups.create(limit))
        self.machine.map(mm, BASE, BASE + PAGES * 4096, flags={HUGEPAGE})
        self.shadow[mm.id] = {}
        self.lazy[mm.id] = set()

    def mm(self, which: int) -> Mm:
        """One of the address spaces that there are."""
        return list(self.machine.mms.values())[which % len(self.machine.mms)]

    @rule(which=WHICH, address=PAGE)
    def write(self, which: int, address: int) -> None:
        self.store(self.mm(which), address)

    def store(self, mm: Mm, address: int) -> None:
        content = self.next_content
        self.next_content += 1
        if self.machine.write(mm, address, content) is Fault.DONE:
            self.shadow[mm.id][address] = content
            self.lazy[mm.id].discard(address)

    @rule(which=WHICH, span=SPAN)
    def write_all(self, which: int, span: tuple[int, int]) -> None:
        mm = self.mm(which)
        for address in range(*span, 4096):
            self.store(mm, address)

    @rule(which=WHICH, address=PAGE)
    def read(self, which: int, address: int) -> None:
        mm = self.mm(which)
        outcome, content = self.machine.read(mm, address)
        if outcome is Fault.DONE:
            wanted = {self.shadow[mm.id].get(address, ZERO_CONTENT)}
            if address in self.lazy[mm.id]:
                wanted.add(ZERO_CONTENT)
            assert content in wanted

    def forget(self, mm: Mm, span: tuple[int, int]) -> None:
        for address in range(*span, 4096):
            self.shadow[mm.id].pop(address, None)
            self.lazy[mm.id].discard(address)

    @rule(which=WHICH, span=SPAN)
    def munmap(self, which: int, span: tuple[int, int]) -> None:
        self.unmap(self.mm(which), span)

    def unmap(self, mm: Mm, span: tuple[int, int]) -> None:
        assert self.machine.munmap(mm, *span) == 0
        self.forget(mm, span)

    @rule(which=WHICH, span=SPAN)
    def mmap(self, which: int, span: tuple[int, int]) -> None:
        mm = self.mm(which)
        if not mm.vmas_in(*span):
            self.machine.map(mm, *span, flags={HUGEPAGE})

    @rule(which=WHICH, span=SPAN, advice=st.sampled_from(["HUGEPAGE", "NOHUGEPAGE", "COLD", "PAGEOUT", "COLLAPSE"]))
    def madvise(self, which: int, span: tuple[int, int], advice: str) -> None:
        mm = self.mm(which)
        self.machine.madvise(mm, *span, advice)

    @rule(which=WHICH, span=SPAN)
    def dontneed(self, which: int, span: tuple[int, int]) -> None:
        mm = self.mm(which)
        self.machine.madvise(mm, *span, "DONTNEED")
        self.forget(mm, span)

    @rule(which=WHICH, span=SPAN)
    def lazyfree(self, which: int, span: tuple[int, int]) -> None:
        mm = self.mm(which)
        self.machine.madvise(mm, *span, "FREE")
        self.lazy[mm.id] |= set(range(*span, 4096)) & self.shadow[mm.id].keys()

    @rule(which=WHICH)
    def fork(self, which: int) -> None:
        mm = self.mm(which)
        if len(self.machine.mms) > 4:
            return
        child = self.machine.fork(mm)
        self.shadow[child.id] = dict(self.shadow[mm.id])
        self.lazy[child.id] = set(self.lazy[mm.id])

    @rule(which=WHICH, address=PAGE)
    def pin(self, which: int, address: int) -> None:
        mm = self.mm(which)
        if self.machine.read(mm, address)[1] != ZERO_CONTENT:
            self.pins.append(self.machine.pin(mm, address))

    @rule()
    def unpin(self) -> None:
        while self.pins:
            self.machine.unpin(self.pins.pop())

    @rule(orders=st.sets(st.integers(2, 4)))
    def switch(self, orders: set[int]) -> None:
        self.machine.parts.switches = Switches("madvise", dict.fromkeys(orders, "madvise"))

    @rule(orders=st.sets(st.integers(2, 4), min_size=1))
    def khugepaged(self, orders: set[int]) -> None:
        """A full scan with some sizes enabled, after which faults get none."""
        self.switch(orders)
        self.machine.khugepaged.full_scan()
        self.switch(set())

    @rule(span=SPAN, step=st.sampled_from([Step.ALLOC_CHARGE, Step.REVALIDATE, Step.REVALIDATE_AGAIN]))
    def race(self, span: tuple[int, int], step: Step) -> None:
        """Another thread unmaps some of the memory while it is being collapsed."""

        def hook(at: Step, mm: Mm, address: int, order: int) -> None:
            if at is step:
                self.machine.parts.hook = None
                self.unmap(mm, span)

        self.switch({2, 3, 4})
        self.machine.parts.hook = hook
        self.machine.khugepaged.full_scan()
        self.machine.parts.hook = None

    @rule(which=WHICH)
    def exit(self, which: int) -> None:
        if len(self.machine.mms) > 1:
            self.machine.exit(self.mm(which))

    @invariant()
    def everything_adds_up(self) -> None:
        if hasattr(self, "machine"):
            assert self.machine.check() == []


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)
