"""Many accesses at once have the same effect as one by one."""

from __future__ import annotations

from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mthp.errors import UsageError
from mthp.geometry import Geometry
from mthp.sim import Machine
from mthp.sim.address_space.access import Fault
from mthp.sim.mm import HUGEPAGE, Mm, P, Pmd
from mthp.tunables import Switches
from simcheck import check
from strategies import examples

SMALL = Geometry("16-ptes", 4096, 4)
START, SIZE, PAGE = SMALL.pmd_size, SMALL.pmd_size, SMALL.page_size


def built(orders: set[int], mess: int, scarce: int = 0) -> tuple[Machine, Mm]:
    """Return a machine with a program that made some accesses, one by one; no block of order `scarce` is free.

    Such a machine has no swap, because the pages reclaimed for a block depend on the order of all accesses.
    """
    machine = Machine(
        SMALL, swap_slots=0 if scarce else 64, switches=Switches("madvise", dict.fromkeys(orders, "madvise"))
    )
    if scarce:
        machine.fragment(1.0, scarce)
    mm = machine.create_mm(machine.parts.memory.cgroups.create())
    machine.map(mm, START, START + 3 * SIZE, flags={HUGEPAGE})
    machine.map(mm, START + 4 * SIZE, START + 5 * SIZE + 3 * PAGE, flags={HUGEPAGE})
    random = Random(mess)
    for _ in range(random.randrange(8)):
        address = START + random.randrange(2 * 16) * PAGE
        match random.randrange(5):
            case 0:
                machine.read(mm, address)
            case 1:
                machine.madvise(mm, address, address + PAGE, "PAGEOUT")
            case 2:
                machine.madvise(mm, address, address + PAGE, "DONTNEED")
            case 3 if len(machine.mms) == 1:
                machine.fork(mm)
            case _:
                machine.write(mm, address, random.randrange(1, 1000))
    return machine, mm


_PLACES = ("compact_migrate_scanned", "compact_frame")
"""What depends on the numbers of the frames in use."""


def seen(machine: Machine, mm: Mm) -> dict[str, Any]:
    """Return all that two machines can be compared by, without the numbers of frames and the batch of the LRU lists."""
    memory = machine.parts.memory
    rows = []
    for table in mm.tables:
        pages = (table.bits & (P.PRESENT | P.ZERO)) == P.PRESENT
        frames = np.where(pages, table.value, 0)
        rows += [table.pmd.tolist(), table.bits.tolist(), (memory.order[frames] * pages).tolist()]
        rows += [(memory.content[frames] * pages).tolist()]
    vmas = [(vma.start, vma.end, bool(vma.anon_vma)) for vma in mm.vmas]
    return {
        "rows": rows,
        "vmas": vmas,
        # A counter that was touched and stayed 0 is as good as one that was not.
        "counters": {name: value for name, value in machine.counters.values().items() if value and name not in _PLACES},
        "rss": (mm.anon_pages, mm.swap_entries),
        "charged": memory.cgroups.usage.tolist(),
        "spent": {name: value for name, value in machine.clock.spent_ns().items() if value and name not in _PLACES},
    }


@example(orders={2, 3, 4}, mess=3558, pages=[8, 16], write=True, scarce=4)
@settings(max_examples=examples(150))
@given(
    orders=st.sets(st.integers(2, 4)),
    mess=st.integers(0, 1 << 30),
    pages=st.lists(st.integers(0, 5 * 16 + 5), max_size=90),
    write=st.booleans(),
    scarce=st.sampled_from([0, 0, 3, 4]),
)
def test_it_leaves_what_single_accesses_leave(
    orders: set[int], mess: int, pages: list[int], write: bool, scarce: int
) -> None:
    (one, mm), (many, other) = built(orders, mess, scarce), built(orders, mess, scarce)
    done, outcome = 0, Fault.DONE
    for at, page in enumerate(pages):
        address = START + page * PAGE
        outcome = one.write(mm, address, at + 1) if write else one.read(mm, address)[0]
        if outcome is not Fault.DONE:
            break
        done += 1
    contents = np.arange(1, len(pages) + 1) if write else None
    touched = many.touch(other, [START + page * PAGE for page in pages], write=write, contents=contents)
    assert (touched.done, touched.outcome) == (done, outcome)
    together, single = seen(many, other), seen(one, mm)
    if scarce and any(name.endswith("/split") for name in together["counters"]):
        # The shrinker frees pages of zeroes. If it runs before a batch has written to its pages, the batch faults
        # again.
        for figures in (together, single):
            del figures["counters"], figures["spent"]
    assert together == single
    assert check(many) == []


def test_it_stops_where_memory_is_out() -> None:
    machine = Machine(SMALL, node_frames=[1024], switches=Switches("never"))
    mm = machine.create_mm(machine.parts.memory.cgroups.create(40))
    machine.map(mm, START, START + 8 * SIZE)
    touched = machine.populate(mm, START, START + 8 * SIZE)
    assert (touched.done, touched.outcome) == (40, Fault.OOM)
    assert mm.anon_pages == 40
    assert check(machine) == []


def test_it_fills_huge_ranges_and_says_what_that_took() -> None:
    machine = Machine(node_frames=[8 * 512])
    mm = machine.create_mm()
    size = machine.geometry.pmd_size
    machine.map(mm, size, 3 * size, flags={HUGEPAGE})
    assert machine.populate(mm, size, 3 * size).outcome is Fault.DONE
    assert [mm.pmd(size), mm.pmd(2 * size)] == [Pmd.HUGE, Pmd.HUGE]
    assert machine.counters["thp_fault_alloc"] == 2
    spent = machine.clock.spent_ns()
    assert spent["zero_byte"] == 2 * size * machine.clock.costs.zero_byte // 1000
    assert machine.clock.now_ns >= sum(spent.values())


def test_what_makes_no_sense_is_refused() -> None:
    machine = Machine(SMALL)
    mm = machine.create_mm()
    with pytest.raises(UsageError, match="user space"):
        machine.touch(mm, [1 << 60])
    with pytest.raises(UsageError, match="read leaves no contents"):
        machine.touch(mm, [0], write=False, contents=1)
