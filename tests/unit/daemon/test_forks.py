"""Targets that share memory since a fork, and the processes that share it."""

from __future__ import annotations

import pytest

from daemon_stage import FULL, HALF, HUGE, START, G, N, Stage, small_stage
from mthp.daemon.forks import GENERATIONS, LONGEST_WAIT_SECONDS, PAUSE_SECONDS, SHORT_CHILD_SECONDS, Forks, Lineage
from mthp.daemon.ledger import FIRST_AGE
from mthp.linux.procevents import SharingEvent
from mthp.ptes import ORDER_NONE, Pte
from mthp.results import ScanResult


def test_nothing_is_collapsed_while_a_child_shares_the_memory_and_all_of_it_after() -> None:
    stage = Stage(FULL, FULL, HALF)
    stage.target.forks.began(8, stage.now)
    stage.target.forks.began(9, stage.now)
    stage.steps(30.0)
    assert stage.collapsed == []
    assert "shares memory with process 9 since a fork" in stage.target.left_out
    assert not stage.target.forks.ended(8, stage.now)
    assert stage.target.forks.ended(9, stage.now)
    stage.steps(2.0)
    assert stage.collapsed == [0, 1, 2]
    assert stage.target.left_out == ""


def test_a_child_that_stays_is_waited_for_no_longer_than_that() -> None:
    stage = Stage(FULL)
    stage.target.forks.began(8, stage.now)
    stage.steps(LONGEST_WAIT_SECONDS - 1)
    assert stage.collapsed == []
    stage.steps(5.0)
    assert stage.collapsed == [0]


def wait_for_children(stage: Stage, *, pause: float, seconds: float) -> int:
    """Let children of 5 s follow each other after pauses; return the number of those that were not waited for."""
    missed = 0
    for child in range(100, 100 + int(seconds / (5.0 + pause))):
        stage.target.forks.began(child, stage.now)
        stage.now += 4.0
        missed += not stage.target.forks.reason(stage.now)
        stage.now += 1.0
        stage.target.forks.ended(child, stage.now)
        stage.now += pause
    return missed


def test_children_that_follow_each_other_are_waited_for_as_if_they_were_one() -> None:
    stage = Stage()
    assert wait_for_children(stage, pause=1.0, seconds=LONGEST_WAIT_SECONDS) == 0
    assert wait_for_children(stage, pause=1.0, seconds=60.0) == 10
    # After a pause in which a pass could be made, the next one is waited for.
    stage.now += PAUSE_SECONDS
    assert wait_for_children(stage, pause=1.0, seconds=60.0) == 0


def test_between_two_waits_for_children_that_never_cease_one_pass_is_made() -> None:
    stage = Stage(FULL, FULL)
    made = []
    for child in range(100, 100 + int(2.5 * LONGEST_WAIT_SECONDS / 5.0)):
        stage.target.forks.began(child, stage.now)
        # Each write breaks up what was made.
        stage.space.write(START, Pte.PRESENT, 0, pages=2 * N)
        stage.process.faults += 1
        stage.steps(5.0)
        stage.target.forks.ended(child, stage.now)
        stage.steps(0.0)
        made.append(len(stage.collapsed))
    assert stage.collapsed == 2 * [0, 1]
    # The first wait ends at its full length, the second as long after the pass.
    assert [made.index(count) * 5.0 for count in (2, 4)] == [
        pytest.approx(waits * LONGEST_WAIT_SECONDS, abs=10.0) for waits in (1, 2)
    ]


def test_children_with_pauses_are_all_waited_for() -> None:
    assert wait_for_children(Stage(), pause=PAUSE_SECONDS, seconds=5 * LONGEST_WAIT_SECONDS) == 0


def test_a_child_is_waited_for_beside_one_that_stays() -> None:
    stage = Stage()
    stage.target.forks.began(8, stage.now)
    stage.now += LONGEST_WAIT_SECONDS + PAUSE_SECONDS
    assert wait_for_children(stage, pause=PAUSE_SECONDS, seconds=LONGEST_WAIT_SECONDS) == 0


def test_programs_that_are_started_often_do_not_use_up_the_wait() -> None:
    stage = Stage()
    for child in range(1000):
        stage.target.forks.began(child, stage.now)
        stage.now += SHORT_CHILD_SECONDS / 2
        stage.target.forks.ended(child, stage.now)
        stage.now += 1.0
    assert wait_for_children(stage, pause=1.0, seconds=60.0) == 0


def test_the_end_of_each_of_many_children_does_not_cause_a_scan_of_everything() -> None:
    stage = Stage(FULL)
    stage.target.forks.began(8, stage.now)
    stage.now += 5.0
    stage.target.forks.began(9, stage.now)
    assert not stage.target.forks.ended(8, stage.now)
    assert not stage.target.forks.take_over(stage.now)
    assert stage.target.forks.ended(9, stage.now + 5.0)
    assert stage.target.forks.take_over(stage.now + 5.0)


def test_what_was_shared_is_tried_again_when_the_child_is_gone_and_not_after_an_hour() -> None:
    stage = Stage(FULL, FULL)
    stage.space.fails = {START: ScanResult.EXCEED_SHARED_PTE}
    stage.steps(2 * FIRST_AGE)
    tried = len(stage.collapsed)
    assert stage.target.counters.collapsed == {G.pmd_order: 1}
    stage.space.fails = {}
    # A child of before the daemon began to listen; its end is known all the same.
    assert stage.target.forks.ended(8, stage.now)
    stage.target.next_at = stage.now
    stage.steps(1.0)
    assert stage.collapsed[tried:] == [0]


