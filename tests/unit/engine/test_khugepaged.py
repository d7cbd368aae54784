"""The pace of khugepaged: whom it visits, how far it gets in a pass, when it rests."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import numpy as np
import pytest

from fakes import RestingClock
from mthp.engine.scanner import PassEnd, Scanner
from mthp.engine.visited import NextRanges, Passage
from mthp.errors import NotPermittedError, TargetVanishedError
from mthp.ptes import Segment
from mthp.results import BlockOutcome, ScanResult
from mthp.tunables import Tunables
from waiting import PATIENCE, until

RANGE = 16


@dataclass
class Stub:
    """An address space of `ranges` PMD ranges of 16 entries, numbered from 0; reads one at a time.

    `plan` has the outcome of a range, by its number; the others end in SUCCEED without an attempt.
    """

    ranges: int
    plan: dict[int, ScanResult] = field(default_factory=dict)
    exiting: bool = False
    thp_disabled: bool = False
    seen: list[int] = field(default_factory=list)
    closed: bool = False
    vanishes_at: int = -1
    error: Exception | None = None

    def find(self, address: int) -> NextRanges:
        if address // RANGE == self.vanishes_at:
            raise self.error or TargetVanishedError("gone")
        return NextRanges(0, (address, self.ranges * RANGE)) if address < self.ranges * RANGE else NextRanges(1, None)

    def scan(self, stretch: Segment, budget: int) -> Passage:
        number = stretch[0] // RANGE
        self.seen.append(number)
        result = self.plan.get(number, ScanResult.EXCEED_NONE_PTE)
        tried = number in self.plan
        attempts = (BlockOutcome(stretch[0], 4, result, copied=10, filled=6),) if tried else ()
        addresses, results = np.array([stretch[0]], np.uint64), np.array([result], np.int8)
        return Passage(stretch[0] + RANGE, RANGE, addresses, results, result, tried, attempts)

    def close(self) -> None:
        self.closed = True


def scanner(budget: int, *spaces: Stub, sleep: int = 10_000) -> tuple[Scanner, RestingClock]:
    clock = RestingClock(0.0)
    made = Scanner(lambda: Tunables(15, 2, 8, budget, sleep, 60_000), clock)
    for space in spaces:
        made.add(space)
    return made, clock


def test_the_cursor_survives_between_passes_and_a_full_scan_counts_behind_the_last() -> None:
    first, second = Stub(3), Stub(2)
    daemon, _ = scanner(2 * RANGE, first, second)
    assert [daemon.do_scan() for _ in range(2)] == [PassEnd.BUDGET] * 2
    assert (first.seen, second.seen) == ([0, 1, 2], [0])
    assert (daemon.current, daemon.address, daemon.full_scans) == (second, RANGE, 0)
    # After the last range the round is over, and the pass continues at the first with the rest of its budget.
    assert daemon.do_scan() is PassEnd.BUDGET
    assert (first.seen, second.seen) == ([0, 1, 2, 0], [0, 1])
    assert (daemon.current, daemon.address, daemon.full_scans) == (first, RANGE, 1)


def test_a_pass_ends_after_one_round_however_large_the_budget() -> None:
    space = Stub(3)
    daemon, _ = scanner(10_000, space)
    assert daemon.do_scan() is PassEnd.ROUND
    assert (space.seen, daemon.full_scans) == ([0, 1, 2], 1)
    # One for the visit, sixteen for each range, one for the mapping after it.
    assert daemon.statistics.progress == 1 + 3 * RANGE + 1


def test_without_anybody_to_visit_there_is_nothing_to_do() -> None:
    daemon, _ = scanner(64)
    assert daemon.do_scan() is PassEnd.IDLE
    assert daemon.full_scans == 0


def test_the_first_failed_allocation_rests_and_the_second_ends_the_pass() -> None:
    failing = dict.fromkeys((1, 3, 5), ScanResult.ALLOC_HUGE_PAGE_FAIL)
    space = Stub(8, failing)
    daemon, clock = scanner(10_000, space)
    assert daemon.do_scan() is PassEnd.ALLOC
    assert (space.seen, clock.rests) == ([0, 1, 2, 3], [60.0])
    # The next pass continues there, and through the first ranges again, as the kernel's does.
    assert daemon.do_scan() is PassEnd.ALLOC
    assert (space.seen[4:], clock.rests) == ([4, 5, 6, 7, 0, 1], [60.0, 60.0])
    assert daemon.statistics.alloc_sleeps == 2


def test_a_failed_allocation_that_ends_the_budget_does_not_rest() -> None:
    daemon, clock = scanner(RANGE, Stub(4, {0: ScanResult.ALLOC_HUGE_PAGE_FAIL}))
    assert daemon.do_scan() is PassEnd.BUDGET
    assert clock.rests == []


def test_who_switched_thp_off_is_passed_over_and_stays() -> None:
    off, other = Stub(2, thp_disabled=True), Stub(1)
    daemon, _ = scanner(10_000, off, other)
    daemon.do_scan()
    assert (off.seen, other.seen, daemon.slots) == ([], [0], (off, other))


@pytest.mark.parametrize("how", ["exiting", "vanishes"])
def test_who_is_gone_is_dropped_and_the_next_is_visited(how: str) -> None:
    gone = Stub(4, exiting=how == "exiting", vanishes_at=2 if how == "vanishes" else -1)
    other = Stub(1)
    daemon, _ = scanner(10_000, gone, other)
    daemon.do_scan()
    assert gone.seen == ([0, 1] if how == "vanishes" else [])
    assert (gone.closed, other.seen, daemon.slots, daemon.full_scans) == (True, [0], (other,), 1)


def test_an_error_drops_its_space_and_the_next_pass_goes_on_behind_it() -> None:
    bad, other = Stub(4, vanishes_at=1, error=NotPermittedError("no")), Stub(2)
    daemon, _ = scanner(10_000, bad, other)
    with pytest.raises(NotPermittedError):
        daemon.do_scan()
    assert (daemon.slots, daemon.current, daemon.full_scans) == ((other,), other, 0)
    assert daemon.do_scan() is PassEnd.ROUND
    assert set(other.seen) == {0, 1}


def test_what_was_collapsed_is_counted() -> None:
    space = Stub(4, {1: ScanResult.SUCCEED, 2: ScanResult.PAGE_COUNT})
    daemon, _ = scanner(10_000, space)
    daemon.full_scan()
    counted = daemon.statistics
    assert daemon.pages_collapsed == 1
    assert counted.results == {
        ScanResult.EXCEED_NONE_PTE: 2,
        ScanResult.SUCCEED: 1,
        ScanResult.PAGE_COUNT: 1,
    }
    assert counted.attempts == {(4, ScanResult.SUCCEED): 1, (4, ScanResult.PAGE_COUNT): 1}
    assert (counted.copied, counted.filled, counted.ranges) == ({4: 10}, {4: 6}, 4)


def test_removing_the_current_space_moves_the_cursor_on() -> None:
    first, second = Stub(8), Stub(1)
    daemon, _ = scanner(RANGE, first, second)
    daemon.do_scan()
    daemon.remove(first)
    assert (daemon.current, daemon.address, first.closed) == (second, 0, True)
    daemon.remove(first)
    daemon.remove(second)
    assert (daemon.current, daemon.slots, daemon.full_scans) == (None, (), 1)


def test_a_space_that_is_removed_while_it_is_scanned_is_dropped_when_that_is_over() -> None:
    space = Stub(8)
    daemon, _ = scanner(10_000, space)

    def leaving(slot: object, passage: Passage) -> None:
        if passage.addresses[0] == 2 * RANGE:
            daemon.remove(space)
            assert not space.closed

    daemon._listener = leaving
    daemon.do_scan()
    assert (space.seen, space.closed, daemon.slots, daemon.full_scans) == ([0, 1, 2], True, (), 1)


def test_run_rests_between_passes_until_it_is_told_to_stop() -> None:
    space = Stub(2)
    daemon, clock = scanner(RANGE, space, sleep=2000)
    daemon.run(lambda: clock.time >= 6.0)
    assert sum(clock.rests) == 6.0
    assert len(space.seen) == 3


def test_stop_from_another_thread_ends_a_rest_at_once() -> None:
    daemon = Scanner(lambda: Tunables(15, 2, 8, 64, 3_600_000, 60_000))
    daemon.add(Stub(2))
    thread = threading.Thread(target=daemon.run)
    thread.start()
    until(lambda: daemon.statistics.passes > 0, "the first pass")
    daemon.stop()
    thread.join(PATIENCE)
    assert not thread.is_alive()
    assert daemon.statistics.passes == 1


def test_the_first_to_come_wakes_an_idle_daemon() -> None:
    daemon = Scanner(lambda: Tunables(15, 2, 8, 64, 3_600_000, 60_000))
    thread = threading.Thread(target=daemon.run)
    thread.start()
    until(lambda: daemon.statistics.passes > 0, "the first pass")
    space = Stub(1)
    daemon.add(space)
    until(lambda: bool(space.seen), "a scan of it")
    daemon.stop()
    thread.join(PATIENCE)
    assert space.seen == [0]
