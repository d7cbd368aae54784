"""khugepaged skips the same ranges in one step as range by range."""

from __future__ import annotations

from random import Random

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mthp.engine.visited import Passage, VisitedSpace
from mthp.results import ScanResult
from mthp.sim import Machine
from mthp.sim.collapse.simkhugepaged import SimulatedKhugepaged
from mthp.sim.frames.memory import Fl
from mthp.sim.parts import CollapseStep, Parts
from mthp.sim.state import columns
from mthp.tunables import Switches, Tunables
from simcheck import check
from simworld import PAGE, SMALL, START
from strategies import examples

RANGES = 24


class Watched(SimulatedKhugepaged):
    """Records its calls."""

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts)
        self.told: list[Passage] = []
        self._listener = self._tell

    def _tell(self, _slot: VisitedSpace, passage: Passage) -> None:
        self.told.append(passage)


def lived(seed: int, orders: frozenset[int], none: int, budget: int, singly: bool) -> tuple[Machine, Watched]:
    """Return a machine with large folios, holes, small pages, sharers and pins, after some passes.

    Args:
        singly: run a callback between the steps, which makes the machine scan each range alone.
    """
    chance = Random(seed)
    machine = Machine(
        SMALL,
        node_frames=[4096],
        swap_slots=64,
        switches=Switches("madvise", dict.fromkeys(orders, "madvise")),
        tunables=Tunables(none, 4, 8, budget),
    )
    daemon = machine.khugepaged = Watched(machine.parts)
    if singly:
        machine.parts.hook = _nothing
    mm = machine.create_mm(machine.parts.memory.cgroups.create())
    machine.map(mm, START, START + RANGES * SMALL.pmd_size)
    share = chance.choice((0.2, 0.9, 1.0))
    pages = [page for page in range(RANGES * 16) if chance.random() < share or page % 16 < 8]
    machine.touch(mm, [START + page * PAGE for page in pages])
    machine.madvise(mm, START, START + RANGES * SMALL.pmd_size, "HUGEPAGE")
    daemon.full_scan()
    child = machine.fork(mm) if chance.random() < 0.3 else None
    for _ in range(chance.choice((0, 0, 1, 4))):
        address = START + chance.randrange(RANGES * 16) * PAGE
        match chance.randrange(5):
            case 0:
                machine.madvise(mm, address, address + PAGE, "DONTNEED")
            case 1:
                machine.madvise(mm, address, address + 4 * PAGE, "FREE")
            case 2:
                machine.pin(mm, address)
            case 3:
                machine.madvise(mm, address, address + 8 * PAGE, "PAGEOUT")
            case _:
                machine.write(mm, address, 77)
    if chance.random() < 0.2:
        machine.parts.memory.cgroups.set_limit(mm.charge, mm.anon_pages + 2)
    if child is not None and chance.random() < 0.5:
        machine.exit(child)
    for _ in range(6):
        daemon.do_scan()
    assert check(machine) == []
    return machine, daemon


def in_use(machine: Machine) -> NDArray[np.bool_]:
    """Which frames are: bool, shape (frames,)."""
    mask: NDArray[np.bool_] = (machine.parts.memory.flags & Fl.ALLOCATED) != 0
    return mask


@settings(max_examples=examples(30))
@given(
    seed=st.integers(0, 1 << 30),
    orders=st.frozensets(st.integers(2, 4), min_size=1),
    none=st.sampled_from([0, 2, 15]),
    budget=st.sampled_from([1, 100, 1 << 20]),
)
@example(seed=1, orders=frozenset({2}), none=0, budget=1 << 20)
def test_many_at_a_time_is_one_by_one(seed: int, orders: frozenset[int], none: int, budget: int) -> None:
    (fast, by_many), (slow, by_one) = (lived(seed, orders, none, budget, singly) for singly in (False, True))
    assert by_many.statistics == by_one.statistics
    assert by_many.address == by_one.address
    assert [attempt for passage in by_many.told for attempt in passage.attempts] == [
        attempt for passage in by_one.told for attempt in passage.attempts
    ]
    assert fast.counters.values() == slow.counters.values()
    assert fast.clock.spent_ns() == slow.clock.spent_ns()
    for one, other in zip(columns(fast.parts), columns(slow.parts), strict=True):
        # The contents of frames that were allocated and freed differ.
        here = in_use(fast) if len(one) == len(in_use(fast)) else slice(None)
        assert np.array_equal(one[here], other[here])
    assert fast.parts.memory.zones[0].free_blocks() == slow.parts.memory.zones[0].free_blocks()


def test_what_has_its_large_folios_is_looked_at_together() -> None:
    machine = Machine(SMALL, node_frames=[2048], switches=Switches("never"), tunables=Tunables(0, 4, 8, 1 << 20))
    daemon = machine.khugepaged = Watched(machine.parts)
    mm = machine.create_mm()
    machine.map(mm, START, START + RANGES * SMALL.pmd_size, flags={"hg"})
    machine.touch(mm, [START + page * PAGE for page in range(RANGES * 16) if page % 16 < 12])
    daemon.visit(mm)
    machine.parts.switches = Switches("madvise", {2: "madvise"})
    daemon.full_scan()
    assert machine.counters["hugepages-16kB/collapse_alloc"] == machine.counters["hugepages-16kB/nr_anon"] == 3 * RANGES
    del daemon.told[:]
    daemon.full_scan()
    assert len(daemon.told) < RANGES / 2
    tried = [attempt for passage in daemon.told for attempt in passage.attempts]
    assert [attempt.result for attempt in tried] == [ScanResult.PTE_MAPPED_HUGEPAGE] * 3 * RANGES
    assert machine.counters["hugepages-16kB/collapse_alloc"] == 6 * RANGES


def _nothing(step: CollapseStep, mm: object, address: int, order: int) -> None:
    """Never runs the callback."""
