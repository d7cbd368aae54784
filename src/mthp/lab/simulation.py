"""The run of a scenario: programs and khugepaged on one simulated machine, in simulated time.

Everything is an event with a time: ticks of programs, faults, samples. khugepaged scans and rests as on a real machine,
and while it sleeps the others act: the sleep of its clock is the loop over the events. Nothing depends on the time or
the random numbers of the simulating machine, so two runs of one scenario make the same table, byte for byte.
"""

from __future__ import annotations

import heapq
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mthp.engine.census import take_census
from mthp.lab import figures
from mthp.lab.figures import Row
from mthp.lab.makers import Maker
from mthp.lab.scenariotables import FaultSettings, ProcessPlan, Scenario, TrimSettings
from mthp.lab.simulated import Outcome
from mthp.lab.upkeep import Upkeep
from mthp.lab.workloads.program import KilledError, Program
from mthp.ptes import Pte
from mthp.sim import Machine

Progress = Callable[[float, float], None]
"""Called with (simulated seconds done, in all) after every event."""

MOST_PINS = 4096
"""The most pages of one process that a fault pins."""


def simulate(
    scenario: Scenario,
    *,
    policy: str | None = None,
    seed: int | None = None,
    progress: Progress = lambda done, total: None,
    stop: Callable[[], bool] = lambda: False,
) -> Outcome:
    """Run `scenario`, and return its outcome.

    Args:
        policy, seed: used in place of the scenario's own.
        stop: called after every event; once it returns True the run ends, with the rows up to then.

    Raises:
        UsageError: the policy does not exist.
    """
    return _Run(scenario, policy or scenario.settings.policy, seed, progress, stop).run()


@dataclass
class _Member:
    """A program, its plan, and its life."""

    plan: ProcessPlan
    program: Program
    life: Any
    began: float
    cgroup: int


class _Time:
    """khugepaged's clock, which runs the events while khugepaged sleeps."""

    def __init__(self, run: _Run) -> None:
        self._run = run

    def now(self) -> float:
        return self._run.now

    def sleep(self, seconds: float, wake: threading.Event) -> None:
        clock = self._run.machine.clock
        before = clock.now_ns
        self._run.until(self._run.now + seconds)
        if clock.now_ns == before:
            # Less than a nanosecond: without this, a sleep until then would never end.
            clock.wait_ns(1)


