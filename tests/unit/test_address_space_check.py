"""The public check of the seam: the simulated, the recorded and the faked address space pass, broken ones do not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fakes import FakeSpace, page_runs
from mthp.engine.census import take_census
from mthp.engine.collapse import collapse_space
from mthp.engine.khugepaged import Khugepaged
from mthp.engine.planning import plan_space
from mthp.engine.select import PlanOptions
from mthp.errors import TargetVanishedError, UnsupportedError, UsageError
from mthp.geometry import GEOMETRIES, Geometry
from mthp.means import Means
from mthp.ptes import ORDER_NONE, Block, Pte, PteColumns, Segment
from mthp.results import BlockOutcome, ScanResult
from mthp.sim import Machine
from mthp.sim.address_space.access import Fault
from mthp.sim.mm import HUGEPAGE, UFFD_WP, Mm, P
from mthp.snapshot.load import load
from mthp.snapshot.record import record
from mthp.testing import check_address_space, problems_of
from mthp.tunables import Switches, Tunables
from mthp.vma import Vma
from simcheck import check

SMALL = Geometry("16-ptes", 4096, 4)
SIZE = SMALL.pmd_size


def lived_in(geometry: Geometry = SMALL) -> tuple[Machine, Mm]:
    """A process with some of everything: pages, zero pages, swap, shared, lazyfree, markers, folios of all orders."""
    n, page, size = geometry.ptes_per_pmd, geometry.page_size, geometry.pmd_size
    machine = Machine(geometry, node_frames=[32 * n, 32 * n], swap_slots=4 * n, switches=Switches("never"))
    mm = machine.create_mm()
    machine.map(mm, size, 7 * size, flags={HUGEPAGE})
    machine.map(mm, 8 * size + page, 9 * size + page)
    machine.map(mm, 12 * size, 14 * size, flags={HUGEPAGE, UFFD_WP})
    content = 0

    def write(first: int, count: int) -> None:
        nonlocal content
        for address in range(first, first + count * page, page):
            content += 1
            assert machine.write(mm, address, content) is Fault.DONE

    write(size, n)
    write(2 * size, n // 2)
    for address in range(2 * size + n // 2 * page, 3 * size, page):
        machine.read(mm, address)
    write(3 * size, n)
    assert machine.madvise(mm, 3 * size, 3 * size + n // 4 * page, "PAGEOUT") == 0
    assert machine.madvise(mm, 3 * size + n // 4 * page, 3 * size + n // 2 * page, "FREE") == 0
    write(8 * size + page, n // 2)
    write(12 * size, 2)
    mm.ptes(12 * size, 1).bits[0] |= P.UFFD_WP
    machine.parts.switches = Switches("madvise", dict.fromkeys(geometry.anon_orders, "madvise"))
    write(4 * size, 1)
    machine.parts.switches = Switches("madvise", {2: "madvise"})
    write(5 * size, 4)
    machine.fork(mm)
    # Written after the fork: the program's own again.
    write(size, n)
    machine.parts.lru.drain()
    return machine, mm


@pytest.mark.parametrize("geometry", [SMALL, *GEOMETRIES.values()], ids=lambda geometry: geometry.name)
def test_the_simulated_machine_passes(geometry: Geometry) -> None:
    machine, mm = lived_in(geometry)
    orders = [order for order in geometry.anon_orders if order in (2, geometry.pmd_order)]
    check_address_space(machine.space(mm), collapse=True, orders=orders, end=lambda: machine.exit(mm))
    assert check(machine) == []


def test_a_snapshot_of_it_passes(tmp_path: Path) -> None:
    machine, mm = lived_in()
    space = machine.space(mm)
    record(space, tmp_path / "lived-in.parquet")
    with load(tmp_path / "lived-in.parquet") as recorded:
        check_address_space(recorded, collapse=True)
        for start, end in space.mapped():
            ours, theirs = space.read([(start, end)]), recorded.read([(start, end)])
            assert np.array_equal(ours.state, theirs.state)
            assert np.array_equal(ours.folio_order, theirs.folio_order)


def fake() -> FakeSpace:
    state, order = page_runs(
        (16, Pte.PRESENT, 0), (8, Pte.PRESENT | Pte.ZERO, 0), (8, 0, ORDER_NONE), (4, Pte.SWAP, ORDER_NONE), (12, 0, -1)
    )
    vma = Vma(SIZE, 4 * SIZE, "rw-p", flags=frozenset({"hg"}), has_anon_vma=True)
    other = Vma(6 * SIZE, 7 * SIZE, "rw-p", has_anon_vma=True)
    return FakeSpace(
        [(vma, state, order), (other, *page_runs((16, Pte.PRESENT | Pte.PMD_MAPPED, 4)))],
        geometry=SMALL,
        orders=range(2, 5),
    )


def test_the_fake_passes() -> None:
    space = fake()
    check_address_space(space, collapse=True, orders=[2, 4], end=lambda: setattr(space, "vanished", True))
    assert space.closed
    assert (SIZE, 2) in space.attempts


def broken(space: FakeSpace, name: str, change: Callable[..., object]) -> None:
    """Pass the result of a method of `space` through `change`."""
    original = getattr(space, name)
    setattr(space, name, lambda *given: change(original(*given), *given))


def with_state(bits: int, order: int) -> Callable[[FakeSpace], None]:
    return lambda space: space.write(SIZE, bits, order)


def half_huge(space: FakeSpace) -> None:
    space.write(SIZE, int(Pte.PRESENT | Pte.PMD_MAPPED), 4, 8)


def spoiled(space: FakeSpace, page: int, entries: tuple[int, int, int]) -> None:
    """Let every collapse that succeeds write (state, order, pages) to some page of the first range."""

    def spoil(outcome: BlockOutcome, address: int, order: int) -> BlockOutcome:
        if outcome.result is ScanResult.SUCCEED:
            space.write(SIZE + page * 4096, *entries)
        return outcome

    def spoil_all(outcomes: list[BlockOutcome], *_: object) -> list[BlockOutcome]:
        return [spoil(outcome, outcome.address, outcome.order) for outcome in outcomes]

    broken(space, "collapse_blocks", spoil_all)


def shifted(columns: PteColumns, segments: Sequence[Segment]) -> PteColumns:
    return PteColumns(columns.segments, np.roll(columns.state, 1), np.roll(columns.folio_order, 1))


def claimed(space: FakeSpace, **what: object) -> None:
    """Let the seam say of every collapse that works something other than the page tables show."""

    def claim(outcomes: list[BlockOutcome], *_: object) -> list[BlockOutcome]:
        return [replace(one, **what) if one.result is ScanResult.SUCCEED else one for one in outcomes]  # type: ignore[arg-type]

    broken(space, "collapse_blocks", claim)


def lying(space: FakeSpace) -> None:
    """Let the backend collapse nothing, and the seam say that it succeeded."""

    def lie(blocks: Sequence[Block], *_: object) -> list[BlockOutcome]:
        return [BlockOutcome(*block, ScanResult.SUCCEED, copied=1 << block[1]) for block in blocks]

    space.collapse_blocks = lie  # type: ignore[assignment]


BROKEN: dict[str, Callable[[FakeSpace], object]] = {
    "both present and swapped": with_state(int(Pte.PRESENT | Pte.SWAP), 0),
    "only a present page has": with_state(int(Pte.ZERO), ORDER_NONE),
    "a page of one's own": with_state(int(Pte.PRESENT | Pte.ZERO | Pte.SHARED), 0),
    "does not count as a swap entry": with_state(int(Pte.GUARD), ORDER_NONE),
    "userfaultfd, and none": with_state(int(Pte.UFFD_WP), ORDER_NONE),
    "in a folio, and not present": with_state(0, 2),
    "present, and in no folio": with_state(int(Pte.PRESENT), ORDER_NONE),
    "order that does not exist": with_state(int(Pte.PRESENT), 64),
    "in a smaller folio": with_state(int(Pte.PRESENT | Pte.PMD_MAPPED), 2),
    "maps a part": half_huge,
    "differently in pieces": lambda space: broken(space, "read", shifted),
    "wrong shape or dtype": lambda space: broken(
        space,
        "read",
        lambda columns, _: PteColumns(columns.segments, columns.state.astype(np.int64), columns.folio_order),
    ),
    "segments are": lambda space: broken(space, "read", lambda columns, _: replace(columns, segments=())),
    "leaves out": lambda space: broken(space, "populated", lambda found, *_: found[1:]),
    "not in its argument": lambda space: broken(
        space, "populated", lambda found, *_: [*found, (0, SIZE)] if found else []
    ),
    "ranges of vmas()": lambda space: broken(space, "mapped", lambda found: found[:-1]),
    "other mappings": lambda space: setattr(space, "with_nodes", lambda vmas: vmas[1:]),
    "overlaps": lambda space: broken(space, "vmas", lambda found: found[::-1]),
    "tunables are not possible": lambda space: setattr(space, "_tunables", Tunables(99, 0, 0, 1)),
    "label is not a text": lambda space: setattr(space, "_label", ""),
    "leaves a page that is not present": lambda space: spoiled(space, 0, (0, ORDER_NONE, 1)),
    "loses a page": lambda space: spoiled(space, 0, (0, ORDER_NONE, 1)),
    "no PMD entry maps it": lambda space: spoiled(space, 0, (int(Pte.PRESENT), 4, 16)),
    "nothing is mapped succeeds": lying,
    "succeeds, and the folio is another": lying,
    "succeeds twice": lying,
    "copied and filled are not": lambda space: claimed(space, copied=0),
    "its outcome is of": lambda space: claimed(space, order=0),
    "twice": lambda space: setattr(space, "take_pauses", lambda: [1]),
}


@pytest.mark.parametrize("problem", BROKEN)
def test_a_broken_backend_is_found_out(problem: str) -> None:
    space = fake()
    assert problems_of(space, collapse=True) == []
    space = fake()
    BROKEN[problem](space)
    found = problems_of(space, collapse=True)
    assert any(problem in line for line in found), found
    space = fake()
    BROKEN[problem](space)
    with pytest.raises(AssertionError, match="does not hold to the seam"):
        check_address_space(space, collapse=True)


def test_who_lives_on_after_the_end_is_found_out() -> None:
    assert len(problems_of(fake(), end=lambda: None)) == 4


def test_neighbours_that_change_are_found_out() -> None:
    space = fake()
    spoiled(space, 15, (int(Pte.PRESENT), 1, 1))
    assert any("changes its neighbours" in line for line in problems_of(space, collapse=True, orders=[2]))


# What stands above the seam runs on the simulated machine.


def test_inspect_and_plan_see_the_simulated_process() -> None:
    machine, mm = lived_in()
    space = machine.space(mm)
    census = take_census(space)
    assert census.total.resident == mm.anon_pages
    plan = plan_space(space, PlanOptions())
    assert plan.orders == SMALL.anon_orders
    assert plan.folios_by_order


def test_collapse_carries_the_plan_out_there() -> None:
    machine, mm = lived_in()
    space = machine.space(mm)
    plan = plan_space(space, PlanOptions(policy="pmd-only"))
    report = collapse_space(space, PlanOptions(policy="pmd-only"), Means(max_bloat=None))
    assert report.ranges.made == plan.folios_by_order[4] > 0
    assert not plan_space(space, PlanOptions(policy="pmd-only")).folios_by_order
    assert check(machine) == []


def test_khugepaged_of_the_library_does_there_what_a_plan_foretells() -> None:
    machine, mm = lived_in()
    space = machine.space(mm)
    plan = plan_space(space, PlanOptions())
    daemon = Khugepaged(orders=None)
    daemon.enter(space)
    daemon.full_scan()
    succeeded = {order: count for (order, result), count in daemon.statistics.attempts.items() if result == 1}
    assert succeeded == plan.folios_by_order
    assert sum(daemon.statistics.filled.values()) * 4096 == plan.filled_bytes
    assert check(machine) == []


def test_khugepaged_of_the_library_rests_in_the_machines_time() -> None:
    machine = Machine(SMALL, node_frames=[1024], switches=Switches("never"))
    mm = machine.create_mm()
    machine.map(mm, SIZE, 2 * SIZE, flags={HUGEPAGE})
    for page in range(16):
        machine.write(mm, SIZE + page * 4096, 1)
    machine.parts.memory.alloc_small(2048)
    daemon = Khugepaged(policy="pmd-only", orders=[4], clock=machine.time)
    daemon.enter(machine.space(mm))
    daemon.do_scan()
    assert daemon.statistics.attempts[4, ScanResult.ALLOC_HUGE_PAGE_FAIL] > 0
    assert machine.clock.now_ns >= 60_000_000_000


def test_what_cannot_be_asked_of_it() -> None:
    machine, mm = lived_in()
    space = machine.space(mm)
    with pytest.raises(UsageError, match="aligned"):
        space.collapse(SIZE + 4096, 2)
    with pytest.raises(UsageError, match="order 5"):
        space.collapse(SIZE, 5)
    assert space.collapse(8 * SIZE, 4).result is ScanResult.VMA_NULL
    assert space.collapse(8 * SIZE + 4 * 4096, 2).result is ScanResult.ADDRESS_RANGE
    machine.exit(mm)
    with pytest.raises(TargetVanishedError):
        space.vmas()


def test_a_snapshot_says_that_it_cannot_be_collapsed(tmp_path: Path) -> None:
    machine, mm = lived_in()
    record(machine.space(mm), tmp_path / "s.parquet")
    with load(tmp_path / "s.parquet") as recorded:
        daemon = Khugepaged(orders=[4])
        daemon.enter(recorded)
        with pytest.raises(UnsupportedError, match="snapshot"):
            daemon.do_scan()
        assert daemon.slots == ()
