"""On fragmented machines, a collapse reaches the predicted coverage."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from mthp.budget import Amount, MemoryBound
from mthp.engine.collapse import carry_out
from mthp.engine.planning import plan_space
from mthp.engine.reached import reach_of
from mthp.engine.select import PlanOptions
from mthp.engine.space_plan import SpacePlan
from mthp.engine.trim import TrimOptions, trim_space
from mthp.geometry import Geometry
from mthp.means import Means
from mthp.measuring import measure
from mthp.ptes import Block, PteColumns
from mthp.results import BlockOutcome, ScanResult
from mthp.sim import Machine, SimSpace
from mthp.sim.allocation.compact_all import compact_all
from mthp.sim.mm import HUGEPAGE, Mm
from mthp.tunables import Switches

SMALL = Geometry("64-ptes", 4096, 6)
PAGE, HUGE, N = SMALL.page_size, SMALL.pmd_size, SMALL.ptes_per_pmd
START = 64 * HUGE
STATES = 50
POINTS = 0.05
TURN = 16
MEANS = Means(max_bloat=None, reserve=Amount(size=0))


class Bounded(SimSpace):
    """An address space with a visible cgroup, on a machine that drops no cache and compacts only where it may.

    Attributes:
        may_compact: whether memory is compacted where no folio is free.
    """

    def __init__(self, machine: Machine, mm: Mm, limit: int | None) -> None:
        super().__init__(machine.parts, mm)
        self._limit, self.may_compact = limit, True

    def memory_bounds(self) -> list[MemoryBound]:
        if self._limit is None:
            return []
        room = self._parts.memory.cgroups.room(self._mm.charge) * PAGE
        return [MemoryBound("/its-cgroup", self._limit * PAGE, room)]

    def attempt_blocks(self, blocks: Sequence[Block], means: Means, before: PteColumns) -> list[BlockOutcome]:
        if not self._has_folio() and not (self.may_compact and self._compacted()):
            return [BlockOutcome(*block, ScanResult.ALLOC_HUGE_PAGE_FAIL) for block in blocks]
        return super().attempt_blocks(blocks, means, before)

    def _has_folio(self) -> bool:
        return any(zone.has(SMALL.pmd_order) for zone in self._parts.memory.zones)

    def _compacted(self) -> bool:
        compact_all(self._parts)
        return self._has_folio()


def state(seed: int) -> tuple[Machine, Bounded, PlanOptions, str]:
    """Memory of a program in small pages and in huge ones with zeroes, among what others have."""
    chance = random.Random(seed)
    blocks = chance.choice([96, 128, 192])
    machine = Machine(SMALL, node_frames=[blocks * N], switches=Switches("never"))
    machine.sysfs.write("/proc/sys/vm/min_free_kbytes", str(chance.choice([0, 256, 1024])))
    has_limit = chance.random() < 0.4
    cgroup = machine.parts.memory.cgroups.create() if has_limit else 0
    mm, other = machine.create_mm(cgroup), machine.create_mm()
    ranges, huge = chance.randint(24, blocks // 2), chance.randint(0, 12)
    machine.map(mm, START, START + (ranges + huge) * HUGE, flags={HUGEPAGE})
    machine.map(other, START, START + blocks * HUGE)
    index, movable = chance.choice([0.3, 0.6, 0.8, 0.9, 1.0]), chance.choice([0.0, 0.3, 0.7, 1.0])
    sparse = huge_part(machine, mm, huge, chance)
    share = chance.choice([1.0, 1.0, 0.9, 0.6])
    first = chance.random() < 0.5
    if first:
        machine.fragment(index, movable=movable, seed=seed)
    # What fragments memory before leaves blocks that compaction moves nothing to. Pages of programs are taken to lie in
    # these alike, as they do in programs that ran for a while.
    shuffled = first or chance.random() < 0.5
    # Others take most of the remaining memory in small pages while it grows.
    left = int(ranges * N * share) + chance.choice([40, 140, 400, 1000])
    taken = max(0, machine.parts.memory.free_frames - left)
    grow(machine, [(other, START, taken, 1.0), (mm, START + huge * HUGE, ranges * N, share)], chance, shuffled)
    # And free some.
    freed = chance.choice([0.0, 0.1, 0.3]) if taken else 0.0
    for at in chance.sample(range(taken // 8), int(freed * (taken // 8))):
        machine.munmap(other, START + at * 8 * PAGE, START + (at + 1) * 8 * PAGE)
    if not first:
        machine.fragment(index, movable=movable, seed=seed)
    limit = None
    if has_limit:
        limit = int(machine.parts.memory.cgroups.usage[cgroup]) + chance.choice([0, N, 250, 750])
        machine.parts.memory.cgroups.set_limit(cgroup, limit)
    orders = chance.choice([[6], [6], [6], [4, 6], [4]])
    what = f"{seed}: {blocks=} {ranges=} {huge=} {sparse=} {index=:.2f} {movable=} {first=} {share=}"
    text = f"{what} {shuffled=} {freed=} {limit=} {orders=}"
    return machine, Bounded(machine, mm, limit), PlanOptions(orders=orders, max_ptes_none=50), text


def huge_part(machine: Machine, mm: Mm, huge: int, chance: random.Random) -> int:
    """Make some ranges huge in which only the first pages hold anything."""
    if not huge:
        return 0
    sparse = chance.choice([3, 15, 37])
    for at in range(huge):
        begin = START + at * HUGE
        machine.populate(mm, begin, begin + sparse * PAGE)
        assert machine.madvise(mm, begin, begin + HUGE, "COLLAPSE") == 0
    return sparse


def grow(machine: Machine, programs: list[tuple[Mm, int, int, float]], chance: random.Random, shuffled: bool) -> None:
    """Let each program write its share of its pages, in turn, in address order or at random."""
    numbers = np.random.default_rng(chance.randrange(1 << 30))
    turns: list[tuple[float, Mm, NDArray[np.int64]]] = []
    for mm, start, count, share in programs:
        pages = np.arange(count)[numbers.random(count) < share]
        if shuffled:
            numbers.shuffle(pages)
        parts = np.array_split(start + pages.astype(np.int64) * PAGE, len(pages) // TURN + 1)
        turns += [(at / len(parts), mm, part) for at, part in enumerate(parts)]
    for _, mm, addresses in sorted(turns, key=lambda turn: turn[0]):
        machine.touch(mm, addresses)


def reached(space: Bounded, plan: SpacePlan, *, may_compact: bool, trim: bool = False) -> float:
    """Carry out a plan on a copy of a machine, and return the coverage."""
    space = copy.deepcopy(space)
    space.may_compact = may_compact
    if trim:
        trim_space(space, TrimOptions())
    carry_out(space, plan, MEANS)
    return measure(space, space.vmas()).now.share(plan.coverage_order)


@pytest.mark.parametrize(
    "seed", [pytest.param(seed, marks=[pytest.mark.slow] if seed >= STATES // 5 else []) for seed in range(STATES)]
)
def test_what_is_predicted_is_reached(seed: int) -> None:
    machine, space, options, text = state(seed)
    plan, before = plan_space(space, options), machine.digest()
    reach = reach_of(space, plan, MEANS)
    assert machine.digest() == before
    ways = {
        "now": (reach.now, reached(space, plan, may_compact=False)),
        "after_compaction": (reach.compacted, reached(space, plan, may_compact=True)),
        "after_trim": (reach.trimmed, reached(space, plan, may_compact=True, trim=True)),
    }
    for way, (said, coverage) in ways.items():
        assert said.coverage == pytest.approx(coverage, abs=POINTS), f"{way} of {text}: {said} of {plan.coverage_after}"
