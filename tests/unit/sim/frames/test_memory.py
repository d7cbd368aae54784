"""Frames, the buddy allocator, the batch in front of the LRU lists, and the checks that find errors."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mthp.errors import UsageError
from mthp.sim import Machine
from mthp.sim.address_space.access import Fault
from mthp.sim.frames.buddy import Watermarks, Zone
from mthp.sim.frames.lru import BATCH_SIZE
from mthp.sim.frames.memory import Fl
from mthp.sim.mm import HUGEPAGE, Mm, Pmd
from mthp.tunables import Switches
from simcheck import check

PMD = 2 << 20


@given(st.lists(st.integers(0, 6), max_size=60), st.randoms(use_true_random=False))
def test_blocks_split_and_merge_back(orders: list[int], random: Random) -> None:
    zone = Zone(64, 192, 6)
    whole = zone.free_blocks()
    taken = [(head, order) for order in orders if (head := zone.alloc(order)) is not None]
    frames = [frame for head, order in taken for frame in range(head, head + (1 << order))]
    assert len(set(frames)) == len(frames)
    assert all(head % (1 << order) == 0 for head, order in taken)
    assert zone.free_frames == 192 - len(frames)
    random.shuffle(taken)
    for head, order in taken:
        zone.free(head, order)
    assert sorted(zone.free_blocks()) == sorted(whole)


def test_a_watermark_keeps_frames_back() -> None:
    zone = Zone(0, 64, 6)
    zone.watermarks = Watermarks(min=60)
    assert zone.alloc(2) is not None
    assert zone.alloc(0) is None
    assert zone.free_counts()[2:6] == [1, 1, 1, 1]


def test_small_folios_come_from_every_node_before_memory_is_out() -> None:
    machine = Machine(node_frames=[1024, 1024])
    memory = machine.parts.memory
    pfns = memory.alloc_small(1500)
    assert len(np.unique(pfns)) == 1500
    assert np.bincount(memory.nodes_of(pfns)).tolist() == [1024, 476]
    assert len(memory.alloc_small(1000)) == 548
    assert memory.alloc(0) is None


def test_the_highest_zone_is_asked_first_and_the_lowest_keeps_a_reserve() -> None:
    machine = Machine(node_frames=[3 * 1024, 1024], low_frames=1024)
    memory = machine.parts.memory
    assert [(zone.node, zone.name, zone.frames) for zone in memory.zones] == [
        (0, "DMA32", 1024), (0, "Normal", 2048), (1, "Normal", 1024),
    ]  # fmt: skip
    assert [line[:21] for line in machine.sysfs.read("/proc/buddyinfo").splitlines()] == [
        "Node 0, zone    DMA32", "Node 0, zone   Normal", "Node 1, zone   Normal",
    ]  # fmt: skip
    dma32, normal, other = memory.zones
    assert len(memory.alloc_small(2048)) == 2048
    assert (dma32.free_frames, normal.free_frames, other.free_frames) == (1024, 0, 1024)
    assert memory.nodes_of(np.array([dma32.start, normal.start, other.start])).tolist() == [0, 0, 1]
    # All memory but the reserve, and only then the other node.
    assert len(memory.alloc_small(1024)) == 1024
    assert (dma32.free_frames, other.free_frames) == (2048 // 256, 1024 - 8)
    assert len(memory.alloc_small(2000)) == 1024 - 8
    assert (dma32.free_frames, memory.free_frames) == (8, 8)
    assert memory.alloc(0) is None


def test_a_machine_may_have_low_memory_alone() -> None:
    machine = Machine(node_frames=[1024], low_frames=1024)
    assert [zone.name for zone in machine.parts.memory.zones] == ["DMA32"]
    assert len(machine.parts.memory.alloc_small(2000)) == 1024


@pytest.mark.parametrize("low", [-1, 1025])
def test_low_memory_that_cannot_be_is_refused(low: int) -> None:
    with pytest.raises(UsageError, match="low frames"):
        Machine(node_frames=[1024], low_frames=low)


def test_the_batch_holds_a_reference_until_it_is_full() -> None:
    machine = Machine()
    memory, lru = machine.parts.memory, machine.parts.lru
    pfns = memory.alloc_small(BATCH_SIZE)
    lru.add_small(pfns[:-1])
    assert set(memory.refcount[pfns[:-1]]) == {2}
    assert not (memory.flags[pfns] & Fl.LRU).any()
    lru.add_small(pfns[-1:])
    assert set(memory.refcount[pfns]) == {1}
    assert (memory.flags[pfns] & Fl.LRU).all()


def test_a_large_folio_empties_the_batch() -> None:
    machine = Machine()
    memory, lru = machine.parts.memory, machine.parts.lru
    small, large = memory.alloc(0), memory.alloc(3)
    assert small is not None
    assert large is not None
    lru.add(small)
    assert list(lru.waiting) == [small]
    lru.add(large)
    assert list(lru.waiting) == []


def test_nodes_without_frames_are_refused() -> None:
    with pytest.raises(UsageError, match="at least one node"):
        Machine(node_frames=[0])


@pytest.fixture
def lived() -> tuple[Machine, Mm]:
    """A machine with a program that has a large folio, small pages, a child and a swapped page."""
    machine = Machine(switches=Switches("madvise", {4: "madvise"}), swap_slots=16)
    mm = machine.create_mm(machine.parts.memory.cgroups.create())
    machine.map(mm, PMD, 2 * PMD, flags={HUGEPAGE})
    for page in range(20):
        assert machine.write(mm, PMD + page * 4096, page + 1) is Fault.DONE
    machine.parts.switches = Switches("never")
    for page in range(64, 80):
        assert machine.write(mm, PMD + page * 4096, page + 1) is Fault.DONE
    assert machine.madvise(mm, PMD + 64 * 4096, PMD + 66 * 4096, "PAGEOUT") == 0
    machine.fork(mm)
    machine.parts.lru.drain()
    assert mm.swap_entries == 2
    assert check(machine) == []
    return machine, mm


def _large(mm: Mm) -> int:
    return int(mm.ptes(PMD, 1).value[0])


def _small(mm: Mm) -> int:
    return int(mm.ptes(PMD + 70 * 4096, 1).value[0])


DAMAGE: dict[str, Callable[[Machine, Mm], object]] = {
    "references": lambda machine, mm: machine.parts.memory.refcount.__setitem__(_small(mm), 7),
    "mapcount": lambda machine, mm: machine.parts.memory.mapcount.__setitem__(_small(mm), 7),
    "mappings and has": lambda machine, mm: machine.parts.memory.refcount.__setitem__(_large(mm) + 1, 7),
    "first mm": lambda machine, mm: machine.parts.memory.refcount.__setitem__(_large(mm) + 2, 7),
    "locked": lambda machine, mm: machine.parts.memory.set(_small(mm), Fl.LOCKED),
    "on a list": lambda machine, mm: machine.parts.memory.clear(_small(mm), Fl.LRU),
    "in no place": lambda machine, mm: machine.parts.memory.zones[0].alloc(0),
    "disagree": lambda machine, mm: machine.parts.memory.order.__setitem__(_large(mm) + 5, 3),
    "nr_anon": lambda machine, mm: machine.counters.count_mthp(4, "nr_anon"),
    "is charged": lambda machine, mm: machine.parts.memory.cgroups.try_charge(1, 3),
    "pages and maps": lambda machine, mm: setattr(mm, "anon_pages", 1),
    "swap entries": lambda machine, mm: setattr(mm, "swap_entries", 1),
    "slot": lambda machine, mm: machine.parts.swap.count.__setitem__(1, 9),
    "empty PMD": lambda machine, mm: mm.set_pmd(PMD, Pmd.NONE),
    "no whole folio": lambda machine, mm: mm.set_pmd(PMD, Pmd.HUGE),
    "where nothing is mapped": lambda machine, mm: mm.remove_vmas(PMD, 2 * PMD),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_found(lived: tuple[Machine, Mm], what: str) -> None:
    DAMAGE[what](*lived)
    found = check(lived[0])
    assert any(what in line for line in found), found
