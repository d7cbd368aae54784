"""Compaction of all memory of a simulated machine does what :mod:`mthp.compaction` says."""

from __future__ import annotations

import random

import numpy as np
import pytest

from mthp.compaction import ZonePages, compact
from mthp.freememory import FREE, MOVES
from mthp.geometry import Geometry
from mthp.sim import Machine
from mthp.sim.allocation.compact_all import memory_blocks
from mthp.sim.frames.memory import ZERO_CONTENT
from mthp.sim.mm import HUGEPAGE
from mthp.tunables import Switches, Tunables
from simcheck import check

SMALL = Geometry("16-ptes", 4096, 4)
START, SIZE, PAGE = SMALL.pmd_size, SMALL.pmd_size, SMALL.page_size


def fragmented(seed: int) -> Machine:
    chance = random.Random(seed)
    switches = Switches("madvise", {2: "madvise"})
    machine = Machine(SMALL, node_frames=[1024], switches=switches, tunables=Tunables(8, 4, 4, 64))
    mm = machine.create_mm()
    machine.map(mm, START, START + 128 * SIZE, flags={HUGEPAGE} if chance.random() < 0.8 else set())
    # Of some folios only one page holds anything.
    taken = [at for at in range(0, 980, 4) if chance.random() < 0.95]
    pages = [at + page for at in taken for page in range(1 if chance.random() < 0.5 else 4)]
    machine.touch(mm, np.array([START + at * PAGE for at in pages]))
    for at in chance.sample(taken, len(taken) // chance.choice([2, 4, 8])):
        machine.munmap(mm, START + at * PAGE, START + (at + 4) * PAGE)
    return machine


@pytest.mark.parametrize("seed", range(40))
def test_compaction_of_all_memory_follows_the_scanners(seed: int) -> None:
    machine = fragmented(seed)
    machine.parts.lru.drain()
    blocks, memory = memory_blocks(machine.parts), machine.parts.memory
    kind, folio = blocks.pages.reshape(-1).copy(), blocks.folios.reshape(-1).copy()
    (zone,) = memory.zones
    zero = (folio != 0) & (memory.content[zone.start : zone.end] == ZERO_CONTENT)
    pages = ZonePages(kind, folio, zero, np.arange(len(kind), dtype=np.int32))
    compact(pages, SMALL.pmd_order, blocks.closed)
    machine.sysfs.write("/proc/sys/vm/compact_memory", "1")
    assert check(machine) == []
    after = memory_blocks(machine.parts)
    assert np.array_equal(after.pages.reshape(-1) == FREE, kind == FREE)
    assert np.array_equal(after.folios.reshape(-1), folio)
    assert (kind == MOVES).any()


def test_below_the_watermark_nothing_is_moved() -> None:
    moved = []
    for kept in 0, 4096:
        machine = fragmented(0)
        machine.sysfs.write("/proc/sys/vm/min_free_kbytes", str(kept))
        machine.sysfs.write("/proc/sys/vm/compact_memory", "1")
        moved.append(machine.counters["pgmigrate_success"] > 0)
    assert moved == [True, False]
