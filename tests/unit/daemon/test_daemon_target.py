"""One target: when it is looked at, what is done in it and in what order, and within which budgets."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from numpy.typing import NDArray

from fakes import FakeClock, FakeSpace, page_runs
from mthp.budget import Amount, MemoryBound
from mthp.daemon.config import Configuration
from mthp.daemon.eagerness import Measured as Short
from mthp.daemon.environment import LOOK_SHARE, SHORTEST_ROUND, WAKE_GRID, Environment, Looks
from mthp.daemon.ledger import FIRST_AGE
from mthp.daemon.pressure import FreeFolios
from mthp.daemon.rules import Rule, Rules, Settings
from mthp.daemon.state import CHILD, FIRST_SECONDS, LAST_SECONDS, LONGEST_SECONDS, SHORT_SECONDS, Sign, Unadvised
from mthp.daemon.target import LEFT_OUT_SECONDS, NOT_EAGER, REACH_SECONDS, TRIM_SECONDS, TRIM_SHARE, Target
from mthp.daemon.telemetry import MOST_SERVICES, OTHERS, Counters, Services
from mthp.daemon.worker import Worker
from mthp.errors import NotPermittedError, TargetVanishedError
from mthp.geometry import X86_64
from mthp.heat import Heat, HeatRequest
from mthp.linux.process import Process
from mthp.means import Mechanism
from mthp.naming import Match, ProcessFacts
from mthp.objects import to_object
from mthp.pacing import ByteBudget
from mthp.ptes import ORDER_NONE, Block, Pte, PteColumns, Segment
from mthp.results import ScanResult
from mthp.trimming import TrimBy, TrimOutcome
from mthp.tunables import Switches, Tunables
from mthp.vma import Vma
from waiting import until

G = X86_64
START = 1 << 30
N = G.ptes_per_pmd
FULL, HALF, EMPTY = ((N, Pte.PRESENT, 0),), ((N // 2, Pte.PRESENT, 0), (N // 2, 0, ORDER_NONE)), ((N, 0, ORDER_NONE),)


class FakeProcess:
    """What a target asks of its process."""

    def __init__(self) -> None:
        self.faults, self.vanished, self.closed = 100, False, False
        self.cost: Callable[[], None] = lambda: None

    def read(self, name: str) -> bytes:
        assert name == "stat"
        self.cost()
        if self.vanished:
            raise TargetVanishedError("gone")
        fields = ["S", *"0" * 6, str(self.faults), "0", "3", *"0" * 10, "8000000", "50000", "0", "0"]
        return f"7 (a (b) c) {' '.join(fields)}\n".encode()

    def close(self) -> None:
        self.closed = True


class Stage:
    """A target over a fake address space, and a clock."""

    def __init__(self, *ranges: tuple[tuple[int, int, int], ...], **settings: Any) -> None:
        state, order = page_runs(*(run for each in ranges for run in each))
        vma = Vma(
            START,
            START + len(state) * G.page_size,
            "rw-p",
            flags=frozenset({"hg"}),
            has_anon_vma=True,
        )
        self.space = FakeSpace([(vma, state, order)])
        self.now = 1000.0
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.said: list[str] = []
        self.opened = 0
        self.error: Exception | None = None
        tunables = Tunables.defaults(G)
        self.environment = Environment(
            geometry=G,
            configuration=Configuration(rules=Rules(())),
            switches=Switches.defaults(G),
            tunables=tunables,
            free=FreeFolios(Path("/nonexistent/buddyinfo"), self.clock),
            total=Counters(),
            bytes=ByteBudget(None, self.clock),
            opened=self._open,
            event=lambda event, **values: self.events.append((event, values)),
            say=self.said.append,
            clock=self.clock,
        )
        self.process = FakeProcess()
        rule = Rule("all", Match(), settings=Settings(**settings))
        facts = ProcessFacts(7, 1, comm="seven")
        self.target = Target(cast("Process", self.process), facts, rule, self.environment)

    def clock(self) -> float:
        return self.now

    def _open(self, pid: int) -> FakeSpace:
        assert pid == 7
        if self.error is not None:
            raise self.error
        self.opened += 1
        return self.space

    def steps(self, seconds: float) -> None:
        """Let it have its turns for so long."""
        end = self.now + seconds
        while self.target.next_at <= end:
            self.now = max(self.now, self.target.next_at)
            self.target.step()
        self.now = end

    @property
    def collapsed(self) -> list[int]:
        """Numbers of the PMD ranges that were tried, in that order."""
        return [(address - START) // G.pmd_size for address, _ in self.space.attempts]


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


def test_looks_that_take_long_come_less_often_up_to_scan_sleep() -> None:
    stage = Stage(FULL)
    spent = FakeClock()
    looks = stage.environment.looks = Looks(spent)
    for number in range(299):
        looks.put(number, eligible=True)

    def looks_in(seconds: float, cost: float) -> int:
        stage.process.cost = lambda: setattr(spent, "now", spent.now + cost)
        stage.steps(3000.0)
        before = stage.target.counters.looks
        stage.steps(seconds)
        return stage.target.counters.looks - before

    assert looks_in(100.0, 1e-6) >= 99 / (SHORTEST_ROUND + WAKE_GRID)
    # 300 such targets take their share of a core.
    assert 300 * 20e-6 * looks_in(100.0, 20e-6) / 100 <= LOOK_SHARE
    assert looks_in(100.0, 0.01) == pytest.approx(100 / stage.environment.scan_sleep, abs=1)
    for number in range(299):
        looks.drop(number)
    assert looks_in(100.0, 1e-6) >= 99 / (SHORTEST_ROUND + WAKE_GRID)


def test_targets_without_a_mapping_for_folios_do_not_delay_the_others() -> None:
    stage = Stage(FULL)
    looks = stage.environment.looks = Looks(FakeClock())
    for number in range(10_000):
        looks.put(number, eligible=False)
    looks.took(1.0)
    stage.steps(10.0)
    assert looks.interval(stage.target) < looks.interval(0)
    looks.put(0, eligible=True)
    assert looks.interval(0) == looks.interval(stage.target)


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


def test_the_bloat_budget_is_never_overspent() -> None:
    hole = ((N - 100, Pte.PRESENT, 0), (100, 0, ORDER_NONE))
    budget = 250 * G.page_size
    stage = Stage(hole, FULL, hole, hole, hole, max_bloat=Amount(size=budget))
    stage.steps(5.0)
    assert stage.target.counters.bloat_bytes == 200 * G.page_size
    assert stage.collapsed == [1, 0, 2]
    stage.steps(3600.0)
    assert stage.target.counters.bloat_bytes <= budget
    assert stage.target.bloat_left == 50 * G.page_size


def test_a_share_of_bloat_is_of_what_is_resident() -> None:
    stage = Stage(HALF, max_bloat=Amount(share=0.001))
    stage.steps(5.0)
    assert stage.collapsed == []
    assert stage.target.bloat_left == int(0.001 * 50_000 * G.page_size)


def test_a_rate_holds_back_what_would_be_too_much() -> None:
    stage = Stage(*[FULL] * 20, rate=4 * G.pmd_size)
    stage.steps(1.0)
    assert 4 <= len(stage.collapsed) <= 6
    stage.steps(2.0)
    assert 10 <= len(stage.collapsed) <= 14
    stage.steps(5.0)
    assert len(stage.collapsed) == 20


def test_an_order_that_the_machine_has_no_folio_of_is_not_asked_for_again_and_again() -> None:
    stage = Stage(*[FULL] * 8)
    stage.space.fails = {START + at * G.pmd_size: ScanResult.ALLOC_HUGE_PAGE_FAIL for at in range(8)}
    stage.steps(0.9)
    first = len(stage.collapsed)
    assert 1 <= first <= 8
    stage.steps(300.0)
    assert len(stage.collapsed) <= 8 * 12
    stage.space.fails = {}
    stage.steps(1300.0)
    assert stage.target.counters.collapsed == {G.pmd_order: 8}


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
    assert not stage.process.closed, "somebody may wait for its pidfd"
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


@pytest.mark.parametrize(("mechanism", "tried"), [("auto", 1), ("madvise", 1), ("move", 0)])
def test_a_mechanism_is_not_asked_for_orders_that_it_does_not_make(mechanism: str, tried: int) -> None:
    stage = Stage(FULL, mechanism=mechanism)
    stage.steps(5.0)
    assert len(stage.collapsed) == tried
    assert not stage.target.counters.failed


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


def test_faults_and_mappings_are_read_whatever_the_name_is() -> None:
    process = FakeProcess()
    sign = Sign.parse(process.read("stat"))
    assert (sign.faults, sign.mapped, sign.resident, sign.comm) == (103, 8_000_000, 50_000, b"a (b) c")


def test_what_it_tells_of_itself_is_json() -> None:
    stage = Stage(FULL)
    stage.steps(1.0)
    told = json.loads(json.dumps(to_object(stage.target, G)))
    assert told["pid"] == 7
    assert told["collapses"] == {"2M": 1}
    assert told["calls"]["count"] == 1


@pytest.mark.parametrize("disabled", [True, False])
def test_why_nothing_is_done_in_a_target_is_in_its_summary(disabled: bool) -> None:
    stage = Stage(FULL, FULL)
    size = 2 * G.pmd_size
    vma = Vma(START, START + size, "rw-p", flags=frozenset({"nh"}), has_anon_vma=True)
    stage.space = FakeSpace([(vma, *page_runs(*FULL, *FULL))], thp_disabled=disabled)
    stage.steps(2)
    (left,) = to_object(stage.target, G)["left_alone"]
    assert ("PR_SET_THP_DISABLE" if disabled else "MADV_NOHUGEPAGE") in left["reason"]
    assert (left["mappings"], left["bytes"]) == (1, size)
    assert to_object(stage.target, G)["collapsed_bytes"] == 0


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


def test_unadvised_memory_is_tried_again_less_and_less_often() -> None:
    known, now, waits = Unadvised(), 0.0, []
    for _ in range(9):
        known.found(now)
        begun = now
        while known.holds(now):
            known.found(now)
            now += 30.0
        waits.append(now - begun)
    assert waits[:3] == [FIRST_SECONDS, 2 * FIRST_SECONDS, 4 * FIRST_SECONDS]
    assert waits[-1] == LAST_SECONDS


def test_sizes_that_only_the_mover_makes_are_named_with_its_price() -> None:
    stage = Stage(FULL, orders=(4, 9))
    stage.steps(5.0)
    assert stage.collapsed == [0]
    assert stage.target.needs_move.startswith("64K: only the mover makes them")
    assert to_object(stage.target, G)["needs_move"] == stage.target.needs_move
    nothing = Stage(FULL, orders=(4,))
    nothing.steps(5.0)
    assert nothing.collapsed == []
    assert nothing.target.left_out.startswith("64K: only the mover makes them")


@pytest.mark.parametrize(("left", "collapsed"), [(64 << 20, []), ((66 << 20) - 1, []), (66 << 20, [0])])
def test_memory_that_must_stay_free_is_not_taken(
    left: int, collapsed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = Stage(FULL)
    bounds = [MemoryBound("/sys/fs/cgroup/x", 400 << 20, left)]
    monkeypatch.setattr(stage.space, "memory_bounds", lambda: bounds, raising=False)
    stage.steps(5.0)
    assert stage.collapsed == collapsed
    assert any("must stay free" in reason for reason in stage.target.reasons) == (not collapsed)


def test_the_first_failed_charge_leaves_the_target_alone() -> None:
    stage = Stage(FULL, FULL, FULL)
    stage.space.fails = dict.fromkeys(range(START, START + 3 * G.pmd_size, G.pmd_size), ScanResult.CGROUP_CHARGE_FAIL)
    stage.steps(5.0)
    assert not stage.target.counters.collapsed
    assert stage.target.left_out.startswith("a charge failed")
    tried = len(stage.space.attempts)
    stage.steps(LEFT_OUT_SECONDS / 2)
    assert len(stage.space.attempts) == tried


HUGE = ((N, int(Pte.PRESENT | Pte.PMD_MAPPED), G.pmd_order),)


class Trimmable(FakeSpace):
    """A space whose one folio has contents in some pages only."""

    trims_by: tuple[TrimBy, ...] = ("cold",)
    used = 100

    def read(self, segments: Sequence[Segment]) -> PteColumns:
        runs = [np.arange(start // G.page_size, end // G.page_size) for start, end in segments]
        pages = np.concatenate([np.empty(0, np.int64), *runs])
        return replace(super().read(segments), pfn=pages.astype(np.uint64))

    def zero_filled(self, columns: PteColumns) -> NDArray[np.bool_]:
        assert columns.pfn is not None
        return np.asarray(columns.pfn - START // G.page_size >= self.used)

    def trim_folios(self, folios: Sequence[Block], zero: Sequence[NDArray[np.bool_]], by: TrimBy) -> list[TrimOutcome]:
        return [
            TrimOutcome(address, order, ScanResult.SUCCEED, "", int(pages.sum()), {0: self.used})
            for (address, order), pages in zip(folios, zero, strict=True)
        ]


def test_pages_of_zeroes_go_back_and_are_counted() -> None:
    stage = Stage(HUGE, trim=0.5)
    stage.space = Trimmable([(stage.space.vmas()[0], *page_runs(*HUGE))])
    stage.target.trim()
    wasted = (N - Trimmable.used) * G.page_size
    assert stage.target.counters.trimmed_bytes == stage.environment.total.trimmed_bytes == wasted
    assert samples(stage, stage.target)["mthp_service_trimmed_bytes_total", "all", "comm:seven"] == wasted
    assert stage.target.trim_at == stage.now + TRIM_SECONDS
    assert [event for event, values in stage.events if values.get("trimmed_bytes") == wasted] == ["trimmed"]


def test_a_space_that_cannot_be_trimmed_is_no_error() -> None:
    stage = Stage(HUGE, trim=0.5)
    stage.target.trim()
    assert [event for event, _ in stage.events] == ["trim_failed"]


def test_eagerness_of_0_gives_back_on_a_calm_machine_at_its_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    calm = Short()
    stage = Stage(HUGE, eagerness=0)
    given = trimming(monkeypatch, stage, lambda: calm)
    stage.steps(0.5)
    assert given == []
    stage.steps(2 * TRIM_SECONDS + 5.0)
    assert len(given) == 3
    assert min(np.diff(given)) >= TRIM_SECONDS
    assert stage.target.left_out == NOT_EAGER
    assert to_object(stage.target)["eagerness_level"] == 0.0


def test_a_level_that_only_rises_from_0_gives_nothing_back(monkeypatch: pytest.MonkeyPatch) -> None:
    now = Short()
    stage = Stage(HUGE, eagerness=5)
    given = trimming(monkeypatch, stage, lambda: now)
    stage.steps(60.0)
    assert given == []
    assert to_object(stage.target)["eagerness_level"] == 5.0
    now = Short(pressure=0.2)
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


def trimming(monkeypatch: pytest.MonkeyPatch, stage: Stage, now: Callable[[], Short]) -> list[float]:
    """Return the times of trims, which go into a list that grows."""
    given: list[float] = []
    monkeypatch.setattr("mthp.daemon.target.measured", lambda *_: now())

    def give_back(*_: object) -> tuple[int, int | None]:
        given.append(stage.now)
        return 0, None

    monkeypatch.setattr("mthp.daemon.target.give_back", give_back)
    read = stage.process.read
    monkeypatch.setattr(stage.process, "read", lambda name: b"0::/\n" if name == "cgroup" else read(name))
    return given


def test_a_collapse_makes_nothing_that_a_trim_would_undo() -> None:
    # A third of the range is none: more than half of the share at which it would be trimmed.
    sparse = ((N - N // 3, int(Pte.PRESENT), 0), (N // 3, 0, ORDER_NONE))
    for trim, made in ((None, 1), (0.5, 0), (0.9, 1)):
        stage = Stage(sparse, orders=(G.pmd_order,), max_bloat=None, trim=trim)
        stage.steps(2)
        assert stage.target.counters.collapsed.total() == made


class Small(FakeSpace):
    """A space on a machine that makes folios of every order by `mechanism`."""

    def __init__(self, space: FakeSpace, mechanism: Mechanism) -> None:
        super().__init__(space._mappings, orders=G.anon_orders, switches=space.switches)
        self.mechanism = mechanism

    def splits(self) -> bool:
        return self.mechanism == "split"

    def drives_khugepaged(self, order: int) -> bool:
        return self.mechanism == "khugepaged"

    def take_calls(self) -> list[int]:
        return [1000] * len(self.attempts) if self.mechanism == "split" else []


BLOCK = ((16, Pte.PRESENT, 0), (N - 16, 0, ORDER_NONE))


def small_stage(mechanism: Mechanism, *ranges: tuple[tuple[int, int, int], ...], **settings: Any) -> Stage:
    stage = Stage(*ranges, **settings)
    stage.space = Small(stage.space, mechanism)
    return stage


@pytest.mark.parametrize("mechanism", ["split", "khugepaged"])
def test_auto_makes_small_folios_by_what_the_machine_has(mechanism: Mechanism) -> None:
    stage = small_stage(mechanism, BLOCK, FULL, orders=(4, 9), max_ptes_none=0)
    stage.steps(5.0)
    assert stage.target.counters.collapsed == {4: 1, 9: 1}
    assert not stage.target.needs_move
    driven = [line for line in stage.said if "is driven" in line]
    assert len(driven) == (mechanism == "khugepaged"), "which concerns all processes"


def test_khugepaged_keeps_to_no_rate_so_a_rule_with_one_leaves_it_alone() -> None:
    stage = small_stage("khugepaged", BLOCK, orders=(4, 9), max_ptes_none=0, rate=1 << 30)
    stage.steps(5.0)
    assert not stage.target.counters.collapsed
    assert stage.target.needs_move.startswith("64K: only the mover")


def test_khugepaged_fills_nothing_while_a_budget_is_to_be_kept() -> None:
    hole = ((15, Pte.PRESENT, 0), (N - 15, 0, ORDER_NONE))
    for bloat, made in ((Amount(size=1 << 30), {}), (None, {4: 1})):
        stage = small_stage("khugepaged", hole, orders=(4,), max_bloat=bloat)
        stage.steps(5.0)
        assert stage.target.counters.collapsed == made


def test_what_only_the_mover_makes_is_said_once_and_not_for_every_pass() -> None:
    stage = Stage(FULL, orders=(4, 9))
    for _ in range(5):
        stage.process.faults += 1
        stage.steps(5.0)
    assert stage.target.counters.passes >= 5
    assert [line for line in stage.said if "only the mover" in line] == stage.said
    assert len(stage.said) == 1


def test_small_folios_that_khugepaged_makes_huge_again_are_told_of_once_with_the_remedy() -> None:
    stage = small_stage("split", BLOCK, BLOCK, orders=(4,), max_ptes_none=0)
    for _ in range(5):
        stage.process.faults += 1
        stage.steps(5.0)
    told = to_object(stage.target, G)["remade"]
    assert (told["remade_ranges"], told["keeps"]) == (2, N - 16 - 1)
    (line,) = stage.said
    assert f"keep_max_ptes_none = {N - 16 - 1}" in line
    # Another size switched off: nothing is made huge any more, and nothing is said of it.
    stage.space._switches = Switches("never", {9: "never"})
    stage.target.stale()
    stage.steps(5.0)
    assert to_object(stage.target, G)["remade"]["remade_ranges"] == 0


def test_calls_that_make_several_folios_are_counted() -> None:
    stage = small_stage("split", BLOCK, orders=(4,), max_ptes_none=0)
    stage.steps(0.0)
    stage.steps(1.0)
    assert stage.target.counters.called.count == 1


def test_nothing_is_collapsed_while_a_child_shares_the_memory_and_all_of_it_after() -> None:
    stage = Stage(FULL, FULL, HALF)
    stage.target.forks.began(8, stage.now)
    stage.target.forks.began(9, stage.now)
    stage.steps(30.0)
    assert stage.collapsed == []
    assert stage.target.left_out == CHILD
    assert not stage.target.forks.ended(8, stage.now)
    assert stage.target.forks.ended(9, stage.now)
    stage.steps(2.0)
    assert stage.collapsed == [0, 1, 2]
    assert stage.target.left_out == ""


def test_a_child_that_stays_is_waited_for_no_longer_than_that() -> None:
    stage = Stage(FULL)
    stage.target.forks.began(8, stage.now)
    stage.steps(LONGEST_SECONDS - 1)
    assert stage.collapsed == []
    stage.steps(5.0)
    assert stage.collapsed == [0]


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
    stage.now += SHORT_SECONDS / 2
    assert not stage.target.forks.ended(8, stage.now)
    stage.steps(5.0)
    assert stage.target.counters.scanned_ptes == scanned


class Measured(FakeSpace):
    """Memory of which the third PMD range is used."""

    def measure_heat(self, request: HeatRequest, stop: Callable[[], bool]) -> Heat:
        start = np.array([START + 2 * G.pmd_size], np.uint64)
        return Heat.of_spans(start, start + np.uint64(G.pmd_size), np.array([9.0]))


def test_what_is_used_comes_first_once_that_is_known() -> None:
    stage = Stage(FULL, FULL, HALF, FULL, heat=HeatRequest("damon", 1.0))
    stage.space.__class__ = Measured
    stage.target.step()
    assert stage.collapsed == []
    until(lambda: not stage.target.heat.measuring, "the heat")
    stage.steps(30.0)
    assert stage.collapsed == [2, 0, 1, 3]


def test_without_a_source_of_heat_fullness_decides() -> None:
    stage = Stage(HALF, FULL, heat=HeatRequest("damon", 1.0))
    stage.target.step()
    until(lambda: not stage.target.heat.measuring, "the attempt")
    stage.steps(30.0)
    assert stage.collapsed == [1, 0]
    assert "not a live process" in stage.target.heat.failed


def test_eagerness_rises_while_memory_is_free_and_falls_under_pressure(monkeypatch: pytest.MonkeyPatch) -> None:
    now = Short()
    monkeypatch.setattr("mthp.daemon.target.measured", lambda cgroup: now)
    stage = Stage(HALF, FULL, eagerness=8)
    read = stage.process.read
    monkeypatch.setattr(stage.process, "read", lambda name: b"0::/\n" if name == "cgroup" else read(name))
    stage.steps(0.5)
    assert stage.target.left_out == NOT_EAGER
    assert stage.collapsed == []
    stage.steps(30.0)
    # At level 8 half of a PMD range may be empty, and half as much filled as is resident.
    assert sorted(stage.collapsed) == [0, 1]
    assert stage.target.left_out == ""
    assert stage.target.settings.trim is None
    now = Short(pressure=0.2)
    stage.steps(3.0)
    assert stage.target.left_out == NOT_EAGER
    assert stage.target.settings.trim == 0.5


# Services.


def samples(stage: Stage, *targets: Target) -> dict[tuple[str, ...], float]:
    """What the page of metrics says of services, rules and the daemon: by metric and values of labels."""
    pytest.importorskip("prometheus_client")
    from prometheus_client import CollectorRegistry, generate_latest

    from mthp.daemon.exporter import DaemonCollector, RuleCollector, ServiceCollector

    worker = SimpleNamespace(targets={target.facts.pid: target for target in targets}, paused=False, pressure=0.0)
    registry = CollectorRegistry()
    registry.register(ServiceCollector(stage.environment.services, lambda: list(targets)))
    registry.register(RuleCollector(stage.environment, lambda: list(targets)))
    registry.register(DaemonCollector(stage.environment, cast("Worker", worker), "1.2.3"))
    assert generate_latest(registry)
    found = [sample for family in registry.collect() for sample in family.samples]
    return {(each.name, *each.labels.values()): each.value for each in found}


def test_memory_is_counted_by_rule_and_size_as_passes_saw_it() -> None:
    # A range that is huge, one that becomes it, one of 64K folios and base pages that holds too little for a collapse.
    sparse = ((32, int(Pte.PRESENT), 4), (8, int(Pte.PRESENT), 0), (N - 40, 0, ORDER_NONE))
    stage = Stage(HUGE, FULL, sparse, orders=(G.pmd_order,), max_ptes_none=10)
    assert not [key for key in samples(stage, stage.target) if key[0] == "mthp_rule_folio_bytes"]
    stage.steps(20.0)
    opened = stage.opened
    found = samples(stage, stage.target)
    sizes = {key[2]: value for key, value in found.items() if key[0] == "mthp_rule_folio_bytes"}
    assert sizes == {"2M": 2 * G.pmd_size, "64K": 32 * G.page_size, "4K": 8 * G.page_size}
    assert found["mthp_rule_collapses_total", "all", "2M"] == 1
    assert found["mthp_rule_collapses_total", "all", "64K"] == 0
    assert stage.opened == opened, "the page of metrics has memory read"
    # What is unmapped is forgotten at the next pass.
    stage.space.write(START + G.pmd_size, 0, ORDER_NONE, N)
    stage.target.stale()
    stage.steps(20.0)
    assert samples(stage, stage.target)["mthp_rule_folio_bytes", "all", "2M"] == G.pmd_size
    assert not [key for key in samples(stage) if key[0] == "mthp_rule_folio_bytes"]


def test_bloat_and_failures_are_counted_by_rule_and_size() -> None:
    stage = Stage(HALF, FULL, orders=(G.pmd_order,))
    stage.space.fails = {START + G.pmd_size: ScanResult.PAGE_COUNT}
    stage.steps(1.0)
    found = samples(stage, stage.target)
    counters = stage.target.counters
    assert found["mthp_rule_bloat_bytes_total", "all", "2M"] == counters.bloat_bytes
    assert found["mthp_rule_collapse_failures_total", "all", "2M"] == counters.failed.total() > 0


def test_zeroes_that_a_trim_found_and_left_are_known_after_it() -> None:
    stage = Stage(HUGE, trim=0.5)
    assert not [key for key in samples(stage, stage.target) if key[0] == "mthp_rule_trimmable_bytes"]
    stage.space = Trimmable([(stage.space.vmas()[0], *page_runs(*HUGE))])
    stage.target.trim()
    assert samples(stage, stage.target)["mthp_rule_trimmable_bytes", "all"] == 0
    assert not [key for key in samples(stage) if key[0] == "mthp_rule_trimmable_bytes"]


def test_the_page_names_the_version_the_last_reload_and_the_last_pass() -> None:
    stage = Stage(FULL)
    found = samples(stage, stage.target)
    assert found["mthp_build_info", "1.2.3"] == 1
    assert found["mthp_config_last_reload_successful",] == 1
    assert ("mthp_last_pass_timestamp_seconds",) not in found
    before = time.time()
    assert found["mthp_config_last_reload_timestamp_seconds",] <= before
    stage.steps(20.0)
    stage.environment.reload_refused = True
    found = samples(stage, stage.target)
    assert before <= found["mthp_last_pass_timestamp_seconds",] <= time.time()
    assert found["mthp_config_last_reload_successful",] == 0


def test_work_is_counted_by_rule_and_service_also_after_the_process_has_ended() -> None:
    stage = Stage(HALF, FULL, FULL)
    stage.target.renew(replace(stage.target.facts, cgroup="/system.slice/redis.service"), stage.target.rule)
    stage.steps(20.0)
    key = "all", "unit:redis.service"
    counters = stage.target.counters
    found = samples(stage, stage.target)
    assert found["mthp_service_collapsed_bytes_total", *key] == 3 * G.pmd_size
    assert found["mthp_service_bloat_bytes_total", *key] == counters.bloat_bytes > 0
    assert found["mthp_service_targets", *key] == 1
    assert found["mthp_service_resident_bytes", *key] == 50000 * G.page_size
    assert found["mthp_service_huge_bytes", *key] == stage.target.huge > 0
    after = samples(stage)
    assert after["mthp_service_collapsed_bytes_total", *key] == 3 * G.pmd_size
    assert after["mthp_service_targets", *key] == after["mthp_service_resident_bytes", *key] == 0
    assert to_object(stage.target, G)["service"] == key[1]


def test_processes_that_name_themselves_as_they_like_make_no_more_series_than_allowed() -> None:
    services = Services()
    for number in range(2 * MOST_SERVICES):
        services.of("all", f"comm:{number}").bloat_bytes += 1
    assert len(services.all()) == MOST_SERVICES + 1
    assert services.of("all", "comm:new") is services.of("all", OTHERS)
    assert services.of("all", OTHERS).bloat_bytes == MOST_SERVICES
    assert services.of("all", "comm:0").bloat_bytes == 1
    assert services.of("other", "comm:new").service == OTHERS
