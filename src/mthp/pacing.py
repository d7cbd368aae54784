"""Budgets of what may be used in a time: CPU seconds, bytes. Every pace of mthp that has a rate is one of them.

A budget earns at its rate, saves up to a bound, and may be overdrawn by one piece of work. A caller asks how long to
wait before it begins work, and reports afterwards what the work took. An overdrawn budget has its caller wait until a
slice is saved that is worth waking up for. Waking up costs CPU time too: a thread that sleeps just long enough to earn
the cost of one wake never earns any work.

No budget sleeps: it returns the seconds. Times are of a monotonic clock, so setting the calendar changes nothing.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

Clock = Callable[[], float]
"""Seconds since some moment; never goes back."""

CPU_SLICE = 0.02
"""Seconds of CPU time that are earned during one wait at least: some hundred times what a wake costs, and with the
daemon's 10 % of a core a wait of 0.2 s, which leaves most of a second to notice new memory."""

CPU_BURST = 0.25
"""Seconds of CPU time that may be saved up while nothing is to be done."""

BYTES_SLICE_SECONDS = 0.05
"""The slice of a byte rate, as the time in which it is earned."""

BYTES_BURST_SECONDS = 0.1
"""How much of a byte rate may be saved up, as the time in which it is earned."""

_ROUNDING = 1e-4
"""Seconds that a wait is longer than its slice takes to earn, so that rounding does not make it two waits."""


class Budget:
    """An allowance per second that can be saved up to a bound, and overdrawn by one piece of work.

    Args:
        rate: earned per second; None for no bound.
        burst: saved up at most.
        worth: saved at least when a wait ends; no more than `burst`.
    """

    def __init__(self, rate: float | None, burst: float, worth: float, clock: Clock = time.monotonic) -> None:
        self._rate, self._burst, self._worth, self._clock = rate, burst, worth, clock
        self._saved = burst
        self._at = self._resume_at = clock()

    def set(self, rate: float | None, burst: float, worth: float) -> None:
        """Go on with another allowance; the debt of the old one stays."""
        self.wait()
        self._rate, self._burst, self._worth = rate, burst, worth
        self._saved = min(self._saved, burst)
        self._resume_at = self._at

    def spend(self, amount: float) -> None:
        """Take note of what was used."""
        self._saved -= amount

    def wait(self) -> float:
        """Return the seconds until work may begin; 0.0 for now."""
        now = self._clock()
        elapsed, self._at = max(now - self._at, 0.0), now
        if self._rate is None:
            self._saved, self._resume_at = self._burst, now
            return 0.0
        self._saved = min(self._saved + elapsed * self._rate, self._burst)
        if self._saved <= 0:
            self._resume_at = now + (self._worth - self._saved) / self._rate
        # A moment, not an amount: the wake itself has taken a part of the slice by now, and must not prolong the wait.
        return self._resume_at - now + _ROUNDING if now < self._resume_at else 0.0


class ByteBudget(Budget):
    """Bytes that may be worked on.

    Args:
        rate: bytes per second; None for no bound.
    """

    def __init__(self, rate: float | None, clock: Clock = time.monotonic) -> None:
        super().__init__(rate, *_byte_bounds(rate), clock)

    def set_rate(self, rate: float | None) -> None:
        """Go on with another rate."""
        self.set(rate, *_byte_bounds(rate))


def _byte_bounds(rate: float | None) -> tuple[float, float]:
    return BYTES_BURST_SECONDS * (rate or 0), BYTES_SLICE_SECONDS * (rate or 0)


class CpuBudget:
    """The CPU time of this process or thread, less that of threads that are left out, as a share of one core.

    Args:
        share: of one core.
        used: CPU seconds used so far.
        burst: CPU seconds that may be saved up.
        read: returns the CPU seconds of a thread by its clock.
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
        self._left_out: list[int] = []
        self._before = used()

    def set(self, share: float) -> None:
        """Go on with another share."""
        self._budget.set(share, self._burst, CPU_SLICE)

    def wait(self) -> float:
        """Return the seconds until work may begin."""
        used = self._spent_by_others()
        self._budget.spend(used - self._before)
        self._before = used
        return self._budget.wait()

    def leave_out(self) -> None:
        """Count nothing that the calling thread spends: clients that ask without end must not stop the work."""
        own = time.pthread_getcpuclockid(threading.get_ident())
        self._before -= self._read(own)
        self._left_out.append(own)

    def _spent_by_others(self) -> float:
        return self._used() - sum(map(self._read, self._left_out))
