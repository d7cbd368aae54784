"""Budgets of CPU seconds and bytes over time, for every pace of mthp that has a rate; and rests after failures.

A budget earns at its rate, saves up to a bound, and may be overdrawn by one piece of work. Before it begins work a
caller gets the seconds to wait, and afterwards it reports the cost of the work. After an overdraft the wait lasts until
a slice is saved that is worth a wake-up. A wake-up costs CPU time too: a thread that sleeps just long enough to earn
the cost of one wake-up never earns any work.

Budgets return seconds, and do not sleep. Times are of a monotonic clock, so setting the calendar changes nothing.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable

Clock = Callable[[], float]
"""Returns the seconds since a fixed moment, which never decrease."""

CPU_SLICE = 0.02
"""CPU seconds that one wait earns at least: some hundred times the cost of a wake-up, and with the daemon's 10 % of a
core a wait of 0.2 s, which leaves most of a second to notice new memory."""

CPU_BURST = 0.25
"""CPU seconds that may be saved up while there is nothing to do."""

BYTES_SLICE_SECONDS = 0.05
"""The slice of a byte rate, as the seconds that earn it."""

BYTES_BURST_SECONDS = 0.1
"""The most of a byte rate that may be saved up, as the seconds that earn it."""

_ROUNDING = 1e-4
"""Seconds that a wait is longer than its slice takes to earn, so that rounding does not split it into two waits."""


class Budget:
    """An allowance per second that can be saved up to a bound, and overdrawn by one piece of work.

    Args:
        rate: earned per second; None without a bound.
        burst: the most that is saved up.
        worth: the least that is saved when a wait ends; at most `burst`.
    """

    def __init__(self, rate: float | None, burst: float, worth: float, clock: Clock = time.monotonic) -> None:
        self._rate, self._burst, self._worth, self._clock = rate, burst, worth, clock
        self._saved = burst
        self._at = self._resume_at = clock()

    def set(self, rate: float | None, burst: float, worth: float) -> None:
        """Switch to another allowance; the debt of the old one stays."""
        # Earnings until now are at the old rate.
        self.wait()
        self._rate, self._burst, self._worth = rate, burst, worth
        self._saved = min(self._saved, burst)
        self._resume_at = self._at

    def spend(self, amount: float) -> None:
        """Subtract the amount that was used."""
        self._saved -= amount

    def wait(self) -> float:
        """Return the seconds until work may begin; 0.0 if it may begin now."""
        now = self._clock()
        elapsed, self._at = max(now - self._at, 0.0), now
        if self._rate is None:
            self._saved, self._resume_at = self._burst, now
            return 0.0
        self._saved = min(self._saved + elapsed * self._rate, self._burst)
        if self._saved <= 0:
            self._resume_at = now + (self._worth - self._saved) / self._rate
        # A moment, not an amount: the wake-up itself takes a part of the slice, and must not prolong the wait.
        return self._resume_at - now + _ROUNDING if now < self._resume_at else 0.0


class ByteBudget(Budget):
    """A budget of bytes to work on.

    Args:
        rate: bytes per second; None without a bound.
    """

    def __init__(self, rate: float | None, clock: Clock = time.monotonic) -> None:
        super().__init__(rate, *_byte_bounds(rate), clock)

    def set_rate(self, rate: float | None) -> None:
        """Switch to another rate."""
        self.set(rate, *_byte_bounds(rate))


def _byte_bounds(rate: float | None) -> tuple[float, float]:
    return BYTES_BURST_SECONDS * (rate or 0), BYTES_SLICE_SECONDS * (rate or 0)


class Backoff:
    """A rest after a failure, which every further failure doubles."""

    def __init__(self) -> None:
        self._until = self._rest = 0.0

    def rests(self, now: float) -> bool:
        """Return whether it is too early for another try."""
        return now < self._until

    def failed(self, now: float, first: float, last: float) -> None:
        """Rest for `first` seconds, later for up to `last`; does nothing while it rests."""
        if not self.rests(now):
            self._rest = min(max(2 * self._rest, first), last)
            self._until = now + self._rest


class CpuBudget:
    """The CPU time of this process or thread, without that of some threads, as a share of one core.

    Args:
        share: of one core.
        used: returns the CPU seconds used until now.
        burst: CPU seconds that may be saved up.
        read: returns the CPU seconds of a thread, given its clock.
    """

    def __init__(
        self,
        share: float,
        clock: Clock = time.monotonic,
        used: Clock = time.process_time,
        burst: float = CPU_BURST,
        read: Callable[[int], float] = time.clock_gettime,
    ) -> None:
        self._burst = burst
        self._budget = Budget(share, burst, CPU_SLICE, clock)
        self._used, self._read = used, read
        self._left_out: dict[int, float] = {}
        self._before = used()

    def set(self, share: float) -> None:
        """Switch to another share."""
        self._budget.set(share, self._burst, CPU_SLICE)

    def wait(self) -> float:
        """Return the seconds until work may begin."""
        used = self._spent_by_work()
        self._budget.spend(used - self._before)
        self._before = used
        return self._budget.wait()

    def leave_out(self) -> None:
        """Do not count the calling thread from now on: clients with endless requests must not stop the work."""
        own = time.pthread_getcpuclockid(threading.get_ident())
        self._left_out[own] = self._read(own)
        self._before -= self._left_out[own]

    def _spent_by_work(self) -> float:
        for clock in list(self._left_out):
            # The clock of a thread that has ended cannot be read; what it spent stays in the time of the process.
            with contextlib.suppress(OSError):
                self._left_out[clock] = self._read(clock)
        return self._used() - sum(self._left_out.values())
