"""One target: when it is checked, which work is done in which order, and within which budgets."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from daemon_stage import (
    EMPTY,
    FULL,
    HALF,
    HUGE,
    START,
    G,
    N,
    Stage,
    small_stage,
)
from fakes import FakeSpace, page_runs
from mthp.daemon.eagerness import Shortage
from mthp.daemon.environment import SHORTEST_ROUND
from mthp.daemon.ledger import FIRST_AGE
from mthp.daemon.rules import Rule, Settings
from mthp.daemon.target import LEFT_OUT_SECONDS, NOT_EAGER, REACH_SECONDS, TRIM_SECONDS, TRIM_SHARE
from mthp.daemon.target_state import PART_SECONDS
from mthp.errors import NotPermittedError, TargetVanishedError
from mthp.naming import Match
from mthp.objects import to_object
from mthp.ptes import ORDER_NONE, Pte
from mthp.results import ScanResult
from mthp.tunables import Switches
from mthp.vma import Vma


def test_it_collapses_what_the_policy_wants_the_fullest_first_and_then_rests() -> None:
    stage = Stage(HALF, FULL, EMPTY, FULL)
    stage.steps(5.0)
    assert stage.collapsed == [1, 3, 0]
    assert stage.target.counters.collapsed == {G.pmd_order: 3}
    assert stage.target.counters.copied_bytes == (2 * N + N // 2) * G.page_size
    assert stage.target.counters.bloat_bytes == N // 2 * G.page_size
    assert stage.environment.total.collapsed == {G.pmd_order: 3}
    opened = stage.opened
    stage.steps(600.0)
    assert stage.collapsed == [1, 3, 0]
    assert stage.opened - opened < 10


def test_an_idle_process_costs_looks_and_no_scan() -> None:
    stage = Stage(((N, Pte.PRESENT, 9),))
    stage.steps(60.0)
    scanned, opened, looks = stage.target.counters.scanned_ptes, stage.opened, stage.target.counters.looks
    stage.steps(600.0)
    assert stage.target.counters.scanned_ptes == scanned
    assert stage.opened - opened <= 10
    assert stage.target.counters.looks - looks <= 600 / SHORTEST_ROUND


def test_new_memory_is_noticed_within_a_second_however_long_the_process_was_idle() -> None:
    stage = Stage(FULL, EMPTY)
    stage.steps(3600.0)
    assert stage.collapsed == [0]
    stage.space.write(START + G.pmd_size, Pte.PRESENT, 0, pages=N)
    stage.process.faults += N
    stage.steps(1.0)
    assert stage.collapsed == [0, 1]


def test_ranges_that_did_not_change_are_not_scanned_again() -> None:
    stage = Stage(*[((100, Pte.PRESENT, 0), (N - 100, 0, ORDER_NONE))] * 3, max_ptes_none=50)
    stage.steps(2.0)
    scanned = stage.target.counters.scanned_ptes
    assert scanned >= 3 * N
    stage.process.faults += 1
    stage.space.write(START + G.pmd_size + 200 * G.page_size, int(Pte.PRESENT), 0)
    stage.steps(10.0)
    assert stage.target.counters.scanned_ptes == scanned + N
    assert stage.target.counters.skipped >= 2
    stage.process.faults += 1
    stage.now += FIRST_AGE
    stage.steps(10.0)
    assert stage.target.counters.scanned_ptes == scanned + 4 * N


def test_new_memory_is_found_by_the_faults_that_made_it() -> None:
    stage = Stage(EMPTY, EMPTY)
    stage.steps(300.0)
    assert stage.collapsed == []
    stage.space.write(START, int(Pte.PRESENT), 0, pages=N)
    stage.process.faults += N
    stage.steps(10.5)
    assert stage.collapsed == [0]


def test_advice_without_any_fault_is_found_too() -> None:
    stage = Stage(FULL)
    vma, state, order = stage.space._mappings[0]
    stage.space._mappings[0] = (Vma(vma.start, vma.end, "rw-p", has_anon_vma=True), state, order)
    stage.steps(2.0)
    assert stage.collapsed == []
    stage.space._mappings[0] = (vma, state, order)
    stage.steps(10.0)
    assert stage.collapsed == [0]


def test_a_rate_holds_back_what_would_be_too_much() -> None:
    stage = Stage(*[FULL] * 20, rate=4 * G.pmd_size)
    stage.steps(1.0)
    assert 4 <= len(stage.collapsed) <= 6
    stage.steps(2.0)
    assert 10 <= len(stage.collapsed) <= 14
    stage.steps(5.0)
    assert len(stage.collapsed) == 20


def test_passing_failures_are_counted_and_tried_again_later_and_later() -> None:
    stage = Stage(FULL)
    stage.space.fails = {START: ScanResult.PAGE_COUNT}
    stage.steps(60.0)
    tried = len(stage.collapsed)
    assert 4 <= tried <= 9
    assert stage.target.counters.failed == {ScanResult.PAGE_COUNT: tried}
    stage.space.fails = {}
    stage.steps(120.0)
    assert stage.target.counters.collapsed == {G.pmd_order: 1}


def test_a_process_that_goes_ends_it_and_nothing_stays_open() -> None:
    stage = Stage(FULL, FULL)
    stage.target.step()
    stage.space.vanished = stage.process.vanished = True
    with pytest.raises(TargetVanishedError):
        stage.steps(1.0)
    assert stage.space.closed
    assert not stage.process.closed, "another thread may wait for its pidfd"
    stage.target.close()
    assert stage.process.closed


def test_a_process_that_may_not_be_looked_at_is_left_out_with_the_reason_and_tried_again() -> None:
    stage = Stage(FULL)
    stage.error = NotPermittedError("not yours", help="be root")
    stage.steps(0.5)
    assert stage.target.left_out == "not yours; be root"
    assert [event for event, _ in stage.events] == ["left_out"]
    stage.error = None
    stage.steps(LEFT_OUT_SECONDS + 1)
    assert stage.collapsed == [0]
    assert stage.target.left_out == ""


def test_switches_that_change_have_everything_looked_at_anew() -> None:
    stage = Stage(FULL)
    stage.environment.switches = Switches("never", {9: "inherit"})
    stage.steps(5.0)
    assert stage.collapsed == []
    stage.environment.switches = Switches.defaults(G)
    stage.target.stale()
    stage.steps(1.0)
    assert stage.collapsed == [0]


@pytest.mark.parametrize(
    ("sizes", "opened"),
    [({9: "madvise"}, 0), ({9: "inherit", 4: "never"}, 0), ({9: "inherit", 4: "madvise"}, 1), ({9: "always"}, 1)],
)
def test_switches_that_change_no_size_for_it_cost_it_nothing(sizes: dict[int, str], opened: int) -> None:
    stage = Stage(FULL, mechanism="madvise,move")
    stage.steps(5.0)
    before = stage.opened
    stage.environment.switches = Switches("madvise", sizes)
    stage.target.follow()
    stage.steps(0.0)
    assert stage.opened - before == opened


def test_a_process_without_room_for_a_range_is_not_concerned_by_any_switch() -> None:
    stage = Stage(((N // 2, Pte.PRESENT, 0),))
    stage.steps(5.0)
    before = stage.opened
    stage.environment.switches = Switches("always", dict.fromkeys(range(2, 10), "always"))
    stage.environment.tunables = replace(stage.environment.tunables, max_ptes_none=0)
    stage.target.follow()
    stage.steps(60.0)
    assert stage.opened == before == 1


def test_limits_that_change_have_everything_looked_at_anew_and_a_shorter_rest_holds_at_once() -> None:
    stage = Stage(HALF, max_ptes_swap=0)
    stage.environment.tunables = replace(stage.environment.tunables, max_ptes_none=0)
    stage.steps(60.0)
    assert stage.collapsed == []
    opened, looks = stage.opened, stage.target.counters.looks
    stage.environment.tunables = replace(stage.environment.tunables, scan_sleep_millisecs=100)
    stage.target.follow()
    stage.steps(0.1)
    assert (stage.opened, stage.target.counters.looks) == (opened, looks + 1)
    stage.environment.tunables = replace(stage.environment.tunables, max_ptes_none=511)
    stage.target.follow()
    stage.steps(1.0)
    assert stage.collapsed == [0]


def test_a_new_rule_holds_from_the_next_turn_on() -> None:
    stage = Stage(HALF, max_ptes_none=0)
    stage.steps(5.0)
    assert stage.collapsed == []
    stage.target.renew(stage.target.facts, Rule("other", Match(), settings=Settings()))
    stage.steps(1.0)
    assert stage.collapsed == [0]


def test_what_it_tells_of_itself_is_json() -> None:
    stage = Stage(FULL)
    stage.steps(1.0)
    told = json.loads(json.dumps(to_object(stage.target, G)))
    assert told["pid"] == 7
    assert told["collapses"] == {"2M": 1}
    assert told["calls"]["count"] == 1


def test_what_is_out_of_reach_is_told_and_counted_now_and_then() -> None:
    """The edges of a mapping, of which a part is written; read again no sooner than after REACH_SECONDS."""
    stage = Stage(FULL)
    page = G.page_size
    vma = Vma(START - 8 * page, START + G.pmd_size + 8 * page, "rw-p", has_anon_vma=True)
    runs = (*((3, Pte.PRESENT, 0), (5, 0, ORDER_NONE)), *FULL, (8, Pte.PRESENT, 0))
    stage.space = FakeSpace([(vma, *page_runs(*runs))])
    stage.steps(1.0)
    assert to_object(stage.target, G)["out_of_reach_bytes"] == 11 * page
    stage.space.write(vma.start + 3 * page, int(Pte.PRESENT), 0, 5)
    stage.target.stale()
    stage.steps(1.0)
    assert to_object(stage.target, G)["out_of_reach_bytes"] == 11 * page
    stage.now += REACH_SECONDS
    stage.target.stale()
    stage.steps(1.0)
    assert to_object(stage.target, G)["out_of_reach_bytes"] == 16 * page


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The machine that a target measures: its shortage, which is none at first."""
    machine = SimpleNamespace(shortage=Shortage())
    monkeypatch.setattr("mthp.daemon.target.measured", lambda membership: machine.shortage)
    return machine


