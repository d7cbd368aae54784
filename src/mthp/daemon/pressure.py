"""Memory pressure and free folios of the machine; file descriptors and resident memory of this process.

The worker checks pressure and free folios before it begins work. Neither sleeps; budgets are in :mod:`mthp.pacing`.
"""

from __future__ import annotations

import functools
import os
import time
from collections import defaultdict
from pathlib import Path

import numpy as np

from mthp.daemon.eagerness import Shortage
from mthp.engine.packing import Freed, Packing
from mthp.engine.reach import Steps, Supply, reachable
from mthp.freememory import MOVES, MemoryBlocks, parse_buddyinfo
from mthp.linux.cgroups import CgroupMount, cgroup_directories, cgroup_mounts
from mthp.linux.kernelfiles import text_of
from mthp.linux.memoryblocks import memory_blocks
from mthp.linux.memorylimits import free_memory, parse_meminfo
from mthp.pacing import Backoff, Clock

ASK_SECONDS = 0.5
"""Least seconds between two reads of the machine's pressure and its free memory."""

REACH_FRAMES = 1 << 19
"""Frames that are read at most, 2 GiB on x86-64. To follow compaction in more takes too long for a daemon."""

REACH_SECONDS = 60.0
"""Least seconds between two predictions of what the machine's memory allows."""

FIRST_RETRY_SECONDS = 1.0
"""Seconds after the first failed allocation of an order; doubled by every further one, up to alloc_sleep_millisecs."""

_EASED = 0.5
"""Part of the limit to which pressure must fall before work goes on."""


class MemoryPressure:
    """The check whether tasks wait too much for memory to add more work (PSI, accounting/psi.rst).

    Args:
        limit: share of time in which some task waits, averaged over 10 seconds.
        path: path of ``/proc/pressure/memory``; a kernel without it has no pressure.

    Attributes:
        share: share of time in which tasks wait for memory.
        resting: whether work waits for the pressure to ease.
    """

    share: float
    resting: bool

    def __init__(self, limit: float, path: Path = Path("/proc/pressure/memory"), clock: Clock = time.monotonic) -> None:
        self.limit = limit
        self._path, self._clock = path, clock
        self._asked = -ASK_SECONDS
        self.share = 0.0
        self.resting = False

    def rests(self) -> bool:
        """Return whether work should wait."""
        now = self._clock()
        if now - self._asked >= ASK_SECONDS:
            self._asked = now
            self.share = _some_avg10(self._path)
            self.resting = self.share > self.limit * (_EASED if self.resting else 1.0)
        return self.resting


def measured(membership: str, proc: Path = Path("/proc")) -> Shortage:
    """Return the pressure and free memory for a target; the pressure is 0 on a kernel without PSI.

    Args:
        membership: the text of its ``/proc/PID/cgroup``.
    """
    mounts = _mounts(proc)
    tops = {mount.point for mount in mounts}
    files = [each / "memory.pressure" for each in cgroup_directories(mounts, membership, "memory") if each not in tops]
    # The top is the root cgroup, or stands in a container for one outside of it: the machine's pressure counts.
    pressure = _some_avg10(next((file for file in files if file.exists()), proc / "pressure/memory"))
    meminfo = text_of(proc / "meminfo") or ""
    available, total = (parse_meminfo(meminfo, name) for name in ("MemAvailable", "MemTotal"))
    return Shortage(pressure, available / total if available is not None and total else 1.0)


@functools.cache
def _mounts(proc: Path) -> tuple[CgroupMount, ...]:
    """Return the mounts of control groups, read once because on large machines the list of mounts is long."""
    return cgroup_mounts(text_of(proc / "self/mountinfo") or "")


