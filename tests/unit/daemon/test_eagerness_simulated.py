"""Eagerness on the simulated machine: a second process takes its memory and returns it, and the level follows."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest
from numpy.typing import NDArray

from mthp.daemon.eagerness import DEAD_BAND, EagernessLevel, Shortage
from mthp.daemon.rules import Settings
from mthp.engine.trim import TrimOptions, trim_space
from mthp.geometry import Geometry
from mthp.lab.workloads.program import Program
from mthp.ptes import Pte
from mthp.sim import Machine
from mthp.sim.clock import Costs
from mthp.tunables import Switches

SMALL = Geometry("64-ptes", 4096, 6)
N, PAGE, PMD = SMALL.ptes_per_pmd, SMALL.page_size, SMALL.pmd_size
MEMORY = 40
"""PMD ranges of memory, and as many of swap."""

DISK = Costs(swap_out=40_000_000, swap_in=40_000_000)
"""A swap device that takes 40 microseconds for a page."""

PHASE = 100
"""Seconds of calm, then of pressure, then of calm."""

SETTLES = 60
RANGES = 16
"""PMD ranges of the target."""

HALF = RANGES // 2 * N

STALLS = ("swap_out", "swap_in", "reclaim_pte", "compact_frame", "migrate_folio")
"""Waits of a task that takes memory (psi_memstall_enter(), mm/vmscan.c, mm/compaction.c, mm/page_io.c)."""


@dataclass
class Stage:
    """A target under a rule, and a process that takes the share `taken` of the machine's memory, in the middle.

    Attributes:
        largest: the largest order that is made at a level.
        levels: of each second.
        bloat: pages of the target's that it does not use, of each second.
        huge: pages of the target's that PMD entries map, of each second.
        waited: seconds that the programs waited for memory.
        worked: seconds of khugepaged's work and of the trims.
    """

    eagerness: int
    taken: float
    largest: Callable[[int], int] = lambda level: SMALL.pmd_order
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(7))
    levels: list[float] = field(default_factory=list)
    bloat: list[int] = field(default_factory=list)
    huge: list[int] = field(default_factory=list)
    waited: float = 0.0
    worked: float = 0.0

    def __post_init__(self) -> None:
        switches = Switches("madvise", dict.fromkeys(SMALL.anon_orders, "inherit"))
        self.machine = Machine(
            SMALL, node_frames=[MEMORY * N], swap_slots=2 * MEMORY * N, switches=switches, costs=DISK
        )
        self.level = EagernessLevel(Settings(eagerness=self.eagerness), SMALL, 0.0)
        self.target = Program(self.machine, "target", self.rng, advise=False)
        self.heap = self.target.map(RANGES * PMD)
        self.own = np.flatnonzero(self.rng.random(RANGES * N) < np.repeat(self.rng.uniform(0.4, 1.0, RANGES), N))
        self.early = self.own[self.own < HALF]
        self._write(self.early)
        self.other = Program(self.machine, "other", self.rng, advise=False)
        self.arena = self.other.map(2 * MEMORY * PMD)
        self.average = 0.0

    def run(self) -> None:
        for second in range(3 * PHASE):
            before = self._stalled()
            self._programs(second)
            share = (self._stalled() - before) / 1e9
            self.waited += share
            if second % 2 == 0:
                # calc_load() over ten seconds, every two (kernel/sched/psi.c).
                self.average = share + (self.average - share) * math.exp(-2 / 10)
            memory = self.machine.parts.memory
            found = Shortage(self.average, memory.free_frames / len(memory.refcount))
            self.level.follow(second + 1.0, lambda found=found: found)  # type: ignore[misc]
            begun = sum(self.machine.clock.spent_ns().values())
            self._act()
            self.worked += (sum(self.machine.clock.spent_ns().values()) - begun) / 1e9
            assert self.level.value is not None
            self.levels.append(self.level.value)
            present, huge = self._pages()
            unused = np.setdiff1d(np.arange(RANGES * N), self.own)
            self.bloat.append(int(present[unused].sum()))
            self.huge.append(int(huge.sum()))

    def _write(self, pages: NDArray[np.int64]) -> None:
        """Write to `pages` first, then advise them, so that no fault brings a folio that the level does not want."""
        self.target.write(self.heap, pages)
        start, end = int(pages[0]) // N * PMD, (int(pages[-1]) // N + 1) * PMD
        self.machine.madvise(self.target.mm, self.heap + start, self.heap + end, "HUGEPAGE")

    def _pages(self) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Return which pages of the target are present, and which a PMD entry maps: bool, shape (pages,)."""
        columns = self.machine.space(self.target.mm).read([(self.heap, self.heap + RANGES * PMD)])
        return columns.has(Pte.PRESENT), columns.has(Pte.PMD_MAPPED)

    def _stalled(self) -> int:
        spent = self.machine.clock.spent_ns()
        return sum(spent.get(name, 0) for name in STALLS)

    def _programs(self, second: int) -> None:
        # It takes half of its memory while memory is short, so that the level reacts to its own filling.
        if second == PHASE + 20:
            self._write(self.own[self.own >= HALF])
        own = self.own if second >= PHASE + 20 else self.early
        self.target.write(self.heap, self.rng.choice(own, len(own) // 8))
        wanted = int(self.taken * MEMORY * N)
        if PHASE <= second < 2 * PHASE:
            grown = min(wanted, (second - PHASE + 1) * wanted // 20)
            self.other.write(self.arena, np.unique(self.rng.integers(0, grown, grown // 2)))
        elif second == 2 * PHASE:
            self.other.end()

    def _act(self) -> None:
        """Do the daemon's work of a second at the level."""
        settings, machine = self.level.settings, self.machine
        if self.level.makes:
            pages = (settings.rate or 1 << 30) // PAGE
            smallest, largest = self.level.smallest, self.largest(int(self.level.value or 0))
            sizes = {
                order: "inherit" if smallest <= order <= largest else "never" for order in machine.geometry.anon_orders
            }
            machine.parts.switches = dataclasses.replace(machine.parts.switches, sizes=sizes)
            tunables = machine.parts.tunables
            machine.parts.tunables = dataclasses.replace(
                tunables, max_ptes_none=settings.max_ptes_none or 0, pages_to_scan=max(1, pages)
            )
            machine.khugepaged.do_scan()
        elif self.level.gives_back and settings.trim is not None:
            trim_space(machine.space(self.target.mm), TrimOptions(zero=settings.trim))


def turns(levels: list[float]) -> int:
    """Return how often the level changes its direction."""
    moves = [step for step in np.diff(levels).tolist() if abs(step) > 1e-9]
    return sum(one * other < 0 for one, other in itertools.pairwise(moves))


@pytest.fixture(scope="module", params=[(5, 0.9), (8, 0.62), (10, 0.55), (10, 1.2)], ids=str)
def stage(request: pytest.FixtureRequest) -> Stage:
    stage = Stage(*request.param)
    stage.run()
    return stage


@pytest.mark.slow
def test_it_does_not_swing_and_settles_within_a_minute(stage: Stage) -> None:
    for begin in range(0, 3 * PHASE, PHASE):
        phase = stage.levels[begin : begin + PHASE]
        print(f"eagerness {stage.eagerness}: from {phase[0]:.2f} to {phase[-1]:.2f}, {turns(phase)} turns")
        assert turns(phase) <= 2
        settled = phase[SETTLES:]
        assert max(settled) - min(settled) <= DEAD_BAND


def test_it_falls_under_pressure_and_comes_back(stage: Stage) -> None:
    calm, short, after = (stage.levels[(number + 1) * PHASE - 1] for number in range(3))
    assert short < calm == after == stage.eagerness
    assert stage.taken < 0.9 or short < 1, "programs wait for memory: nothing is made"


def test_what_waits_for_memory_is_not_filled(stage: Stage) -> None:
    low = [second for second in range(1, 3 * PHASE) if stage.levels[second] < 1]
    print(f"eagerness {stage.eagerness}: {max(stage.bloat)} pages filled at most, {len(low)} s below level 1")
    assert max(stage.bloat) > 0
    assert all(stage.bloat[second] <= stage.bloat[second - 1] for second in low)


@pytest.mark.parametrize(("eagerness", "taken"), [(8, 0.62), (10, 0.62), (10, 0.7)])
def test_a_bound_on_the_largest_order_would_cover_less_and_spare_nothing(eagerness: int, taken: float) -> None:
    """Why no level has one: each level that the shortage takes halves the largest folio, in the second run."""
    free, bound = (
        Stage(eagerness, taken),
        Stage(eagerness, taken, largest=lambda level: max(3, SMALL.pmd_order - (eagerness - level))),
    )
    for stage, name in ((free, "no bound"), (bound, "a bound on the largest order")):
        stage.run()
        pages = RANGES * N
        print(
            f"eagerness {eagerness}, {taken:.0%} taken, {name}: {np.mean(stage.huge) / pages:.1%} huge, "
            f"{np.mean(stage.bloat) / pages:.1%} bloat, {stage.waited:.2f} s waited, {1e3 * stage.worked:.1f} ms worked"
        )
    assert np.mean(free.huge) > np.mean(bound.huge)
    assert free.waited <= bound.waited
    assert free.worked <= bound.worked
