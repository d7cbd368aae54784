"""The worker's turns: which target is first, and how long it rests, by a clock that a test sets."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from mthp.daemon.config import Configuration, Pace
from mthp.daemon.environment import Environment
from mthp.daemon.forks import SHORT_CHILD_SECONDS, Forks
from mthp.daemon.kernel_settings import SystemKnobs
from mthp.daemon.pressure import FreeFolios, MemoryPressure
from mthp.daemon.rules import RuleSet, Settings
from mthp.daemon.target import Target
from mthp.daemon.worker import Worker
from mthp.geometry import X86_64
from mthp.linux.procevents import Changes, SharingEvent
from mthp.naming import ProcessFacts
from mthp.pacing import CpuBudget
from mthp.tunables import Switches, Tunables

G = X86_64
NOWHERE = Path("/nonexistent")
PIECE = 1024


class FakeKnobs:
    """Switches and tunables as a test sets them."""

    def __init__(self) -> None:
        self.version = 1
        self.switches, self.tunables = Switches.defaults(G), Tunables.defaults(G)

    def refresh(self) -> bool:
        return False


class FakeTarget:
    """A target that scans a piece at every turn, and wants the next at once."""

    working = closed = vanished = ended = False

    def __init__(self, stage: Stage, pid: int, gain: int) -> None:
        self.facts = ProcessFacts(pid, 1, comm="fake")
        self.gain, self.next_at, self.followed = gain, stage.now, 0
        self.turn = 0
        self.forks = Forks()
        self._stage = stage

    def step(self) -> None:
        self._stage.turns.append((self._stage.now, self.facts.pid))
        self._stage.environment.total.scanned_ptes += PIECE

    def follow(self) -> None:
        self.followed += 1

    def end_pass(self) -> None:
        self.ended = True

    def close(self) -> None:
        self.closed = True


class Stage:
    """A worker without a running thread: a test takes its turns, and a rest advances the clock."""

    def __init__(self, pace: Pace = "cpu", pages_to_scan: int = 4 * PIECE) -> None:
        self.now = 50.0
        self.turns: list[tuple[float, int]] = []
        self.knobs = FakeKnobs()
        self.knobs.tunables = replace(self.knobs.tunables, pages_to_scan=pages_to_scan)
        self.environment = Environment(
            geometry=G,
            configuration=Configuration(rules=RuleSet(()), pace=pace),
            switches=self.knobs.switches,
            tunables=self.knobs.tunables,
            free=FreeFolios(NOWHERE, self.clock),
            opened=cast("Any", None),
            event=lambda event, **values: None,
            clock=self.clock,
        )
        pressure, cpu = MemoryPressure(0.1, NOWHERE, self.clock), CpuBudget(1.0, self.clock, lambda: 0.0)
        knobs = cast("SystemKnobs", self.knobs)
        self.worker = Worker(self.environment, knobs, pressure, cpu)
        self.worker._rest = self._rest  # type: ignore[method-assign]

    def clock(self) -> float:
        return self.now

    def _rest(self, seconds: float) -> None:
        # As long as the real worker rests between two checks of its commands.
        self.now += min(seconds, 1.0)

    def add(self, pid: int, gain: int = 0) -> FakeTarget:
        target = FakeTarget(self, pid, gain)
        self.worker.add(cast("Target", target))
        return target

    def run(self, turns: int) -> None:
        while len(self.turns) < turns:
            self.worker._once()


def test_under_the_kernels_pace_it_rests_for_scan_sleep_after_every_pages_to_scan() -> None:
    stage = Stage("kernel")
    stage.add(1)
    stage.run(12)
    assert [round(at - 50.0, 6) for at, _ in stage.turns] == [0.0] * 4 + [10.0] * 4 + [20.0] * 4


def test_under_its_own_pace_only_budgets_hold_it_back() -> None:
    stage = Stage("cpu")
    stage.add(1)
    stage.run(12)
    assert {at for at, _ in stage.turns} == {50.0}


def test_those_with_most_to_gain_come_first_and_equals_in_turn() -> None:
    stage = Stage()
    small, large, gone, other = stage.add(1, 5), stage.add(2, 9), stage.add(3, 20), stage.add(4, 5)
    gone.closed = True
    for target in (small, large, other):
        target.next_at = 51.0
    stage.run(3)
    assert [pid for _, pid in stage.turns] == [2, 1, 4]


def test_news_of_the_first_targets_takes_no_turn_from_the_last() -> None:
    stage = Stage()
    targets = [stage.add(pid) for pid in range(8)]
    for turn in range(80):
        targets[turn % 2].next_at = stage.now
        stage.worker._requeue()
        stage.run(turn + 1)
    assert {pid for _, pid in stage.turns} == set(range(8))


def test_a_worker_that_cannot_go_on_says_so() -> None:
    """A daemon without its worker would do nothing, without any sign of it."""
    stage, died = Stage(), []
    worker = stage.worker
    worker._died = lambda: died.append(True)
    worker._follow_system = lambda *, at_once: 1 // 0  # type: ignore[method-assign, assignment]
    target = stage.add(1)
    worker._run()
    assert worker.failed
    assert died
    assert target.ended


def test_switches_that_change_are_told_to_every_target() -> None:
    stage = Stage()
    targets = [stage.add(pid) for pid in (1, 2, 3)]
    stage.run(3)
    assert [target.followed for target in targets] == [0, 0, 0]
    stage.knobs.switches, stage.knobs.version = Switches("never", {9: "inherit"}), 2
    stage.run(4)
    assert [target.followed for target in targets] == [1, 1, 1]


def test_while_memory_is_short_those_with_a_share_are_trimmed_in_turn() -> None:
    stage = Stage()
    trimmed: list[int] = []
    for pid, share in ((1, 0.5), (2, None), (3, 0.5)):
        target: Any = stage.add(pid)
        target.settings = Settings(trim=share)
        target.trim_at = 0.0

        def trim(target: Any = target, pid: int = pid) -> None:
            trimmed.append(pid)
            target.trim_at = stage.now + 60.0

        target.trim = trim
    stage.worker.pressure.rests = lambda: True  # type: ignore[method-assign]
    stage.worker.pressure.resting = True
    for _ in range(400):
        stage.worker._once()
    assert trimmed[:4] == [1, 3, 1, 3]
    assert stage.turns == []
    stage.worker.paused = True
    before = len(trimmed)
    for _ in range(100):
        stage.worker._once()
    assert len(trimmed) == before


def test_a_fault_in_a_trim_ends_neither_the_worker_nor_other_trims() -> None:
    stage = Stage()
    trimmed: list[int] = []
    for pid in (1, 2):
        target: Any = stage.add(pid)
        target.settings = Settings(trim=0.5)
        target.trim_at = 0.0
        target.stale = lambda: None

        def trim(target: Any = target, pid: int = pid) -> None:
            target.trim_at = stage.now + 60.0
            if pid == 1:
                raise ValueError("a fault of mthp")
            trimmed.append(pid)

        target.trim = trim
    stage.worker.pressure.rests = lambda: True  # type: ignore[method-assign]
    stage.worker.pressure.resting = True
    for _ in range(4):
        stage.worker._once()
    assert trimmed == [2]
    assert "a fault of mthp" in stage.worker.targets[1].left_out


def test_parent_and_child_are_held_until_the_child_shares_nothing_and_then_come_at_once() -> None:
    stage = Stage()
    parent = stage.add(1)
    stage.worker.forked(Changes(sharing=[SharingEvent("fork", 2, 1)]))
    child = stage.add(2)
    assert parent.forks.reason(stage.now)
    assert child.forks.reason(stage.now)
    parent.next_at = child.next_at = 500.0
    stage.now += SHORT_CHILD_SECONDS
    stage.worker.forked(Changes(sharing=[SharingEvent("exec", 2)]))
    for target in (parent, child):
        assert not target.forks.reason(stage.now)
        assert target.next_at == stage.now
    stage.run(2)
    assert {pid for _, pid in stage.turns} == {1, 2}


def test_children_whose_end_was_lost_hold_nothing() -> None:
    stage = Stage()
    target = stage.add(1)
    # No process has the first number (the kernel's limit is 4194304); the second is this one.
    stage.worker.forked(Changes(sharing=[SharingEvent("fork", pid, 1) for pid in (4194305, os.getpid())]))
    stage.worker.forked(Changes(lost=True))
    assert target.forks.reason(stage.now)
    stage.worker.forked(Changes(sharing=[SharingEvent("exit", os.getpid(), 1)]))
    assert not target.forks.reason(stage.now)
