"""The state that the parts of a collapse share: the target, the report, the pace, and the caller's wish to stop."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

from mthp.addrspace import AddressSpace
from mthp.engine.admission import bloat_budget, copy_budget, room_of
from mthp.engine.report import CollapseReport
from mthp.engine.visited import RestClock, WallClock
from mthp.errors import MthpError, TargetVanishedError
from mthp.means import Means
from mthp.measuring import measure
from mthp.pacing import ByteBudget
from mthp.progress import StepProgress
from mthp.results import ScanResult

PACE = 0.1
"""Seconds: between two rests, at most the bytes that the rate allows in this time are collapsed."""


class Work:
    """One run of a plan.

    Args:
        total: bytes that are planned.
        clock: the time that the work takes and rests; by default that of this machine.

    Attributes:
        space, means, report: those of the collapse.
        room: the room below the target's memory limits; renewed before every batch.
        has_begun: whether anything was carried out that an error would lose.
    """

    def __init__(
        self,
        space: AddressSpace,
        means: Means,
        report: CollapseReport,
        total: int,
        progress: StepProgress | None,
        stop: Callable[[], bool],
        clock: RestClock | None = None,
    ) -> None:
        self.clock = clock or WallClock()
        self.space = space
        self.means = means
        self.report = report
        self.room = room_of(space, means)
        report.bloat_budget = bloat_budget(space, means)
        report.copy_budget = copy_budget(space, means)
        self.has_begun = False
        self._total = total
        self._done = 0
        self._budget = ByteBudget(means.rate, self.clock.now)
        self._progress = progress
        self._stop = stop
        self._started = self.clock.now()

    @property
    def elapsed(self) -> float:
        """Seconds since the run began."""
        return self.clock.now() - self._started

    def stop_requested(self) -> bool:
        """Return whether nothing more is to be begun, and note a stop in the report."""
        if self._stop():
            self.report.interrupted = True
        return self.report.interrupted or bool(self.report.out_of_memory)

    def step(self, size: int, what: str) -> None:
        """Count `size` bytes as finished, successfully or not."""
        self._done += size
        if self._progress is not None:
            self._progress(self._done, self._total, what)

    def began(self) -> None:
        """Note that something was carried out."""
        self.has_begun = True

    def tried(self, size: int) -> None:
        """Count `size` bytes that were collapsed or tried against the rate."""
        self._budget.spend(size)

    def keep_pace(self) -> None:
        """Rest until the bytes tried per second are within the rate."""
        while (rest := self._budget.wait()) > 0 and not self._stop():
            self.rest(min(rest, PACE))

    @contextlib.contextmanager
    def reported(self) -> Iterator[None]:
        """Run the body, and complete the report however it ends.

        Raises:
            MthpError: nothing had begun that would be lost with the error.
        """
        try:
            yield
            self.report.after = measure(self.space, self.space.vmas(), self.report.plan.scope).now
        except TargetVanishedError:
            self.report.vanished = True
        except MthpError as error:
            if not self.has_begun:
                raise
            self.report.error = error
        self.report.elapsed = self.elapsed

    def rest(self, seconds: float) -> None:
        """Sleep."""
        self.clock.sleep(seconds, threading.Event())

    def most_at_once(self, size: int, at_most: int) -> int:
        """Return the runs of `size` bytes that make a batch: fewer than `at_most` if a rate makes them take long."""
        if self.means.rate is None:
            return at_most
        return min(at_most, max(1, int(PACE * self.means.rate) // size))

    def bloat_left(self) -> int | None:
        """Return the bytes that filling may still add; None without a bound."""
        budget = self.report.bloat_budget
        return None if budget is None else budget - self.report.filled_bytes

    def copied_left(self) -> int | None:
        """Return the bytes that may still be copied; None without a bound."""
        budget = self.report.copy_budget
        return None if budget is None else budget - self.report.copied_bytes

    def out_of_memory(self, result: ScanResult) -> None:
        """End the run because of a failed charge: the target is at a limit, contrary to what was measured before."""
        self.report.out_of_memory = self.report.out_of_memory or f"{result.name}: {result.meaning}"
