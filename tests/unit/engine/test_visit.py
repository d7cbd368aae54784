"""Khugepaged over an address space: it collapses the planned runs, on every backend."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

import mthp
from fakes import FakeSpace, RestingClock, page_runs
from mthp.engine.admission import Candidate
from mthp.engine.khugepaged import Khugepaged
from mthp.engine.scanner import PassEnd
from mthp.engine.visited import Passage
from mthp.errors import NotPermittedError, UsageError
from mthp.geometry import Geometry
from mthp.means import Means
from mthp.ptes import ORDER_NONE, Block, Pte, PteColumns, Segment
from mthp.results import BlockOutcome, ScanResult
from mthp.tunables import Switches, Tunables
from mthp.vma import Vma

SMALL = Geometry("16-ptes", 4096, 4)
SIZE = SMALL.pmd_size
PAGE, NONE, HUGE = (Pte.PRESENT, 0), (0, ORDER_NONE), (Pte.PRESENT | Pte.PMD_MAPPED, 4)
ALL_ON = Switches("madvise", dict.fromkeys(range(2, 5), "madvise"))


def pages(count: int, kind: tuple[int, int] = PAGE) -> tuple[int, int, int]:
    return count, int(kind[0]), kind[1]


def space(
    *runs: tuple[int, int, int],
    flags: Sequence[str] = ("hg",),
    tunables: Tunables | None = None,
    switches: Switches = ALL_ON,
    fails: dict[int, ScanResult] | None = None,
) -> FakeSpace:
    """Return one mapping from the first PMD range on, with these pages."""
    state, order = page_runs(*runs)
    vma = Vma(SIZE, SIZE + len(state) * 4096, "rw-p", flags=frozenset(flags), has_anon_vma=True)
    return FakeSpace(
        [(vma, state, order)],
        geometry=SMALL,
        switches=switches,
        tunables=tunables or Tunables(15, 2, 8, 1000),
        orders=range(2, 5),
        fails=fails,
    )


def at(page: int) -> int:
    return SIZE + page * 4096


def entered(target: FakeSpace, **options: object) -> Khugepaged:
    daemon = mthp.Khugepaged(**options)  # type: ignore[arg-type]
    assert daemon.enter(target)
    return daemon


def test_a_round_carries_out_what_a_plan_would() -> None:
    target = space(pages(16), pages(8), pages(8, NONE), pages(16, HUGE), tunables=Tunables(0, 2, 8, 1000))
    seen: list[Passage] = []
    daemon = entered(target, listener=lambda visit, passage: seen.append(passage))
    assert daemon.do_scan() is PassEnd.ROUND
    assert target.attempts == [(at(0), 4), (at(16), 3)]
    results = np.concatenate([passage.results for passage in seen]).tolist()
    assert results == [ScanResult.SUCCEED, ScanResult.SUCCEED, ScanResult.PMD_MAPPED]
    assert (daemon.pages_collapsed, daemon.full_scans) == (2, 1)
    assert daemon.statistics.copied == {4: 16, 3: 8}
    # The budget counts entries: two ranges of 16, one that a PMD entry maps, and two visits, for the first one ends
    # when something was tried.
    assert daemon.statistics.progress == 16 + 16 + 1 + 2
    daemon.do_scan()
    assert len(target.attempts) == 2


def test_all_runs_of_many_ranges_are_one_batch() -> None:
    target = space(*[run for _ in range(6) for run in (pages(4), pages(12, NONE))], tunables=Tunables(0, 2, 8, 1000))
    batches: list[Sequence[Block]] = []

    def attempt_blocks(blocks: Sequence[Block], means: Means, before: PteColumns) -> list[BlockOutcome]:
        batches.append(list(blocks))
        assert means.fill
        return [target.attempt(*block) for block in blocks]

    target.attempt_blocks = attempt_blocks  # type: ignore[method-assign]
    entered(target).do_scan()
    assert batches == [[(at(16 * row), 2) for row in range(6)]]


def test_the_budget_ends_a_pass_and_the_next_goes_on_there() -> None:
    target = space(*[pages(16) for _ in range(5)], tunables=Tunables(0, 2, 8, 30))
    daemon = entered(target)
    assert daemon.do_scan() is PassEnd.BUDGET
    assert target.attempts == [(at(0), 4), (at(16), 4)]
    assert daemon.address == at(32)
    daemon.full_scan()
    assert sorted(target.attempts) == [(at(16 * row), 4) for row in range(5)]


def test_cheap_ranges_are_read_far_ahead_and_dear_ones_behind_them_not_past_the_budget() -> None:
    target = space(pages(8 * 16, HUGE), *[pages(16) for _ in range(10)], tunables=Tunables(0, 2, 8, 40))
    daemon = entered(target)
    assert daemon.do_scan() is PassEnd.BUDGET
    assert target.attempts == [(at(8 * 16), 4), (at(9 * 16), 4)]
    # Eight ranges that PMD entries map, two that were collapsed, and a visit for each end of one.
    assert daemon.statistics.progress == 8 + 2 * 16 + 2


def test_what_is_passed_over_counts_once() -> None:
    forbidden = Vma(SIZE, 2 * SIZE, "rw-p", flags=frozenset({"nh"}), has_anon_vma=True)
    sparse = Vma(3 * SIZE, 8 * SIZE, "rw-p", flags=frozenset({"hg"}), has_anon_vma=True)
    target = FakeSpace(
        [
            (forbidden, *page_runs(pages(16))),
            (sparse, *page_runs(pages(16), pages(16), pages(32, NONE), pages(16))),
        ],
        geometry=SMALL,
        switches=ALL_ON,
        tunables=Tunables(0, 2, 8, 17),
        orders=range(2, 5),
    )
    daemon = entered(target)
    found = []
    for _ in range(4):
        before = daemon.statistics.progress
        daemon.do_scan()
        found.append((daemon.statistics.progress - before, daemon.address // SIZE))
    # The mapping that is not to be touched and the visit, and a range; a range; the stretch that is empty, and a range.
    assert found[:3] == [(18, 4), (17, 5), (18, 8)]


def test_a_listing_that_proves_stale_is_made_anew() -> None:
    target = space(pages(16), pages(16), pages(16), tunables=Tunables(0, 2, 8, 16))
    listings = []
    original = target.vmas

    def noting() -> list[Vma]:
        listings.append(len(target.attempts))
        return original()

    target.vmas = noting  # type: ignore[method-assign]
    daemon = entered(target)
    daemon.do_scan()
    assert listings == [0]
    target.fails[at(16)] = ScanResult.VMA_CHECK
    daemon.do_scan()
    daemon.do_scan()
    assert listings == [0, 2]


@pytest.mark.parametrize(("policy", "rests"), [("no-creep", 2), ("per-order", 3)])
def test_what_was_filled_is_remembered_where_the_policy_asks(policy: str, rests: int) -> None:
    """Seven and six pages of sixteen, where two may be filled: without a memory, the whole comes next."""
    target = space(pages(7), pages(1, NONE), pages(6), pages(2, NONE), tunables=Tunables(2, 2, 8, 1000))
    daemon = entered(target, policy=policy)
    for _ in range(4):
        daemon.do_scan()
    assert target.attempts == [(at(0), 3), (at(8), 2), (at(0), 4)][:rests]


def test_a_failure_is_counted_and_tried_again() -> None:
    target = space(pages(16), pages(16), fails={at(16): ScanResult.PAGE_COUNT})
    daemon = entered(target)
    daemon.do_scan()
    assert daemon.statistics.attempts == {(4, ScanResult.SUCCEED): 1, (4, ScanResult.PAGE_COUNT): 1}
    assert daemon.statistics.results[ScanResult.PAGE_COUNT] == 1
    target.fails.clear()
    daemon.do_scan()
    assert daemon.statistics.attempts[4, ScanResult.SUCCEED] == 2


def test_a_call_that_succeeded_counts_only_where_the_page_tables_show_it() -> None:
    target = space(pages(16), pages(16), pages(4), pages(12, NONE), tunables=Tunables(0, 2, 8, 1000))
    original = target.attempt

    def attempt(address: int, order: int) -> BlockOutcome:
        outcome = original(address, order)
        if address == at(16):
            target.write(address, int(Pte.PRESENT), 0, pages=16)
        return outcome

    target.attempt = attempt  # type: ignore[method-assign]
    daemon = entered(target)
    daemon.do_scan()
    assert target.attempts == [(at(0), 4), (at(16), 4), (at(32), 2)]
    assert daemon.pages_collapsed == 2
    assert daemon.statistics.attempts[4, ScanResult.SUCCEED] == 1
    assert daemon.statistics.attempts[4, ScanResult.PTE_NON_PRESENT] == 1
    assert daemon.statistics.copied == {4: 16, 2: 4}


def test_a_failed_allocation_rests_once() -> None:
    clock = RestingClock()
    target = space(pages(16), pages(16), pages(16), fails={at(0): ScanResult.ALLOC_HUGE_PAGE_FAIL})
    entered(target, clock=clock).do_scan()
    assert clock.rests == [60.0]


@pytest.mark.parametrize(
    ("instead", "attempts"),
    [
        (ScanResult.ALLOC_HUGE_PAGE_FAIL, [(at(0), 3), (at(8), 3)]),
        (ScanResult.PTE_MAPPED_HUGEPAGE, []),
        (ScanResult.CGROUP_CHARGE_FAIL, []),
    ],
)
def test_what_is_not_admitted_is_not_tried(instead: ScanResult, attempts: list[Block]) -> None:
    asked: list[Candidate] = []

    def admit(candidate: Candidate) -> ScanResult:
        asked.append(candidate)
        return instead if candidate.order == 4 else ScanResult.SUCCEED

    target = space(pages(12), pages(4, NONE))
    entered(target, admit=admit).do_scan()
    assert target.attempts == attempts
    assert (asked[0].address, asked[0].order, asked[0].copied, asked[0].filled) == (at(0), 4, 12, 4)
    # The right half's four none PTEs are filled, since max_ptes_none is all but one.
    assert [candidate.filled for candidate in asked[1:]] == [0, 4][: len(attempts)]


def test_ranges_that_are_not_chosen_are_not_read() -> None:
    target = space(pages(16), pages(16), pages(16))
    read: list[Segment] = []
    original = target.read

    def noting(segments: Sequence[Segment]) -> PteColumns:
        read.extend(segments)
        return original(segments)

    target.read = noting  # type: ignore[method-assign]
    daemon = entered(target, choose=lambda space, addresses: addresses != at(16))
    daemon.do_scan()
    assert set(read) == {(at(0), at(16)), (at(32), at(48))}
    assert target.attempts == [(at(0), 4), (at(32), 4)]
    assert daemon.statistics.progress == 16 + 1 + 16 + 2


def test_switches_and_limits_are_followed_live() -> None:
    target = space(pages(16), switches=Switches("madvise", {4: "never"}))
    daemon = mthp.Khugepaged()
    assert not daemon.enter(target)
    assert daemon.slots == ()
    target._switches = ALL_ON
    assert daemon.enter(target)
    assert daemon.enter(target)
    assert len(daemon.slots) == 1


def test_orders_may_be_given_whatever_the_switches_say() -> None:
    target = space(pages(16), flags=(), switches=Switches("never", {4: "never"}))
    entered(target, orders=[2]).do_scan()
    assert target.attempts == [(at(4 * index), 2) for index in range(4)]


def test_who_forbade_it_is_left_alone() -> None:
    daemon = mthp.Khugepaged(orders=[4])
    assert not daemon.enter(space(pages(16), flags=("nh",)))


def test_a_target_that_vanishes_is_dropped() -> None:
    target = space(pages(16))
    daemon = entered(target)
    target.vanished = True
    daemon.do_scan()
    assert (daemon.slots, daemon.full_scans, target.closed) == ((), 1, False)


def test_what_the_rights_do_not_allow_is_said_once_and_the_rest_goes_on() -> None:
    bad, good = space(pages(16)), space(pages(16))

    def refuse(blocks: Sequence[Block], means: Means, before: PteColumns) -> list[BlockOutcome]:
        raise NotPermittedError("no")

    bad.attempt_blocks = refuse  # type: ignore[method-assign]
    daemon = entered(bad)
    daemon.enter(good)
    with pytest.raises(NotPermittedError):
        daemon.do_scan()
    daemon.do_scan()
    assert good.attempts == [(at(0), 4)]


def test_each_space_may_have_its_own_rules() -> None:
    first, second = space(pages(16)), space(pages(16))
    daemon = mthp.Khugepaged(orders=[4])
    daemon.enter(first)
    daemon.enter(second, orders=[3], within=(at(0), at(16)))
    daemon.do_scan()
    assert (first.attempts, second.attempts) == ([(at(0), 4)], [(at(0), 3), (at(8), 3)])


@pytest.mark.parametrize("options", [{"policy": "best"}, {"max_ptes_none": 16}, {"orders": [1]}, {"colour": "red"}])
def test_options_that_cannot_be(options: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        mthp.Khugepaged(**options).enter(space(pages(16)))  # type: ignore[arg-type]


def test_a_forced_visit_heeds_no_limit_and_no_switch() -> None:
    target = space(pages(1), pages(15, NONE), pages(16), pages(16, HUGE), switches=Switches("never", {}))
    entered(target, orders=None, trigger="madvise", max_ptes_none=0).do_scan()
    assert target.attempts == [(at(0), 4), (at(16), 4)]


def test_the_largest_orders_of_a_batch_come_first() -> None:
    target = space(*[run for _ in range(2) for run in (pages(12), pages(4, NONE))], tunables=Tunables(0, 2, 8, 1000))
    entered(target).do_scan()
    assert target.attempts == [(at(0), 3), (at(16), 3), (at(8), 2), (at(24), 2)]


@pytest.mark.parametrize("policy", ["mainline", "rfc", "per-order"])
def test_a_budget_that_ends_within_a_range_leaves_smaller_runs(policy: str) -> None:
    """Twelve pages of sixteen; four PTEs more may be filled, then none."""
    target = space(*[run for _ in range(2) for run in (pages(12), pages(4, NONE))])
    left = [4]

    def admit(candidate: Candidate) -> ScanResult:
        if candidate.filled > left[0]:
            return ScanResult.EXCEED_NONE_PTE
        left[0] -= candidate.filled
        return ScanResult.SUCCEED

    daemon = entered(target, admit=admit, policy=policy, mthp_min_order=2)
    daemon.do_scan()
    assert target.attempts[:2] == [(at(0), 4), (at(16), 3)]
    assert daemon.statistics.filled.total() == 4
    # Where an order that failed is not tried again in the range, the rest follows in the next pass.
    daemon.do_scan()
    assert (at(24), 2) in target.attempts


def test_a_limit_that_is_reached_ends_the_range_and_is_its_result() -> None:
    target = space(pages(16), pages(8), pages(8, NONE), tunables=Tunables(0, 2, 8, 1000))
    refusing = {at(16): ScanResult.CGROUP_CHARGE_FAIL}
    daemon = entered(target, admit=lambda candidate: refusing.get(candidate.address, ScanResult.SUCCEED))
    daemon.do_scan()
    assert target.attempts == [(at(0), 4)]
    assert daemon.statistics.results[ScanResult.CGROUP_CHARGE_FAIL] == 1
