"""A machine with random operations: after every step all counts agree, and every page has its last written contents.

Programs on a machine with little memory and less swap make every system call there is, among faults, pins, reclaim,
compaction, migrations on their way, and khugepaged with others let in between its steps. ``MTHP_TEST_ROUNDS``
multiplies the lives that are lived: by default they take a few seconds, 50 make 100 000 steps.
"""

from __future__ import annotations

import errno
from collections.abc import Callable

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from mthp.geometry import Geometry
from mthp.sim import Machine
from mthp.sim.address_space.access import Fault
from mthp.sim.address_space.mremap import Remap
from mthp.sim.allocation.reclaim import reclaim
from mthp.sim.frames.memory import ZERO_CONTENT
from mthp.sim.mm import HUGEPAGE, Mm, P
from mthp.sim.parts import CollapseStep
from mthp.tunables import Switches, Tunables
from simcheck import check
from strategies import examples

GEOMETRY = Geometry("small", 4096, 4)
PAGES = 72
BASE = GEOMETRY.pmd_size
PAGE_SIZE = GEOMETRY.page_size

SPAN = st.tuples(st.integers(0, PAGES - 1), st.sampled_from([1, 2, 4, 8, 16, 20, 32])).map(
    lambda span: (BASE + span[0] * PAGE_SIZE, BASE + min(PAGES, span[0] + span[1]) * PAGE_SIZE)
)
WHICH = st.integers(0, 5)
PAGE = st.integers(0, PAGES - 1).map(lambda page: BASE + page * PAGE_SIZE)
UNLOCKED = (CollapseStep.ALLOC_CHARGE, CollapseStep.REVALIDATE, CollapseStep.REVALIDATE_AGAIN)
READ_LOCKED = (*UNLOCKED, CollapseStep.SWAPIN)
SIZES = st.dictionaries(st.integers(2, 4), st.sampled_from(["always", "madvise", "inherit", "never"]))


