"""Carrying out a plan: every planned range is accounted for, the budget holds, and the numbers are true."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fakes import COLLAPSE_NS, FakeSpace, RestingClock, page_runs
from mthp.blockstates import states_of
from mthp.engine import work
from mthp.engine.collapse import collapse_space
from mthp.engine.report import CollapseReport
from mthp.engine.select import PlanOptions
from mthp.errors import NotPermittedError, TargetVanishedError, UsageError
from mthp.geometry import X86_64, Geometry, geometry_named
from mthp.means import Means
from mthp.metrics import Durations
from mthp.pacing import BYTES_BURST_SECONDS, BYTES_SLICE_SECONDS
from mthp.ptes import ORDER_NONE, Pte, PteColumns, Segment
from mthp.results import BlockOutcome, ScanResult
from mthp.vma import Vma
from strategies import examples

BASE = 1 << 40
PPC = geometry_named("ppc64-64k")
PAGES_OF_PPC = PPC.ptes_per_pmd
HUGE = Pte.PRESENT | Pte.PMD_MAPPED
FAILURES = [result for result in ScanResult if result is not ScanResult.SUCCEED]


def space_of(*fullness: int, geometry: Geometry = X86_64, cls: type[FakeSpace] = FakeSpace, **more: Any) -> FakeSpace:
    """Return one mapping. Each number is the count of pages in a PMD range; -1 is a range that is huge already."""
    n = geometry.ptes_per_pmd
    runs: list[tuple[int, int, int]] = []
    for pages in fullness:
        if pages < 0:
            runs.append((n, HUGE, geometry.pmd_order))
        else:
            runs += [(pages, Pte.PRESENT, 0), (n - pages, 0, ORDER_NONE)]
    vma = Vma(BASE, BASE + len(fullness) * geometry.pmd_size, "rw-p")
    return cls([(vma, *page_runs(*runs))], geometry=geometry, **more)


def carried_out(space: FakeSpace, stop: Any = lambda: False, progress: Any = None, **options: Any) -> CollapseReport:
    dry_run = options.pop("dry_run", False)
    names = ("mechanism", "max_bloat", "rate", "max_pause", "pause_share", "fill", "verify")
    own = {name: options.pop(name) for name in names if name in options}
    plan = PlanOptions(**({"policy": "pmd-only"} | options))
    clock = space.clock if isinstance(space, Timed) else None
    return collapse_space(
        space, plan, Means(**({"max_bloat": None} | own)), progress=progress, dry_run=dry_run, stop=stop, clock=clock
    )


def accounted(report: CollapseReport) -> int:
    ranges = report.ranges
    return ranges.made + ranges.unchanged + ranges.failed.total() + ranges.over_budget + ranges.not_tried


def planned_ranges(report: CollapseReport) -> int:
    return report.plan.folios_by_order.get(report.plan.geometry.pmd_order, 0)


def contents(space: FakeSpace) -> int:
    """Pages with contents, counted plainly."""
    return sum(1 for state in everything(space).state if state & Pte.PRESENT and not state & Pte.ZERO)


def everything(space: FakeSpace) -> PteColumns:
    return FakeSpace.read(space, [(vma.start, vma.end) for vma in FakeSpace.vmas(space)])


def coverage_of(space: FakeSpace) -> float:
    """Return the share of the pages with contents that PMD entries map, page by page."""
    resident = [state for state in everything(space).state if state & Pte.PRESENT and not state & Pte.ZERO]
    return sum(1 for state in resident if state & Pte.PMD_MAPPED) / len(resident) if resident else 0.0


@settings(max_examples=examples(150))
@given(st.data())
def test_everything_is_accounted_for(data: st.DataObject) -> None:
    fullness = data.draw(st.lists(st.sampled_from([-1, 0, 1, 16, 31, 32, 32]), min_size=1, max_size=12))
    addresses = st.sampled_from([BASE + index * PPC.pmd_size for index in range(len(fullness))])
    # A backend may also claim a success that cannot be seen.
    fails = data.draw(st.dictionaries(addresses, st.sampled_from([*FAILURES, ScanResult.SUCCEED]), max_size=6))
    max_bloat = data.draw(st.one_of(st.none(), st.integers(0, 128).map(lambda pages: pages * PPC.page_size)))
    stops = iter([*[False] * data.draw(st.integers(0, 15)), *[True] * 50])
    space = space_of(*fullness, geometry=PPC, fails=fails)
    before, bloat_free = contents(space), everything(space)
    report = carried_out(space, lambda: next(stops), max_bloat=max_bloat)

    assert accounted(report) == planned_ranges(report)
    after = everything(space)
    became_huge = (after.has(Pte.PMD_MAPPED) & ~bloat_free.has(Pte.PMD_MAPPED)).sum() // PAGES_OF_PPC
    assert report.ranges.made == became_huge
    assert report.collapsed_bytes == became_huge * PPC.pmd_size
    assert report.filled_bytes == (contents(space) - before) * PPC.page_size
    assert report.copied_bytes == report.collapsed_bytes - report.filled_bytes
    assert max_bloat is None or report.filled_bytes <= max_bloat
    assert report.coverage == pytest.approx(coverage_of(space))
    assert report.durations.count == len(space.attempts)
    left = [
        report.ranges.failed_by_result.total(),
        report.ranges.over_budget,
        report.ranges.not_tried,
        report.interrupted,
    ]
    assert report.complete == (not any(left) and not report.done_nothing)
    for address, _ in space.attempts:
        assert fails.get(address) in {None, ScanResult.SUCCEED} or report.ranges.failed_by_result[fails[address]]


@settings(max_examples=examples(60))
@given(st.lists(st.sampled_from([-1, 0, 5, 31, 32]), min_size=1, max_size=8), st.integers(0, 20), st.booleans())
def test_a_target_that_vanishes_is_accounted_for(fullness: list[int], reads: int, while_read: bool) -> None:
    class Dying(FakeSpace):
        """Vanishes at the n-th reading of its pages, or the n-th collapse."""

        left = reads

        def read(self, segments: Sequence[Segment]) -> PteColumns:
            self.tick(while_read)
            return super().read(segments)

        def attempt(self, address: int, order: int) -> BlockOutcome:
            self.tick(not while_read)
            return super().attempt(address, order)

        def tick(self, counts: bool) -> None:
            self.vanished |= counts and self.left == 0
            self.left -= counts

    space = space_of(*fullness, geometry=PPC, cls=Dying)
    try:
        report = carried_out(space)
    except TargetVanishedError:
        assert while_read
        assert not space.attempts
        return
    assert accounted(report) == planned_ranges(report)
    assert report.vanished == space.vanished
    assert not (report.vanished and report.complete)
    assert all(report.ranges.failed_by_result.values())


def test_what_was_tried_when_the_target_vanished_is_not_said_to_be_collapsed() -> None:
    class DiesAtTheThird(FakeSpace):
        def attempt(self, address: int, order: int) -> BlockOutcome:
            self.vanished = len(self.attempts) == 2
            return super().attempt(address, order)

    report = carried_out(space_of(512, 512, 512, 512, 512, cls=DiesAtTheThird))
    assert report.vanished
    assert (report.ranges.made, report.filled_bytes) == (2, 0)
    assert report.ranges.failed_by_result == {ScanResult.ANY_PROCESS: 1}
    assert report.ranges.not_tried == 2


def test_the_fullest_come_first_and_equals_by_address() -> None:
    space = space_of(100, 512, 300, -1, 512, 299)
    carried_out(space)
    assert [(address - BASE) // X86_64.pmd_size for address, _ in space.attempts] == [1, 4, 2, 5, 0]
    assert {order for _, order in space.attempts} == {9}


def test_a_budget_buys_the_fullest() -> None:
    space = space_of(500, 510, 100, 512)
    report = carried_out(space, max_bloat=14 * 4096)
    assert (report.ranges.made, report.ranges.over_budget) == (3, 1)
    assert report.filled_bytes == 14 * 4096
    assert not report.complete
    assert carried_out(space_of(500, 510, 100, 512), max_bloat=14 * 4096 - 1).filled_bytes == 2 * 4096


def test_a_budget_of_nothing_collapses_what_is_full() -> None:
    report = carried_out(space_of(511, 512, 512), max_bloat=0)
    assert (report.ranges.made, report.ranges.over_budget, report.filled_bytes) == (2, 1, 0)


def test_zero_pages_are_filled_and_swapped_pages_are_not() -> None:
    runs = page_runs((300, Pte.PRESENT, 0), (100, Pte.PRESENT | Pte.ZERO, 0), (60, Pte.SWAP, -1), (52, 0, ORDER_NONE))
    space = FakeSpace([(Vma(BASE, BASE + X86_64.pmd_size, "rw-p"), *runs)])
    report = carried_out(space)
    assert report.ranges.made == 1
    assert report.filled_bytes == 152 * 4096
    assert report.copied_bytes == 360 * 4096


def test_what_failed_costs_no_budget() -> None:
    # The first fails, so its bloat budget is free for the second.
    space = space_of(500, 500, fails={BASE: ScanResult.PAGE_COUNT})
    report = carried_out(space, max_bloat=12 * 4096)
    assert (report.ranges.made, report.ranges.over_budget) == (1, 0)
    assert report.ranges.failed_by_result == {ScanResult.PAGE_COUNT: 1}


def test_a_success_that_cannot_be_seen_is_no_success() -> None:
    report = carried_out(space_of(512, 512, fails={BASE: ScanResult.SUCCEED}))
    assert report.ranges.made == 1
    assert report.ranges.failed_by_result == {ScanResult.PTE_NON_PRESENT: 1}


class Restless(FakeSpace):
    """Changes between the plan and the collapse."""

    planned = False

    def vmas(self) -> list[Vma]:
        self.planned = True
        return super().vmas()

    def read(self, segments: Sequence[Segment]) -> PteColumns:
        columns = super().read(segments)
        if self.planned:
            self.planned = False
            self.write(BASE, HUGE, 9, pages=512)
            self.write(BASE + X86_64.pmd_size, 0, ORDER_NONE, pages=512)
            self.write(BASE + 2 * X86_64.pmd_size, Pte.PRESENT, 0, pages=200)
        return columns


def test_what_changed_since_the_plan_is_seen() -> None:
    space = space_of(512, 512, 100, 512, cls=Restless)
    report = carried_out(space)
    assert planned_ranges(report) == 4
    assert report.ranges.unchanged == 1
    assert report.ranges.failed_by_result == {ScanResult.NO_PTE_TABLE: 1}
    assert report.ranges.made == 2
    assert report.filled_bytes == 312 * 4096
    assert [address for address, _ in space.attempts] == [BASE + 3 * X86_64.pmd_size, BASE + 2 * X86_64.pmd_size]


@pytest.mark.parametrize("after", range(6))
def test_it_stops_when_told(after: int) -> None:
    stops = iter([*[False] * after, *[True] * 9])
    space = space_of(*[512] * 5)
    report = carried_out(space, lambda: next(stops))
    assert (report.ranges.made, report.ranges.not_tried) == (after, 5 - after)
    assert len(space.attempts) == after
    assert report.interrupted == (after < 5)
    assert report.complete == (after == 5)
    assert report.coverage == pytest.approx(after / 5)


def test_a_dry_run_changes_nothing() -> None:
    space = space_of(512, 100, 0, -1)
    before = everything(space)
    report = carried_out(space, dry_run=True)
    after = everything(space)
    assert space.attempts == []
    assert (after.state == before.state).all()
    assert (after.folio_order == before.folio_order).all()
    assert report.dry_run
    assert report.complete
    assert (report.ranges.made, report.filled_bytes, report.elapsed) == (0, 0, 0.0)
    assert report.coverage == report.plan.coverage == 512 / (512 + 100 + 512)


def test_a_second_run_finds_nothing_left() -> None:
    space = space_of(512, 400, -1)
    first = carried_out(space)
    assert (first.ranges.made, first.complete, first.coverage) == (2, True, 1.0)
    second = carried_out(space)
    assert accounted(second) == planned_ranges(second) == 0
    assert second.complete
    assert second.coverage == second.plan.coverage == 1.0
    assert second.plan.ranges_by_result == {ScanResult.PMD_MAPPED: 3}


@settings(max_examples=examples(40))
@given(st.lists(st.sampled_from([-1, 0, 1, 20, 32]), min_size=1, max_size=8))
def test_the_plan_foretells_the_coverage(fullness: list[int]) -> None:
    report = carried_out(space_of(*fullness, geometry=PPC))
    assert report.coverage == pytest.approx(report.plan.coverage_after)
    assert report.filled_bytes == report.plan.filled_bytes
    assert report.copied_bytes == report.plan.copied_bytes


def test_smaller_folios_are_left_where_only_the_kernels_call_is_allowed() -> None:
    # 64 pages in a range: with no page to be filled, mainline takes them as one run of 64.
    space = space_of(512, 64, orders=range(2, 10))
    report = carried_out(space, policy="mainline", max_ptes_none=0, mechanism="madvise")
    assert report.needs_move == {6: 1}
    assert report.folios == {}
    assert report.ranges.made == 1
    assert not report.complete
    assert [order for _, order in space.attempts] == [9]
    assert carried_out(space_of(512, 64), policy="mainline", max_ptes_none=0, orders="2M").complete


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"mechanism": "magic"}, "mechanism 'magic'"),
        ({"max_pause": 0.0}, "pause"),
        ({"max_pause": float("nan")}, "pause"),
        ({"max_pause": 100.0}, "pause"),
        ({"pause_share": 0.0}, "pause_share"),
        ({"pause_share": 2.0}, "pause_share"),
        ({"pause_share": float("nan")}, "pause_share"),
        ({"mechanism": "madvise", "fill": True}, "fill"),
        ({"mechanism": "madvise", "verify": True}, "verify"),
        ({"mechanism": "move", "orders": "2M"}, "no folios of 2M"),
        ({"max_bloat": -1}, "below 0"),
        ({"rate": 0}, "not above 0"),
        ({"rate": -5}, "not above 0"),
        ({"max_ptes_none": 512}, "max_ptes_none 512"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], said: str) -> None:
    space = space_of(512)
    with pytest.raises(UsageError, match=said):
        carried_out(space, **options)
    assert space.attempts == []


def test_what_goes_wrong_in_the_middle_does_not_lose_the_report() -> None:
    class LosesRights(FakeSpace):
        def attempt(self, address: int, order: int) -> BlockOutcome:
            if len(self.attempts) == 2:
                raise NotPermittedError("not permitted any more", help="CAP_SYS_NICE")
            return super().attempt(address, order)

    report = carried_out(space_of(512, 512, 512, 512, cls=LosesRights))
    assert (report.ranges.made, report.ranges.not_tried) == (2, 1)
    assert report.ranges.failed_by_result == {ScanResult.FAIL: 1}
    assert report.error is not None
    assert report.error.help == "CAP_SYS_NICE"
    assert not report.complete
    assert accounted(report) == 4


def test_missing_rights_are_told_at_once() -> None:
    class Guarded(FakeSpace):
        def attempt(self, address: int, order: int) -> BlockOutcome:
            raise NotPermittedError("not permitted", help="CAP_SYS_NICE")

    with pytest.raises(NotPermittedError):
        carried_out(space_of(512, cls=Guarded))


def test_progress_is_told_after_every_range() -> None:
    told: list[tuple[int, int, str]] = []
    carried_out(space_of(*[512] * 40), progress=lambda done, total, what: told.append((done, total, what)))
    size = X86_64.pmd_size
    assert told == [(done * size, 40 * size, "2M") for done in range(1, 41)]


# Pace.


@pytest.fixture
def clock() -> RestingClock:
    return RestingClock()


class Timed(FakeSpace):
    """Takes the time on `clock` that its collapses say they take, and notes when each began."""

    clock: RestingClock
    began: list[float]

    def attempt(self, address: int, order: int) -> BlockOutcome:
        self.began.append(self.clock.time)
        self.clock.time += COLLAPSE_NS / 1e9
        return super().attempt(address, order)


def timed(clock: RestingClock, *fullness: int) -> Timed:
    space = space_of(*fullness, cls=Timed)
    assert isinstance(space, Timed)
    space.clock, space.began = clock, []
    return space


@pytest.mark.parametrize("rate", [1 << 20, 2 << 20, 7 << 20, 100 << 20, 10 << 30])
def test_no_more_is_collapsed_than_the_rate_allows(clock: RestingClock, rate: int) -> None:
    space = timed(clock, *[512] * 100)
    start = clock.time
    report = carried_out(space, rate=rate)
    assert report.ranges.made == 100
    burst = BYTES_BURST_SECONDS * rate + max(X86_64.pmd_size, work.PACE * rate)
    for done, began in enumerate(space.began):
        assert done * X86_64.pmd_size <= rate * (began - start) + burst
    # Not much less either, because the work itself takes 25 ms.
    assert report.elapsed <= 100 * X86_64.pmd_size / rate + 100 * COLLAPSE_NS / 1e9 + 1e-6
    assert report.elapsed == pytest.approx(clock.time - start)


@pytest.mark.slow
def test_few_long_rests_instead_of_many_short_ones(clock: RestingClock) -> None:
    begun = clock.time
    carried_out(timed(clock, *[512] * 500), rate=1 << 30)
    assert 0 < len(clock.rests) <= 1 + (clock.time - begun) / BYTES_SLICE_SECONDS


def test_without_a_rate_nobody_rests(clock: RestingClock) -> None:
    carried_out(timed(clock, *[512] * 100))
    assert clock.rests == []


def test_nobody_rests_after_the_last(clock: RestingClock) -> None:
    carried_out(timed(clock, 512), rate=1)
    assert clock.rests == []


def test_a_long_rest_ends_when_it_is_told_to_stop(clock: RestingClock) -> None:
    started = clock.time
    report = carried_out(timed(clock, 512, 512, 512), stop=lambda: clock.time > started + 5, rate=1)
    assert report.interrupted
    assert (report.ranges.made, report.ranges.not_tried) == (1, 2)
    assert clock.time - started < 6


def test_after_a_rest_the_pages_are_looked_at_anew(clock: RestingClock) -> None:
    space = timed(clock, 512, 510)
    clock.meanwhile = lambda: space.write(BASE + X86_64.pmd_size, 0, ORDER_NONE, pages=500)
    report = carried_out(space, rate=X86_64.pmd_size, max_bloat=100 * 4096)
    assert (report.ranges.made, report.ranges.over_budget) == (1, 1)
    assert report.filled_bytes == 0


def test_durations() -> None:
    assert Durations.of(np.empty(0)) == Durations(0, 0.0, 0.0, 0.0, 0.0)
    found = Durations.of(np.arange(1, 102) / 1000)
    assert (found.count, found.p50, found.p99, found.max) == (101, 0.051, 0.1, 0.101)
    assert found.total == pytest.approx(5.151)
    report = carried_out(space_of(*[512] * 3))
    assert report.durations.count == 3
    assert report.durations.max == COLLAPSE_NS / 1e9


# Looks.


def test_states_count_contents_and_what_of_them_is_swapped() -> None:
    runs = page_runs(
        (512, HUGE, 9),
        (512, Pte.PRESENT | Pte.ZERO | Pte.PMD_MAPPED, 9),
        *((100, Pte.PRESENT, 4), (50, Pte.PRESENT | Pte.ZERO, 0), (20, Pte.SWAP, -1), (342, 0, ORDER_NONE)),
    )
    space = FakeSpace([(Vma(BASE, BASE + 3 * X86_64.pmd_size, "rw-p"), *runs)])
    blocks = [(BASE + i * X86_64.pmd_size, X86_64.pmd_order) for i in (2, 0, 1)]
    states = states_of(space.read([(BASE, BASE + 3 * X86_64.pmd_size)]), blocks, X86_64)
    assert states.large.tolist() == [False, True, False]
    assert states.contents.tolist() == [120, 512, 0]
    assert states.swapped.tolist() == [20, 0, 0]


# Nothing done is not success.


def test_nothing_done_is_not_complete_and_has_its_reasons() -> None:
    space = space_of(512, 100)
    disabled = FakeSpace(
        [(vma, *page_runs((vma.size // 4096, Pte.PRESENT, 0))) for vma in space.vmas()], thp_disabled=True
    )
    report = carried_out(disabled)
    assert report.done_nothing
    assert not report.complete
    (left,) = report.plan.left
    assert "PR_SET_THP_DISABLE" in left.reason
    assert left.size == left.resident == 2 * X86_64.pmd_size


@pytest.mark.parametrize("fullness", [[], [0, 0]])
def test_a_process_without_anything_to_collapse_is_not_complete(fullness: list[int]) -> None:
    report = carried_out(space_of(*fullness) if fullness else FakeSpace([]))
    assert (report.done_nothing, report.complete) == (True, False)


def test_all_that_can_be_done_is_done_already() -> None:
    space = space_of(-1, -1)
    report = carried_out(space)
    assert (report.done_nothing, report.complete) == (False, True)
    assert report.plan.already_bytes == 2 * X86_64.pmd_size


def test_the_same_run_again_has_the_same_end_whatever_its_limits_leave_alone() -> None:
    options = PlanOptions(policy="pmd-only", max_ptes_none=0)
    space = space_of(512, 100)
    first, second = collapse_space(space, options), collapse_space(space, options)
    assert (first.ranges.made, first.complete) == (1, True)
    assert (second.ranges.made, second.complete, second.plan.finished) == (0, True, True)


def test_a_limit_that_leaves_memory_alone_is_not_success() -> None:
    options = PlanOptions(policy="pmd-only", max_ptes_none=0)
    report = collapse_space(space_of(100), options)
    assert report.done_nothing
    assert [left.resident for left in report.plan.left] == [100 * 4096]
    assert "EXCEED_NONE_PTE" in report.plan.left[0].reason


def test_coverage_is_of_the_process_and_not_of_what_is_eligible() -> None:
    small = Vma(BASE - 64 * X86_64.pmd_size, BASE - 64 * X86_64.pmd_size + 1536 * 4096 - 4096, "rw-p")
    # Moved by a page, so that it has two whole PMD ranges, and ends that belong to none.
    heap = (small, *page_runs((small.size // 4096, Pte.PRESENT, 0)))
    tiny = [
        (
            Vma(BASE + at * X86_64.pmd_size, BASE + at * X86_64.pmd_size + 65536, "rw-p"),
            *page_runs((16, Pte.PRESENT, 0)),
        )
        for at in range(100)
    ]
    report = carried_out(FakeSpace([heap, *tiny]))
    assert report.ranges.made == 2
    assert report.coverage == report.plan.coverage_after == 1024 / (1535 + 1600)
    assert sum(left.resident for left in report.plan.left) == (511 + 1600) * 4096
