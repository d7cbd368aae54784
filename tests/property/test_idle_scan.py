"""khugepaged scans idle ranges together, with the same result as one by one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mthp.engine.visited import Passage
from mthp.geometry import GEOMETRIES, X86_64, Geometry
from mthp.sim import Machine
from mthp.sim.address_space.access import Fault
from mthp.sim.collapse import simkhugepaged as sim_khugepaged
from mthp.sim.frames.memory import Fl
from mthp.sim.kernel import NEWEST, Kernel, kernel_of
from mthp.sim.mm import HUGEPAGE, UFFD_WP, Mm, P
from mthp.tunables import Switches, Tunables
from strategies import examples

SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]
SMALL = Geometry("16-ptes", 4096, 4)
POLICIES = ("pmd-only", "rfc", "rfc2", "per-order", "mainline", "no-creep")

KINDS = (
    "empty",
    "full",
    "holes",
    "one",
    "zero",
    "huge",
    "cold",
    "swap",
    "shared",
    "pinned",
    "lazy",
    "marked",
    "folios",
    "halves",
    "forked",
)


@dataclass(frozen=True)
class World:
    """The parts of a machine; two machines of the same parts are equal.

    Attributes:
        ranges: the kind of each PMD range, and a number that chooses within it.
        orders: sizes that are enabled when khugepaged comes.
        budget, none: pages_to_scan and max_ptes_none.
    """

    geometry: Geometry
    policy: str
    ranges: tuple[tuple[str, int], ...]
    orders: tuple[int, ...]
    budget: int
    none: int
    armed: bool
    kernel: Kernel = NEWEST

    def made(self) -> tuple[Machine, Mm]:
        geometry, size = self.geometry, self.geometry.pmd_size
        n = geometry.ptes_per_pmd
        machine = Machine(
            geometry,
            node_frames=[(4 * len(self.ranges) + 4) * n],
            swap_slots=n,
            switches=Switches("never"),
            tunables=Tunables(self.none, n // 8, n // 2, self.budget),
            policy=self.policy,
            # Orders 2 and 3 of the smallest ranges, too, so that a run has halves.
            mthp_min_order=2,
            kernel=self.kernel,
        )
        mm = machine.create_mm()
        flags = {HUGEPAGE, UFFD_WP} if self.armed else {HUGEPAGE}
        machine.map(mm, size, (1 + len(self.ranges)) * size, flags=flags, anon_vma=True)
        for row, (kind, number) in enumerate(self.ranges):
            self._fill(machine, mm, (1 + row) * size, kind, number)
        machine.parts.lru.drain()
        machine.parts.switches = Switches("madvise", dict.fromkeys(self.orders, "madvise"))
        machine.khugepaged.visit(mm)
        return machine, mm

    def _fill(self, machine: Machine, mm: Mm, start: int, kind: str, number: int) -> None:
        n, page = self.geometry.ptes_per_pmd, self.geometry.page_size
        chooser = np.random.default_rng(number)
        if kind == "empty":
            return
        if kind in ("huge", "folios", "halves"):
            order = {"huge": self.geometry.pmd_order, "folios": 2, "halves": self.geometry.pmd_order - 1}[kind]
            machine.parts.switches = Switches("madvise", {order: "madvise"})
        pages = list(range(n))
        if kind in ("holes", "folios", "cold"):
            pages = np.flatnonzero(chooser.random(n) < chooser.random()).tolist()
        elif kind == "forked":
            pages = pages[::2]
        elif kind in ("one", "pinned"):
            pages = [number % n]
        for at in pages:
            if kind == "zero" and chooser.random() < 0.9:
                machine.read(mm, start + at * page)
            else:
                assert machine.write(mm, start + at * page, at + 1) is Fault.DONE
        machine.parts.switches = Switches("never")
        if change := _CHANGES.get(kind):
            change(machine, mm, start, number % n)


_CHANGES: dict[str, Callable[[Machine, Mm, int, int], object]] = {
    "cold": lambda machine, mm, start, at: machine.madvise(mm, start, start + machine.geometry.pmd_size, "COLD"),
    "swap": lambda machine, mm, start, at: machine.madvise(
        mm, start, start + (at + 1) * machine.geometry.page_size, "PAGEOUT"
    ),
    "lazy": lambda machine, mm, start, at: machine.madvise(mm, start, start + machine.geometry.page_size, "FREE"),
    "pinned": lambda machine, mm, start, at: machine.pin(mm, start + at * machine.geometry.page_size),
    "marked": lambda machine, mm, start, at: mm.ptes(start, at + 1).bits.__setitem__(at, P.PRESENT | P.UFFD_WP),
    "shared": lambda machine, mm, start, at: machine.fork(mm),
    "forked": lambda machine, mm, start, at: machine.exit(machine.fork(mm)),
    "halves": lambda machine, mm, start, at: machine.madvise(
        mm, start + at * machine.geometry.page_size, start + (at + 1) * machine.geometry.page_size, "DONTNEED"
    ),
    "locked": lambda machine, mm, start, at: machine.parts.memory.set(int(mm.ptes(start, at + 1).value[at]), Fl.LOCKED),
}
"""What happens to a range once it is written: given its address and the number of an entry."""


def life_of(world: World, passes: int = 4) -> dict[str, Any]:
    """Return everything that is visible from outside after some passes."""
    machine, mm = world.made()
    told: list[Passage] = []
    machine.khugepaged._listener = lambda slot, passage: told.append(passage)
    cursors = []
    for _ in range(passes):
        machine.khugepaged.do_scan()
        cursors.append((machine.khugepaged.address, machine.khugepaged.statistics.progress))
    columns = machine.space(mm).read([(vma.start, vma.end) for vma in mm.vmas])
    return {
        "cursors": cursors,
        "counters": machine.counters.values(),
        "time": machine.clock.spent_ns(),
        "now": machine.clock.now_ns,
        "statistics": machine.khugepaged.statistics,
        "addresses": np.concatenate([passage.addresses for passage in told] or [np.zeros(0, np.uint64)]).tolist(),
        "results": np.concatenate([passage.results for passage in told] or [np.zeros(0, np.int8)]).tolist(),
        "state": columns.state.tolist(),
        "orders": columns.folio_order.tolist(),
        "pfns": None if columns.pfn is None else columns.pfn.tolist(),
        "passages": len(told),
    }


@st.composite
def worlds(draw: st.DrawFn, geometry: Geometry, most: int) -> World:
    n = geometry.ptes_per_pmd
    palette = draw(st.lists(st.sampled_from(KINDS), min_size=1, max_size=4))
    ranges = draw(st.lists(st.tuples(st.sampled_from(palette), st.integers(0, 1 << 16)), min_size=1, max_size=most))
    every = list(geometry.anon_orders)
    return World(
        geometry,
        draw(st.sampled_from(POLICIES)),
        tuple(ranges),
        tuple(sorted(draw(st.sets(st.sampled_from(every), min_size=1)))),
        draw(st.sampled_from([1, n - 1, n, 3 * n, 100 * n])),
        draw(st.sampled_from([0, 1, n // 4, n // 2, n - 2, n - 1])),
        draw(st.integers(0, 5)) == 5,
        draw(st.sampled_from([NEWEST, NEWEST, kernel_of((6, 12), "pache-rfc2")])),
    )


def check(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        # Not an argument: it would pass through the machine and its khugepaged to each visit, for this test alone.
        patched.setattr(sim_khugepaged, "MAX_RANGES", 0)
        singly = life_of(world)
    together = life_of(world)
    for what in singly:
        if what != "passages":
            assert together[what] == singly[what], what


@given(world=worlds(SMALL, 40))
@settings(max_examples=examples(70), suppress_health_check=[*SLOW, HealthCheck.function_scoped_fixture])
def test_small_ranges(monkeypatch: pytest.MonkeyPatch, world: World) -> None:
    check(world, monkeypatch)


@pytest.mark.parametrize(
    ("kind", "policy", "orders", "none", "kernel"),
    [
        ("halves", "rfc", (2, 3, 4), 0, NEWEST),
        ("halves", "rfc", (2, 4), 0, NEWEST),
        ("forked", "mainline", (2, 4), 7, kernel_of((6, 12))),
    ],
)
def test_what_a_series_tries_in_vain(
    monkeypatch: pytest.MonkeyPatch, kind: str, policy: str, orders: tuple[int, ...], none: int, kernel: Kernel
) -> None:
    """Halves of a run with a large folio, orders that are off, pages that cannot be written: in many ranges alike."""
    check(World(SMALL, policy, (("empty", 1), (kind, 1)) * 12, orders, 1000, none, False, kernel), monkeypatch)


@pytest.mark.parametrize("name", ["x86-64", "s390x", "ppc64-64k"])
@given(data=st.data())
@settings(max_examples=examples(8), suppress_health_check=[*SLOW, HealthCheck.function_scoped_fixture])
def test_ranges_of_real_machines(monkeypatch: pytest.MonkeyPatch, name: str, data: st.DataObject) -> None:
    check(data.draw(worlds(GEOMETRIES[name], 12)), monkeypatch)


@pytest.mark.parametrize("orders", [(9,), (2, 3, 4, 9)], ids=str)
def test_what_is_too_sparse_is_passed_over_in_few_steps(orders: tuple[int, ...]) -> None:
    """All ranges have one none PTE, the last; none may be filled."""
    world = World(X86_64, "pmd-only", (("one", 5),) * 64, orders, 1 << 20, 0, False)
    told = life_of(world, passes=1)
    assert told["passages"] < 16
    assert told["results"].count(4) == 64