class _Run:
    def __init__(
        self, scenario: Scenario, policy: str, seed: int | None, progress: Progress, stop: Callable[[], bool]
    ) -> None:
        self._scenario, self._progress, self._stop = scenario, progress, stop
        machine, geometry, maker = scenario.machine, scenario.geometry, Maker.named(policy)
        frames = machine.memory // machine.nodes // geometry.pmd_size * geometry.ptes_per_pmd
        self.machine = Machine(
            geometry,
            node_frames=[frames] * machine.nodes,
            swap_slots=machine.swap // geometry.page_size,
            switches=scenario.switches,
            tunables=scenario.tunables,
            policy=maker.policy,
        )
        self._mthp = Upkeep(self.machine, maker, _Time(self))
        self._khugepaged = self._mthp.khugepaged or self.machine.khugepaged
        self._policy = maker.name
        self._seed = scenario.settings.seed if seed is None else seed
        self._events: list[tuple[float, int, Callable[[], object]]] = []
        self._made = 0
        self._members: list[_Member] = []
        self._rows: list[Row] = []
        self._programs_ns = 0
        self._killed = 0
        self._interrupted = False

    @property
    def now(self) -> float:
        """Simulated seconds."""
        return self.machine.clock.now_ns / 1e9

    def run(self) -> Outcome:
        """Run from the first event to the end."""
        settings, machine = self._scenario.settings, self.machine
        if self._scenario.machine.fragmentation:
            where = self._scenario.machine
            machine.fragment(where.fragmentation, movable=where.movable, seed=self._seed)
        # First of the events at 0, so the first row is the machine without programs.
        self._at(0.0, lambda: self._sample(0))
        number = 0
        for plan in self._scenario.processes:
            for copy in range(plan.settings.count):
                # Defaults bind the values of now; the loop goes on before the events happen.
                self._at(plan.settings.start, lambda p=plan, c=copy, n=number: self._begin(p, c, n))  # type: ignore[misc]
                number += 1
        for fault in self._scenario.faults:
            self._at(fault.at, lambda f=fault: self._fault(f))  # type: ignore[misc]
        if trim := self._scenario.trim:
            first = max(trim.start, trim.every)
            self._at(first, lambda: self._trim(trim, first))
        machine.khugepaged.rest_by(_Time(self))
        if settings.khugepaged:
            # khugepaged's rests run the programs (class _Time).
            self._khugepaged.run(lambda: self._over)
        if not self._interrupted:
            # With khugepaged, those that became due in its last work.
            self.until(settings.duration)
        if not self._rows:
            # It was stopped before the first event.
            self._sample(0)
        return Outcome(self._policy, self._rows, self._interrupted)

    @property
    def _over(self) -> bool:
        self._interrupted = self._interrupted or self._stop()
        self._progress(self.now, self._scenario.settings.duration)
        return self._interrupted or self.now >= self._scenario.settings.duration

    def _at(self, seconds: float, action: Callable[[], object]) -> None:
        # The number breaks ties, in the order of creation, because functions cannot be compared.
        heapq.heappush(self._events, (seconds, self._made, action))
        self._made += 1

    def until(self, seconds: float) -> None:
        """Run the events that are due until then, and advance the time to it."""
        end = min(seconds, self._scenario.settings.duration)
        while self._events and self._events[0][0] <= end and not self._interrupted:
            due, _, action = heapq.heappop(self._events)
            self._wait(due)
            action()
            self._interrupted = self._interrupted or self._stop()
            self._progress(self.now, self._scenario.settings.duration)
        self._wait(end)

    def _wait(self, seconds: float) -> None:
        behind = round(seconds * 1e9) - self.machine.clock.now_ns
        # Else the time has passed already: the cost of actions moves the clock, too, so on a machine that is too slow
        # for its programs they fall behind, as on a real one.
        if behind > 0:
            self.machine.clock.wait_ns(behind)

    # Programs.

    def _begin(self, plan: ProcessPlan, copy: int, number: int) -> None:
        settings, groups = plan.settings, self.machine.parts.memory.cgroups
        # Also if only a fault limits it later.
        cgroup = groups.create(self._frames(settings.limit)) if settings.limit or self._limited(settings.name) else 0
        program = Program(
            self.machine,
            f"{settings.name}-{copy + 1}" if settings.count > 1 else settings.name,
            # A generator for each program, so that one more program does not change the others.
            np.random.default_rng([self._seed, number]),
            cgroup=cgroup,
            advise=settings.advise and not settings.advise_after,
            tick=self._scenario.settings.step,
        )
        member = _Member(plan, program, plan.model.live(program), self.now, cgroup)
        self._members.append(member)
        if settings.stop:
            self._at(settings.stop, lambda: self._act(member, program.end))
        if settings.advise and settings.advise_after:
            self._at(self.now + settings.advise_after, lambda: self._act(member, program.advise))
        # Up to the first yield, which maps the memory.
        if self._act(member, lambda: next(member.life)):
            self._mthp.enter(program)
            self._at(self.now, lambda: self._tick(member))

    def _frames(self, limit: int) -> int | None:
        """Return a limit in frames; None for 0 bytes, which stand for no limit."""
        return limit // self._scenario.geometry.page_size if limit else None

    def _limited(self, name: str) -> bool:
        return any(fault.kind == "limit" and fault.process == name for fault in self._scenario.faults)

    def _tick(self, member: _Member) -> None:
        began = self.now
        if self._act(member, lambda: member.life.send(began - member.began)):
            # Again in every tick: a program without memory to collapse is not kept (Khugepaged.enter).
            self._mthp.enter(member.program)
            # A program that takes longer than a tick has no time left to wait.
            self._at(max(began + self._scenario.settings.step, self.now), lambda: self._tick(member))

    def _act(self, member: _Member, move: Callable[[], object]) -> bool:
        """Let a program move; return whether it lives afterwards."""
        if not member.program.alive:
            return False
        before = self._spent_ns()
        try:
            move()
        except KilledError:
            self._killed += 1
            member.program.end()
        self._programs_ns += self._spent_ns() - before
        return member.program.alive

    def _spent_ns(self) -> int:
        return sum(self.machine.clock.spent_ns().values())

    def _trim(self, trim: TrimSettings, due: float) -> None:
        self._mthp.trim((member.program for member in self._members if member.program.alive), trim)
        # From the time at which it was due, so that later trims are not late; but no two at the same time.
        following = max(due + trim.every, self.now)
        self._at(following, lambda: self._trim(trim, following))

    # Faults.

    def _fault(self, fault: FaultSettings) -> None:
        if fault.kind == "fragment":
            # Not the random numbers of the fragmentation at the start.
            self.machine.fragment(fault.share, movable=self._scenario.machine.movable, seed=self._seed + 1)
            return
        for member in self._members:
            if member.plan.settings.name != fault.process or not member.program.alive:
                continue
            if fault.kind == "kill":
                self._act(member, member.program.end)
            elif fault.kind == "limit":
                self.machine.parts.memory.cgroups.set_limit(member.cgroup, self._frames(fault.size))
            else:
                self._pin(member.program, fault)

    def _pin(self, program: Program, fault: FaultSettings) -> None:
        present = _present(program)
        count = min(MOST_PINS, int(len(present) * fault.share))
        chosen = np.sort(program.rng.choice(present, count, replace=False)) if count else present[:0]
        pins = [self.machine.pin(program.mm, address) for address in chosen.tolist()]

        def unpin() -> None:
            for pfn in pins:
                self.machine.unpin(pfn)

        self._at(self.now + fault.lasts, unpin)

    # Samples.

    def _sample(self, number: int) -> None:
        settings = self._scenario.settings
        rows = [self._row_of(member.program) for member in self._members if member.program.alive]
        self._rows += [row for row, _, _ in rows]
        self._rows.append(self._whole(rows))
        # In whole nanoseconds, as the clock: 3 * 0.1 is more than 0.3.
        if (due := round((number + 1) * settings.sample, 9)) <= settings.duration:
            self._at(due, lambda: self._sample(number + 1))

    def _row_of(self, program: Program) -> tuple[Row, NDArray[np.int64], int]:
        pages = take_census(self.machine.space(program.mm)).anonymous
        by_order, huge = pages.orders, pages.state("pmd_mapped")
        return self._row(program.name, by_order, huge), by_order, huge

    def _row(self, name: str, by_order: NDArray[np.int64], huge: int) -> Row:
        geometry = self._scenario.geometry
        resident = int(by_order.sum())
        row: Row = {
            "policy": self._policy,
            "seconds": round(self.now, 6),
            "process": name,
            "resident_bytes": resident * geometry.page_size,
            "huge_coverage": figures.share(huge, resident),
            "large_coverage": figures.coverage_from(by_order, 1),
            "translations": figures.translations(by_order, huge, geometry.pmd_order),
        }
        for order in range(geometry.pmd_order + 1):
            row[figures.order_column(order)] = figures.share(int(by_order[order]), resident)
        return row

    def _whole(self, rows: Sequence[tuple[Row, NDArray[np.int64], int]]) -> Row:
        machine, page = self.machine, self._scenario.geometry.page_size
        none = np.zeros(figures.MAX_ORDER + 1, np.int64)
        row = self._row("", sum((by_order for _, by_order, _ in rows), none), sum(huge for _, _, huge in rows))
        done = self._khugepaged.statistics
        bloat = done.filled.total() * page
        counters = machine.counters.values()
        made = {name: sum(v for key, v in counters.items() if key.endswith(f"/{name}")) for name in _ALLOCATIONS}
        return row | {
            "bloat_bytes": bloat,
            # Programs grow and shrink, so the memory before the first collapse is estimated: that of now, without
            # bloat.
            "bloat_share": figures.share(bloat, max(row["resident_bytes"] - bloat, 0)),
            "copied_bytes": done.copied.total() * page,
            "scanned_ptes": done.progress,
            # All work that is not counted for programs (_act) or trims.
            "khugepaged_seconds": (self._spent_ns() - self._programs_ns - self._mthp.trim_ns) / 1e9,
            "given_back_bytes": self._mthp.given_back_bytes,
            "alloc_attempts": sum(made.values()),
            "alloc_failures": made["collapse_alloc_failed"],
            "alloc_failure_share": figures.share(made["collapse_alloc_failed"], sum(made.values())),
            "fairness": figures.fairness([one["huge_coverage"] for one, _, _ in rows] or [0.0]),
            "processes": len(rows),
            "killed": self._killed,
            "free_bytes": machine.parts.memory.free_frames * page,
        }


_ALLOCATIONS = ("collapse_alloc", "collapse_alloc_failed")


def _present(program: Program) -> NDArray[np.int64]:
    """Return the addresses of a program's present pages."""
    space = program.machine.space(program.mm)
    found = [np.empty(0, np.int64)]
    for start, end in space.mapped():
        columns = space.read([(start, end)])
        at = np.flatnonzero(columns.has(Pte.PRESENT) & ~columns.has(Pte.ZERO))
        found.append(start + at.astype(np.int64) * program.page)
    return np.concatenate(found)