def test_what_copy_on_write_broke_up_comes_first() -> None:
    stage = Stage(HALF, HUGE, FULL, max_ptes_none=511)
    stage.space.fails = {START + 2 * G.pmd_size: ScanResult.PAGE_COUNT}
    stage.steps(1.0)
    tried = len(stage.collapsed)
    stage.target.forks.began(8, stage.now)
    # Its PMD entry was split by a write, and half of it unmapped meanwhile.
    stage.space.write(START + G.pmd_size, Pte.PRESENT, 0, pages=N // 2)
    stage.space.write(START + G.pmd_size + G.pmd_size // 2, 0, ORDER_NONE, pages=N // 2)
    stage.now += 5.0
    assert stage.target.forks.ended(8, stage.now)
    stage.space.fails = {}
    stage.target.next_at = stage.now
    stage.steps(1.0)
    assert stage.collapsed[tried:] == [1, 2]


def test_small_folios_that_copy_on_write_broke_up_are_made_again() -> None:
    stage = small_stage("split", FULL, orders=(4,))
    stage.steps(1.0)
    made = len(stage.collapsed)
    assert made
    stage.target.forks.began(8, stage.now)
    # As many pages are present as before, and none was mapped by a PMD entry.
    stage.space.write(START, Pte.PRESENT, 0, pages=N)
    stage.now += 5.0
    assert stage.target.forks.ended(8, stage.now)
    stage.target.next_at = stage.now
    stage.steps(1.0)
    assert len(stage.collapsed) == 2 * made


def test_children_that_begin_another_program_at_once_cost_no_second_look() -> None:
    stage = Stage(FULL)
    stage.steps(5.0)
    scanned = stage.target.counters.scanned_ptes
    stage.target.forks.began(8, stage.now)
    stage.now += SHORT_CHILD_SECONDS / 2
    assert not stage.target.forks.ended(8, stage.now)
    stage.steps(5.0)
    assert stage.target.counters.scanned_ptes == scanned


class Family:
    """The lineage of some targets, fed with events a second apart."""

    def __init__(self, *targets: int) -> None:
        self.forks = {pid: Forks() for pid in targets}
        self.lineage = Lineage(self.forks.get)
        self.now = 0.0

    def forked(self, child: int, parent: int) -> set[int]:
        return self._take(SharingEvent("fork", child, parent))

    def executed(self, pid: int) -> set[int]:
        return self._take(SharingEvent("exec", pid))

    def exited(self, pid: int, parent: int = 0) -> set[int]:
        return self._take(SharingEvent("exit", pid, parent))

    def _take(self, event: SharingEvent) -> set[int]:
        self.now += 1.0
        return self.lineage.take([event], self.now)

    @property
    def held(self) -> set[int]:
        """The targets that are waiting."""
        return {pid for pid, forks in self.forks.items() if forks.reason(self.now)}


def test_a_grandchild_shares_the_memory_after_its_parent_has_ended() -> None:
    family = Family(1)
    family.forked(2, parent=1)
    family.forked(3, parent=2)
    family.forked(4, parent=3)
    assert family.exited(2) == family.exited(3) == set()
    assert family.held == {1}
    assert family.exited(4) == {1}
    assert family.held == set()


def test_a_double_fork_within_one_batch_of_events_is_followed() -> None:
    family = Family(1)
    events = [SharingEvent("fork", 2, 1), SharingEvent("fork", 3, 2), SharingEvent("exit", 2, 1)]
    family.lineage.take(events, 1.0)
    assert family.held == {1}


def test_a_child_that_executes_another_program_leaves_its_own_children_sharing() -> None:
    family = Family(1, 2)
    family.forked(2, parent=1)
    family.forked(3, parent=2)
    assert family.held == {1, 2}
    assert family.executed(2) == {2}
    assert family.held == {1}
    assert family.executed(3) == {1}
    assert family.held == set()


def test_a_parent_that_executes_another_program_shares_nothing_with_its_children() -> None:
    family = Family(1)
    family.forked(2, parent=1)
    assert family.executed(1) == {1}
    assert family.held == set()
    # Its next children share the new program.
    family.forked(3, parent=1)
    assert family.held == {1}
    assert family.lineage.sharing(1) == {3: family.now}


def test_a_daemon_has_its_memory_for_itself_when_the_process_that_started_it_ends() -> None:
    family = Family(3)
    family.forked(2, parent=1)
    family.forked(3, parent=2)
    for other, since in family.lineage.sharing(3).items():
        family.forks[3].began(other, since)
    family.exited(2)
    assert family.held == {3}
    assert family.exited(1) == {3}
    assert family.held == set()


def test_a_program_that_was_started_shares_nothing_when_it_ends() -> None:
    family = Family(1)
    family.forked(2, parent=1)
    family.forks[1] = Forks()
    family.executed(2)
    family.forks[1].take_over(family.now)
    assert family.exited(2, parent=1) == set()
    # It was forked before the daemon listened, and perhaps shared memory until its end.
    assert family.exited(7, parent=1) == {1}


def test_a_number_that_is_used_again_is_another_process() -> None:
    family = Family(1)
    family.forked(2, parent=1)
    # The ends of both were lost, and their numbers are used the other way round.
    family.forked(1, parent=2)
    assert family.lineage.sharing(2) == {1: family.now}
    assert family.lineage.sharing(1) == {2: family.now}


def test_a_long_chain_of_forks_costs_no_more_than_so_many_generations() -> None:
    family = Family(1)
    for pid in range(2, 3000):
        family.forked(pid, parent=pid - 1)
    assert len(family.lineage.sharing(1500)) == 2 * GENERATIONS
    for pid in range(2, 3000):
        family.exited(pid)
    assert family.held == set()
    assert list(family.lineage) == []
