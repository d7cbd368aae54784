"""How fast the daemon goes, and when it rests: budgets of CPU time and bytes, memory pressure, free folios.

All of these are asked before work is begun, and told afterwards what it took. None of them sleeps; they say how long
there is to wait. Times are of a monotonic clock, so setting the calendar changes nothing.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from mthp.linux.freememory import parse_buddyinfo

Clock = Callable[[], float]
"""Seconds since some moment; never goes back."""

CPU_BURST = 0.25
"""Seconds of CPU time that may be saved up while nothing is to be done."""

BYTES_BURST_SECONDS = 0.1
"""How much of a byte rate may be saved up, as the time in which it is earned."""

ASK_SECONDS = 0.5
"""The machine is asked for its pressure and its free memory no more often than that."""

FIRST_RETRY_SECONDS = 1.0
"""After the first failed allocation of an order; it doubles with every further one, up to alloc_sleep_millisecs."""

_EASED = 0.5
"""Once it rests, pressure must fall to this part of the limit before work goes on."""


class Budget:
    """An allowance per second that can be saved up to a bound, and overdrawn by one piece of work.

    Args:
        rate: earned per second; None for no bound.
        burst: saved up at most.
        clock: the time.
    """

    def __init__(self, rate: float | None, burst: float, clock: Clock = time.monotonic) -> None:
        self._rate, self._burst, self._clock = rate, burst, clock
        self._saved = burst
        self._at = clock()

    def set(self, rate: float | None, burst: float) -> None:
        """Go on with another allowance; what was overdrawn stays so."""
        self.wait()
        self._rate, self._burst = rate, burst
        self._saved = min(self._saved, burst)

    def spend(self, amount: float) -> None:
        """Take note of what was used."""
        self._saved -= amount

    def wait(self) -> float:
        """Seconds until something may be used; 0.0 for now."""
        now = self._clock()
        elapsed, self._at = max(now - self._at, 0.0), now
        if self._rate is None:
            self._saved = self._burst
            return 0.0
        self._saved = min(self._saved + elapsed * self._rate, self._burst)
        return 0.0 if self._saved > 0 else -self._saved / self._rate + 1e-4


class CpuBudget:
    """The CPU time of this whole process, as a share of one core.

    Args:
        share: of one core.
        clock: the time.
        used: CPU seconds that this process has used so far.
    """

    def __init__(self, share: float, clock: Clock = time.monotonic, used: Clock = time.process_time) -> None:
        self._budget = Budget(share, CPU_BURST, clock)
        self._used = used
        self._before = used()

    def set(self, share: float) -> None:
        """Go on with another share."""
        self._budget.set(share, CPU_BURST)

    def wait(self) -> float:
        """Seconds until work may be done."""
        used = self._used()
        self._budget.spend(used - self._before)
        self._before = used
        return self._budget.wait()


class MemoryPressure:
    """Whether tasks wait for memory so much that more work should not be made for it (PSI, accounting/psi.rst).

    Args:
        limit: share of time in which some task waits, averaged over 10 seconds.
        path: of ``/proc/pressure/memory``; a kernel without it has no pressure.
    """

    def __init__(self, limit: float, path: Path = Path("/proc/pressure/memory"), clock: Clock = time.monotonic) -> None:
        self.limit = limit
        self._path, self._clock = path, clock
        self._asked = -ASK_SECONDS
        self.share = 0.0
        self.resting = False

    def rests(self) -> bool:
        """Whether work should wait."""
        now = self._clock()
        if now - self._asked >= ASK_SECONDS:
            self._asked = now
            self.share = _some_avg10(self._path)
            self.resting = self.share > self.limit * (_EASED if self.resting else 1.0)
        return self.resting


class FreeFolios:
    """Of which orders the machine has a folio to give at once, and which were refused a short while ago.

    Args:
        path: of ``/proc/buddyinfo``; where it cannot be read, every order is tried.
    """

    def __init__(self, path: Path = Path("/proc/buddyinfo"), clock: Clock = time.monotonic) -> None:
        self._path, self._clock = path, clock
        self._asked = -ASK_SECONDS
        self._largest: int | None = None
        self._refused: dict[int, tuple[float, float]] = {}

    def available(self, order: int) -> bool:
        """Whether a folio of `order` may be asked for now."""
        now = self._clock()
        if now - self._asked >= ASK_SECONDS:
            self._asked = now
            self._largest = _largest_free(self._path)
        if self._largest is not None and order > self._largest:
            return False
        until, _ = self._refused.get(order, (0.0, 0.0))
        return now >= until

    def refused(self, order: int, alloc_sleep: float) -> None:
        """The kernel had no folio of `order`: do not ask for a while, `alloc_sleep` seconds at most."""
        now = self._clock()
        until, rest = self._refused.get(order, (0.0, 0.0))
        if now < until:
            return
        rest = min(max(2 * rest, FIRST_RETRY_SECONDS), max(alloc_sleep, ASK_SECONDS))
        self._refused[order] = now + rest, rest

    def given(self, order: int) -> None:
        """The kernel gave a folio of `order`."""
        self._refused.pop(order, None)

    def exhausted(self) -> list[int]:
        """The orders that are not asked for at this moment because they were refused."""
        now = self._clock()
        return sorted(order for order, (until, _) in self._refused.items() if now < until)


def _some_avg10(path: Path) -> float:
    """The share of time of the line ``some avg10=1.23 ...``; 0.0 where there is none."""
    try:
        text = path.read_text()
    except OSError:
        return 0.0
    for word in text.split():
        if word.startswith("avg10="):
            return float(word.removeprefix("avg10=")) / 100
    return 0.0


def _largest_free(path: Path) -> int | None:
    """The largest order that any node has a free block of; None if that cannot be seen."""
    try:
        nodes = parse_buddyinfo(path.read_text())
    except (OSError, ValueError):
        return None
    orders = [order for node in nodes for order, count in enumerate(node.blocks) if count]
    return max(orders, default=0) if nodes else None


def raise_open_files_limit() -> None:
    """Allow this process as many file descriptors as it may allow itself: each target takes two."""
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def memory_used() -> int:
    """Bytes of this process that are resident."""
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")