class Life(RuleBasedStateMachine):
    """Programs and khugepaged on a machine with little memory and less swap."""

    @initialize(
        none=st.sampled_from([0, 3, 15]),
        limit=st.sampled_from([None, None, 60]),
        left=st.sampled_from([60, 150, 900]),
        slots=st.sampled_from([0, 7, 70]),
        synchronous=st.booleans(),
        kept=st.sampled_from([0, 8]),
        policy=st.sampled_from(["mainline", "mainline", "pmd-only", "rfc", "per-order"]),
        movable=st.sampled_from([None, 0.0, 0.5, 1.0]),
        low=st.sampled_from([0, 1024]),
    )
    def start(
        self,
        none: int,
        limit: int | None,
        left: int,
        slots: int,
        synchronous: bool,
        kept: int,
        policy: str,
        movable: float | None,
        low: int = 0,
    ) -> None:
        self.machine = Machine(
            GEOMETRY,
            node_frames=[1024 + low, 1024],
            low_frames=low,
            swap_slots=slots,
            tunables=Tunables(none, 15, 15, 64),
            policy=policy,
        )
        memory = self.machine.parts.memory
        self.machine.parts.swap.synchronous = synchronous
        memory.own(memory.alloc_small(memory.free_frames - left))
        self.machine.sysfs.write("/proc/sys/vm/min_free_kbytes", str(kept * PAGE_SIZE >> 10))
        if movable is not None:
            self.machine.fragment(0.7, 4, movable=movable)
        self.shadow: dict[int, dict[int, int]] = {}
        self.lazy: dict[int, set[int]] = {}
        self.pins: dict[int, tuple[int, int]] = {}
        self.next_content = 1
        mm = self.machine.create_mm(memory.cgroups.create(limit, memory.cgroups.create()))
        self.machine.map(mm, BASE, BASE + PAGES * PAGE_SIZE, flags={HUGEPAGE})
        self.shadow[mm.id] = {}
        self.lazy[mm.id] = set()

    def mm(self, which: int) -> Mm:
        """Return one of the address spaces that there are."""
        return list(self.machine.mms.values())[which % len(self.machine.mms)]

    # Accesses.

    def stored(self, mm: Mm, address: int, content: int) -> None:
        self.shadow[mm.id][address] = content
        self.lazy[mm.id].discard(address)

    def store(self, mm: Mm, address: int) -> None:
        content = self.next_content
        self.next_content += 1
        if self.machine.write(mm, address, content) is Fault.DONE:
            self.stored(mm, address, content)

    @rule(which=WHICH, address=PAGE)
    def write(self, which: int, address: int) -> None:
        self.store(self.mm(which), address)

    @rule(which=WHICH, span=SPAN, step=st.sampled_from([1, 1, 3]))
    def touch(self, which: int, span: tuple[int, int], step: int) -> None:
        mm = self.mm(which)
        addresses = np.arange(*span, step * PAGE_SIZE)
        contents = np.arange(self.next_content, self.next_content + len(addresses))
        self.next_content += len(addresses)
        touched = self.machine.touch(mm, addresses, contents=contents)
        for address, content in zip(addresses[: touched.done].tolist(), contents.tolist(), strict=False):
            self.stored(mm, address, content)

    @rule(which=WHICH, address=PAGE)
    def read(self, which: int, address: int) -> None:
        mm = self.mm(which)
        outcome, content = self.machine.read(mm, address)
        if outcome is Fault.DONE:
            self.holds(mm, address, content)

    @rule(which=WHICH, span=SPAN)
    def read_all(self, which: int, span: tuple[int, int]) -> None:
        self.machine.touch(self.mm(which), np.arange(*span, PAGE_SIZE), write=False)

    def holds(self, mm: Mm, address: int, content: int) -> None:
        wanted = {self.shadow[mm.id].get(address, ZERO_CONTENT)}
        if address in self.lazy[mm.id]:
            wanted.add(ZERO_CONTENT)
        assert content in wanted, f"mm {mm.id} has {content} at {address:#x}, not {wanted}"

    def forget(self, mm: Mm, span: tuple[int, int]) -> None:
        for address in range(*span, PAGE_SIZE):
            self.shadow[mm.id].pop(address, None)
            self.lazy[mm.id].discard(address)

    # System calls.

    def unmap(self, mm: Mm, span: tuple[int, int]) -> None:
        assert self.machine.munmap(mm, *span) == 0
        self.forget(mm, span)

    @rule(which=WHICH, span=SPAN)
    def munmap(self, which: int, span: tuple[int, int]) -> None:
        self.unmap(self.mm(which), span)

    @rule(which=WHICH, span=SPAN, flags=st.sampled_from([{HUGEPAGE}, {HUGEPAGE}, set()]))
    def mmap(self, which: int, span: tuple[int, int], flags: set[str]) -> None:
        mm = self.mm(which)
        if not mm.vmas_in(*span):
            self.machine.map(mm, *span, flags=flags)

    @rule(which=WHICH, span=SPAN, permissions=st.sampled_from(["rw-", "rw-", "r--", "---"]))
    def mprotect(self, which: int, span: tuple[int, int], permissions: str) -> None:
        assert self.machine.mprotect(self.mm(which), *span, permissions) in (0, errno.ENOMEM)

    @rule(which=WHICH, span=SPAN)
    def mlock(self, which: int, span: tuple[int, int]) -> None:
        assert self.machine.mlock(self.mm(which), *span) in (0, errno.ENOMEM, errno.EAGAIN)

    @rule(which=WHICH, span=SPAN)
    def munlock(self, which: int, span: tuple[int, int]) -> None:
        self.machine.munlock(self.mm(which), *span)

    @rule(which=WHICH, span=SPAN, to=PAGE, keep=st.booleans())
    def mremap(self, which: int, span: tuple[int, int], to: int, keep: bool) -> None:
        mm, (start, end) = self.mm(which), span
        size = end - start
        if to + size > BASE + PAGES * PAGE_SIZE:
            return
        flags = Remap.MAYMOVE | Remap.FIXED | (Remap.DONTUNMAP if keep else Remap.NONE)
        whole, moved = self.pieces(mm, start, end)
        result = self.machine.mremap(mm, start, end, size, flags, to)
        if result == -errno.EINVAL:
            return
        assert result == (to if whole else -errno.EFAULT)
        shadow, lazy = self.shadow[mm.id], self.lazy[mm.id]
        # What lies in the gaps between them stays, at the new place too.
        for first, last in moved:
            contents = {at: shadow[at] for at in range(first, last, PAGE_SIZE) if at in shadow}
            freed = {at for at in range(first, last, PAGE_SIZE) if at in lazy}
            self.forget(mm, (first - start + to, last - start + to))
            self.forget(mm, (first, last))
            shadow |= {at - start + to: content for at, content in contents.items()}
            lazy |= {at - start + to for at in freed}

    def pieces(self, mm: Mm, start: int, end: int) -> tuple[bool, list[tuple[int, int]]]:
        """Return whether all mappings of a range can move together, and the parts that do until one cannot."""
        vmas = mm.vmas_in(start, end)
        if not vmas or vmas[0].start > start:
            return False, []
        moved: list[tuple[int, int]] = []
        for vma in vmas:
            if vma.userfaultfd_armed and (vma.start > start or vma.end < end):
                return False, moved
            moved.append((max(vma.start, start), min(vma.end, end)))
        return True, moved

    @rule(
        which=WHICH,
        span=SPAN,
        advice=st.sampled_from(["HUGEPAGE", "NOHUGEPAGE", "COLD", "PAGEOUT", "PAGEOUT", "COLLAPSE", "GUARD_REMOVE"]),
    )
    def madvise(self, which: int, span: tuple[int, int], advice: str) -> None:
        self.machine.madvise(self.mm(which), *span, advice)

    @rule(which=WHICH, span=SPAN, advice=st.sampled_from(["DONTNEED", "GUARD_INSTALL"]))
    def discard(self, which: int, span: tuple[int, int], advice: str) -> None:
        """Memory after a locked mapping is left alone if one is in the way."""
        mm = self.mm(which)
        error = self.machine.madvise(mm, *span, advice)
        stop = span[1]
        if error == errno.EINVAL:
            stop = min(vma.start for vma in mm.vmas_in(*span) if vma.locked)
        self.forget(mm, (span[0], max(span[0], stop)))

    @rule(which=WHICH, span=SPAN)
    def lazyfree(self, which: int, span: tuple[int, int]) -> None:
        mm = self.mm(which)
        self.machine.madvise(mm, *span, "FREE")
        self.lazy[mm.id] |= set(range(*span, PAGE_SIZE)) & self.shadow[mm.id].keys()

    @rule(which=WHICH, disabled=st.booleans())
    def prctl(self, which: int, disabled: bool) -> None:
        self.machine.thp_disable(self.mm(which), disabled)

    @rule(which=WHICH, span=SPAN, modes=st.sampled_from([["wp"], ["missing"], ["missing", "wp"]]))
    def uffd_register(self, which: int, span: tuple[int, int], modes: list[str]) -> None:
        self.machine.uffd_register(self.mm(which), *span, modes)

    @rule(which=WHICH, span=SPAN)
    def uffd_unregister(self, which: int, span: tuple[int, int]) -> None:
        self.machine.uffd_unregister(self.mm(which), *span)

    @rule(which=WHICH, span=SPAN, on=st.booleans())
    def uffd_writeprotect(self, which: int, span: tuple[int, int], on: bool) -> None:
        self.machine.uffd_writeprotect(self.mm(which), *span, on=on)

    @rule(which=WHICH, address=PAGE)
    def uffd_copy(self, which: int, address: int) -> None:
        mm = self.mm(which)
        if self.machine.uffd_copy(mm, address, self.next_content) == 0:
            self.stored(mm, address, self.next_content)
            self.next_content += 1

    @rule(which=WHICH)
    def fork(self, which: int) -> None:
        mm = self.mm(which)
        if len(self.machine.mms) > 4:
            return
        try:
            child = self.machine.fork(mm)
        except MemoryError:
            return
        self.shadow[child.id] = dict(self.shadow[mm.id])
        self.lazy[child.id] = set(self.lazy[mm.id])

    @rule(which=WHICH)
    def exit(self, which: int) -> None:
        if len(self.machine.mms) > 1:
            self.leave(self.mm(which))

    def leave(self, mm: Mm) -> None:
        self.machine.exit(mm)
        del self.shadow[mm.id], self.lazy[mm.id]

    @rule(which=WHICH, address=PAGE)
    def pin(self, which: int, address: int) -> None:
        """A pinned page stays at its frame until it is unpinned, and the frame has its contents."""
        mm = self.mm(which)
        if (
            self.machine.read(mm, address)[1] != ZERO_CONTENT
            and self.machine.write(mm, address, self.next_content) is Fault.DONE
        ):
            self.stored(mm, address, self.next_content)
            self.next_content += 1
            pfn = self.machine.pin(mm, address)
            self.pins[pfn] = self.pins.get(pfn, (0, 0))[0] + 1, int(self.machine.parts.memory.content[pfn])

    @rule()
    def unpin(self) -> None:
        for pfn, (times, _) in self.pins.items():
            for _ in range(times):
                self.machine.unpin(pfn)
        self.pins.clear()

    @rule(which=WHICH, address=PAGE)
    def start_migration(self, which: int, address: int) -> None:
        self.machine.start_migration(self.mm(which), address)

    @rule()
    def finish_migrations(self) -> None:
        self.machine.finish_migrations()

    # The machine.

    @rule(sizes=SIZES, enabled=st.sampled_from(["always", "madvise", "never"]))
    def switch(self, sizes: dict[int, str], enabled: str) -> None:
        self.machine.parts.switches = Switches(enabled, sizes)

    @rule(
        knob=st.sampled_from(["use_zero_page", "shrink_underused", "khugepaged/defrag"]),
        value=st.sampled_from("01"),
        defrag=st.sampled_from(["always", "madvise", "never"]),
    )
    def knobs(self, knob: str, value: str, defrag: str) -> None:
        self.machine.sysfs.write(knob, value)
        self.machine.sysfs.write("defrag", defrag)

    @rule(wanted=st.sampled_from([1, 40, 200]))
    def reclaim(self, wanted: int) -> None:
        reclaim(self.machine.parts, wanted)

    @rule()
    def compact(self) -> None:
        self.machine.sysfs.write("/proc/sys/vm/compact_memory", "1")

    @rule(sizes=SIZES)
    def khugepaged(self, sizes: dict[int, str]) -> None:
        before = self.machine.parts.switches
        self.machine.parts.switches = Switches("madvise", sizes)
        self.machine.khugepaged.full_scan()
        self.machine.parts.switches = before

    def with_other(self, steps: tuple[CollapseStep, ...], act: Callable[[Mm], None]) -> None:
        """Run a full scan. At the first time that it reaches one of some steps, another program acts."""

        def hook(at: CollapseStep, mm: Mm, address: int, order: int) -> None:
            if at in steps:
                self.machine.parts.hook = None
                act(mm)

        self.machine.parts.switches = Switches("always", {2: "always", 3: "always", 4: "always"})
        self.machine.parts.hook = hook
        self.machine.khugepaged.full_scan()
        self.machine.parts.hook = None

    @rule(span=SPAN, step=st.sampled_from(UNLOCKED), which=WHICH)
    def race_unmap(self, span: tuple[int, int], step: CollapseStep, which: int) -> None:
        self.with_other((step,), lambda mm: self.unmap(mm if which % 2 else self.mm(which), span))

    @rule(address=PAGE, step=st.sampled_from(READ_LOCKED), which=WHICH)
    def race_fault(self, address: int, step: CollapseStep, which: int) -> None:
        self.with_other((step,), lambda mm: self.store(mm if which % 2 else self.mm(which), address))

    @rule(address=PAGE, step=st.sampled_from(READ_LOCKED))
    def race_pin(self, address: int, step: CollapseStep) -> None:
        def act(mm: Mm) -> None:
            if self.machine.read(mm, address)[1] != ZERO_CONTENT:
                self.pin(list(self.machine.mms.values()).index(mm), address)

        self.with_other((step,), act)

    @rule(step=st.sampled_from(UNLOCKED))
    def race_fork(self, step: CollapseStep) -> None:
        self.with_other((step,), lambda mm: self.fork(list(self.machine.mms.values()).index(mm)))

    @rule(step=st.sampled_from(UNLOCKED))
    def race_exit(self, step: CollapseStep) -> None:
        def act(mm: Mm) -> None:
            if len(self.machine.mms) > 1:
                self.leave(mm)

        self.with_other((step,), act)

    @rule(step=st.sampled_from(READ_LOCKED), what=st.sampled_from(["reclaim", "compact", "migrate"]), address=PAGE)
    def race_with_the_machine(self, step: CollapseStep, what: str, address: int) -> None:
        def act(mm: Mm) -> None:
            if what == "reclaim":
                reclaim(self.machine.parts, 40)
            elif what == "compact":
                self.machine.sysfs.write("/proc/sys/vm/compact_memory", "1")
            else:
                self.machine.start_migration(mm, address)

        self.with_other((step,), act)

    # What always holds.

    @invariant()
    def everything_adds_up(self) -> None:
        if hasattr(self, "machine"):
            assert check(self.machine) == []

    @invariant()
    def pages_hold_what_was_written(self) -> None:
        """Return the contents, in memory or in swap, without an access."""
        if not hasattr(self, "machine"):
            return
        parts = self.machine.parts
        for mm in self.machine.mms.values():
            for table in mm.tables:
                bits, value = table.bits.ravel(), table.value.ravel()
                named = np.flatnonzero(bits & (P.PRESENT | P.SWAP | P.MIGRATION))
                in_swap = (bits[named] & P.SWAP) != 0
                frames, slots = np.where(in_swap, 0, value[named]), np.where(in_swap, value[named], 0)
                held = np.where(in_swap, parts.swap.content[slots], parts.memory.content[frames])
                held[(bits[named] & P.ZERO) != 0] = ZERO_CONTENT
                for entry, content in zip(named.tolist(), held.tolist(), strict=True):
                    self.holds(mm, ((table.first << GEOMETRY.pmd_order) + entry) * PAGE_SIZE, content)
            for address in self.shadow[mm.id].keys() - self.lazy[mm.id]:
                assert mm.ptes(address, 1).bits[0], f"mm {mm.id} lost the page at {address:#x}"

    @invariant()
    def pins_hold(self) -> None:
        if hasattr(self, "machine"):
            assert all(self.machine.parts.memory.content[pfn] >= content for pfn, (_, content) in self.pins.items())


TestLife = Life.TestCase
TestLife.settings = settings(
    max_examples=examples(40),
    stateful_step_count=60,
    suppress_health_check=list(HealthCheck),
)


def test_a_migration_that_wakes_reclaim_does_not_lose_its_folio() -> None:
    """A life that went wrong once."""
    life = Life()
    life.start(none=0, limit=None, left=60, slots=7, synchronous=False, kept=8, policy="mainline", movable=None)
    life.touch(span=(118784, 200704), step=1, which=0)
    life.start_migration(address=65536, which=0)
    life.finish_migrations()
    life.everything_adds_up()
    life.pages_hold_what_was_written()
