"""A waiting time for new processes before they are matched against the rules.

A process that was just forked is about to become another program, and most exit a moment later. So it is left alone for
a while first (:class:`Nursery`); a process that exits meanwhile is never read. Only :data:`AT_A_TIME` are read at once,
so that a storm of new processes delays others and never the daemon.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable

from mthp.pacing import Clock

AT_A_TIME = 128
"""Processes read before the daemon turns to its other events."""

SETTLE_SHARE = 0.4
"""The part of the noticing time for which a new process is left alone."""


class Nursery:
    """New processes that wait to be read.

    Args:
        settle: seconds for which each is left alone.
    """

    def __init__(self, settle: float, clock: Clock = time.monotonic) -> None:
        self.settle = settle
        self._clock = clock
        self._due: dict[int, float] = {}
        self._queue: deque[tuple[float, int]] = deque()

    def add(self, pids: Iterable[int], *, at_once: bool = False) -> None:
        """Add processes. One that waits already starts waiting again, because it has changed."""
        due = self._clock() + (0 if at_once else self.settle)
        for pid in pids:
            self._due[pid] = due
            self._queue.append((due, pid))

    def drop(self, pids: Iterable[int]) -> None:
        """Remove processes that are gone."""
        for pid in pids:
            self._due.pop(pid, None)

    def next_due(self) -> float | None:
        """Return when the next process has settled; None if none waits."""
        while self._queue and self._due.get(self._queue[0][1]) != self._queue[0][0]:
            self._queue.popleft()
        return self._queue[0][0] if self._queue else None

    def take(self, limit: int = AT_A_TIME) -> list[int]:
        """Return the processes that have settled, `limit` at most."""
        taken: list[int] = []
        now = self._clock()
        while len(taken) < limit and (due := self.next_due()) is not None and due <= now:
            _, pid = self._queue.popleft()
            del self._due[pid]
            taken.append(pid)
        return taken

    def __len__(self) -> int:
        return len(self._due)