@pytest.mark.usefixtures("machine")
def test_eagerness_of_0_gives_back_on_a_calm_machine_at_its_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(HUGE, eagerness=0)
    given = trimming(monkeypatch, stage)
    stage.steps(0.5)
    assert given == []
    stage.steps(2 * TRIM_SECONDS + 5.0)
    assert len(given) == 3
    assert min(np.diff(given)) >= TRIM_SECONDS
    assert stage.target.left_out == NOT_EAGER
    assert to_object(stage.target)["eagerness_level"] == 0.0


def test_a_level_that_only_rises_from_0_gives_nothing_back(
    machine: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = Stage(HUGE, eagerness=5)
    given = trimming(monkeypatch, stage)
    stage.steps(60.0)
    assert given == []
    assert to_object(stage.target)["eagerness_level"] == 5.0
    machine.shortage = Shortage(pressure=0.2)
    stage.steps(5.0)
    assert len(given) == 1, "its own control group waits for memory, although the machine does not"


def test_a_trim_takes_no_more_than_its_share_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(HUGE, trim=0.5)

    def long(*_: object) -> tuple[int, int | None]:
        stage.now += 10.0
        return 0, None

    monkeypatch.setattr("mthp.daemon.target.give_back", long)
    stage.target.trim()
    assert stage.target.trim_at == stage.now + 10.0 / TRIM_SHARE


def trimming(monkeypatch: pytest.MonkeyPatch, stage: Stage) -> list[float]:
    """Return the times of trims, which go into a list that grows."""
    given: list[float] = []

    def give_back(*_: object) -> tuple[int, int | None]:
        given.append(stage.now)
        return 0, None

    monkeypatch.setattr("mthp.daemon.target.give_back", give_back)
    return given


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("by_switches", [False, True])
@pytest.mark.parametrize(
    ("eagerness", "orders", "made"),
    [(3, (3, 4, 9), {4: 1}), (5, (3, 4, 9), {3: 1, 4: 1}), (3, (2, 3), {3: 3}), (3, (9,), {})],
)
def test_a_level_leaves_small_orders_out_and_never_all(
    eagerness: int, orders: tuple[int, ...], made: dict[int, int], by_switches: bool
) -> None:
    present, none = int(Pte.PRESENT), 0
    runs = ((16, present, 0), (16, none, ORDER_NONE), (8, present, 0), (N - 40, none, ORDER_NONE))
    stage = small_stage("split", runs, orders="enabled" if by_switches else orders, eagerness=eagerness)
    stage.environment.switches = Switches("always", dict.fromkeys(orders, "inherit"))
    stage.steps(60.0)
    assert stage.target.counters.collapsed == made
    assert not stage.target.needs_move


def test_eagerness_rises_while_memory_is_free_and_falls_under_pressure(machine: SimpleNamespace) -> None:
    stage = Stage(HALF, FULL, eagerness=8)
    stage.steps(0.5)
    assert stage.target.left_out == NOT_EAGER
    assert stage.collapsed == []
    stage.steps(30.0)
    # At level 8 half of a PMD range may be empty, and half as much filled as is resident.
    assert sorted(stage.collapsed) == [0, 1]
    assert stage.target.left_out == ""
    assert stage.target.settings.trim is None
    machine.shortage = Shortage(pressure=0.2)
    stage.steps(3.0)
    assert stage.target.left_out == NOT_EAGER
    assert stage.target.settings.trim == 0.5


def small_memory(stage: Stage, pages: int, present: int) -> Vma:
    """Give the target one small mapping beside a full PMD range."""
    words = frozenset({"rd", "wr", "mr", "mw", "me", "ac", "hg"})
    arena = Vma(START - 64 * G.pmd_size, START - 64 * G.pmd_size + pages * G.page_size, "rw-p", flags=words)
    large = stage.space.vmas()[0]
    runs = ((present, int(Pte.PRESENT), 0), (pages - present, 0, ORDER_NONE))
    mappings = [(arena, *page_runs(*runs)), (replace(large, flags=words), *page_runs(*FULL))]
    stage.space = FakeSpace(mappings, orders=G.anon_orders, switches=stage.space.switches)
    return arena


@pytest.mark.parametrize("small", [False, True])
def test_a_rule_with_small_moves_small_mappings_after_whole_ranges(small: bool) -> None:
    stage = Stage(FULL, mechanism="madvise,move", orders=(4, 8, 9), small=small)
    arena = small_memory(stage, 256 + 16, 256 + 16)
    stage.steps(30.0)
    counters = stage.target.counters
    assert counters.collapsed == ({4: 1, 8: 1, 9: 1} if small else {9: 1})
    order = [address for address, _ in stage.space.attempts]
    assert order == ([START, arena.start, arena.start + (1 << 20)] if small else [START])
    assert counters.bloat_bytes == 0
    assert not stage.target.working


def test_what_is_written_later_is_moved_later_and_no_sooner_than_after_a_minute() -> None:
    stage = Stage(FULL, mechanism="madvise,move", orders=(4, 9), small=True, max_ptes_none=0)
    arena = small_memory(stage, 64, 16)
    stage.steps(10.0)
    assert stage.target.counters.collapsed == {4: 1, 9: 1}
    stage.space.write(arena.start + 16 * G.page_size, int(Pte.PRESENT), 0, 16)
    stage.process.faults += 16
    stage.steps(PART_SECONDS[0] - 20.0)
    assert stage.target.counters.collapsed == {4: 1, 9: 1}
    stage.steps(30.0)
    assert stage.target.counters.collapsed == {4: 2, 9: 1}


def test_small_memory_of_which_nothing_is_made_is_tried_less_and_less_often() -> None:
    stage = Stage(FULL, mechanism="madvise,move", orders=(4, 9), small=True)
    arena = small_memory(stage, 16, 16)
    stage.space.fails = {arena.start: ScanResult.PAGE_COUNT}
    for _ in range(60):
        stage.process.faults += 1
        stage.steps(60.0)
    tried = [address for address, _ in stage.space.attempts].count(arena.start)
    # At 0, 1, 3, 7, 15 and 31 minutes.
    assert 5 <= tried <= 7
    assert stage.target.left_out == ""


def test_a_failed_charge_ends_the_work_on_small_memory_too() -> None:
    stage = Stage(FULL, mechanism="madvise,move", orders=(4, 8, 9), small=True)
    arena = small_memory(stage, 256 + 16, 256 + 16)
    stage.space.fails = {arena.start: ScanResult.CGROUP_CHARGE_FAIL}
    stage.steps(5.0)
    assert stage.target.counters.collapsed == {9: 1}
    assert stage.target.left_out.startswith("a charge failed")
