"""What the machine and this process have left: memory pressure, free folios, file descriptors, resident memory.

The worker checks pressure and free folios before it begins work. Neither sleeps; budgets are in :mod:`mthp.pacing`.
"""

from __future__ import annotations

import functools
import os
import time
from pathlib import Path

from mthp.daemon.eagerness import Measured
from mthp.linux.cgroups import CgroupMount, cgroup_directories, cgroup_mounts
from mthp.linux.headroom import free_beyond_reserve, parse_buddyinfo, parse_meminfo
from mthp.pacing import Clock

ASK_SECONDS = 0.5
"""The machine is asked for its pressure and its free memory no more often than that."""

FIRST_RETRY_SECONDS = 1.0
"""After the first failed allocation of an order; it doubles with every further one, up to alloc_sleep_millisecs."""

_EASED = 0.5
"""Once it rests, pressure must fall to this part of the limit before work goes on."""


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


def measured(membership: str, proc: Path = Path("/proc")) -> Measured:
    """Return what is measured of a target; a kernel without PSI has no pressure.

    Args:
        membership: the text of its ``/proc/PID/cgroup``.
        proc: where /proc is.
    """
    mounts = _mounts(proc)
    tops = {mount.point for mount in mounts}
    files = [each / "memory.pressure" for each in cgroup_directories(mounts, membership, "memory") if each not in tops]
    # At the top is the root cgroup, or what a container shows in place of a cgroup that is outside of it.
    pressure = _some_avg10(next((file for file in files if file.exists()), proc / "pressure/memory"))
    try:
        meminfo = (proc / "meminfo").read_text()
    except OSError:
        meminfo = ""
    available, total = (parse_meminfo(meminfo, name) for name in ("MemAvailable", "MemTotal"))
    return Measured(pressure, available / total if available is not None and total else 1.0)


@functools.cache
def _mounts(proc: Path) -> tuple[CgroupMount, ...]:
    """Return where control groups are: read once, because on large machines the list of mounts is long."""
    try:
        return cgroup_mounts((proc / "self/mountinfo").read_text(errors="replace"))
    except OSError:
        return ()


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
        """The kernel had no folio of `order`: do not ask for a while, `alloc_sleep` seconds at most.

        Where the machine has such folios free, the reason lies in the target, and other targets need not wait.
        """
        if free_beyond_reserve(order, self._path):
            return
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