class FreeFolios:
    """The orders of which the machine has a free folio, and those that it recently refused.

    Args:
        path: path of ``/proc/buddyinfo``; if it cannot be read, every order is tried.
    """

    def __init__(self, path: Path = Path("/proc/buddyinfo"), clock: Clock = time.monotonic) -> None:
        self._path, self._clock = path, clock
        self._asked = -ASK_SECONDS
        self._largest: int | None = None
        self._refused: defaultdict[int, Backoff] = defaultdict(Backoff)

    def available(self, order: int) -> bool:
        """Return whether a folio of `order` may be requested now."""
        now = self._clock()
        if now - self._asked >= ASK_SECONDS:
            self._asked = now
            self._largest = _largest_free(self._path)
        if self._largest is not None and order > self._largest:
            return False
        return not self._refused[order].rests(now)

    def refused(self, order: int, alloc_sleep: float) -> None:
        """Note that the kernel had no folio of `order`: wait before the next request, `alloc_sleep` seconds at most.

        If the machine has such folios free, the reason lies in the target, and other targets need not wait.
        """
        free = free_memory(self._path.parent)
        if free is None or not free.folios(order):
            self._refused[order].failed(self._clock(), FIRST_RETRY_SECONDS, max(alloc_sleep, ASK_SECONDS))

    def given(self, order: int) -> None:
        """Note that the kernel allocated a folio of `order`."""
        # Ends its rest, and the doubling.
        self._refused.pop(order, None)

    def exhausted(self) -> list[int]:
        """Return the orders that are not requested at the moment because they were refused."""
        now = self._clock()
        # A copy, because the main thread asks while the worker changes it.
        return sorted(order for order, refused in dict(self._refused).items() if refused.rests(now))


class MachineReach:
    """How much of the machine's anonymous memory could lie in PMD folios: read once a minute, and only if it is wanted.

    Of more than `REACH_FRAMES` frames a sample is read.
    """

    def __init__(self, pmd_order: int, proc: Path = Path("/proc"), clock: Clock = time.monotonic) -> None:
        self._order, self._proc, self._clock = pmd_order, proc, clock
        self._read = -REACH_SECONDS
        self._shares: dict[str, float] = {}

    def shares(self) -> dict[str, float]:
        """Return the share ``now`` and ``after_compaction``; without what is not known."""
        now = self._clock()
        if now - self._read >= REACH_SECONDS:
            self._read = now
            self._shares = self._measured()
        return self._shares

    def _measured(self) -> dict[str, float]:
        free = free_memory(self._proc)
        meminfo = text_of(self._proc / "meminfo") or ""
        anonymous, huge = (parse_meminfo(meminfo, name) for name in ("AnonPages", "AnonHugePages"))
        if free is None or anonymous is None or huge is None:
            return {}
        size = os.sysconf("SC_PAGESIZE") << self._order
        count = max(0, anonymous - huge) // size
        orders, none = np.full(count, self._order, np.int8), np.zeros(count, np.int64)
        steps = Steps(orders, orders, none, none)
        ways = {"now": Supply(free)}
        flags = str(self._proc / "kpageflags")
        if blocks := memory_blocks(free, self._order, most=REACH_FRAMES, path=flags):
            ways["after_compaction"] = Supply(free, packing=Packing(free, blocks, _scattered(blocks, count)))
        made = {way: int(reachable(steps, supply)[0].sum()) for way, supply in ways.items()}
        return {way: (huge + number * size) / max(1, anonymous) for way, number in made.items()}


def _scattered(blocks: MemoryBlocks, count: int) -> Freed:
    """Return pages that `count` folios free, if pages of programs lie in all blocks with movable pages alike."""
    moves = blocks.numbers[:, None] * (1 << blocks.order) + np.arange(1 << blocks.order)
    moves = moves[blocks.pages == MOVES]
    share = (count << blocks.order) / max(1, len(moves) * blocks.weight)
    chance = np.random.default_rng(0)
    frames = moves[chance.random(len(moves)) < share]
    return Freed(frames, chance.integers(0, max(1, count), len(frames)))


def _some_avg10(path: Path) -> float:
    """Return the share of time in the line ``some avg10=1.23 ...``; 0.0 without such a line."""
    for word in (text_of(path) or "").split():
        if word.startswith("avg10="):
            return float(word.removeprefix("avg10=")) / 100
    return 0.0


def _largest_free(path: Path) -> int | None:
    """Return the largest order of which any node has a free block; None if unknown."""
    try:
        nodes = parse_buddyinfo(path.read_text())
    except (OSError, ValueError):
        return None
    orders = [order for node in nodes for order, count in enumerate(node.blocks) if count]
    return max(orders, default=0) if nodes else None


def raise_open_files_limit() -> None:
    """Raise the soft limit of file descriptors to the hard one, because each target takes two."""
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def memory_used() -> int:
    """Return the resident bytes of this process."""
    return int(Path("/proc/self/statm").read_bytes().split()[1]) * os.sysconf("SC_PAGESIZE")
