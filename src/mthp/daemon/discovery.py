"""New processes are let settle before they are matched against the rules.

A process that was just forked is about to become another program, and most are gone a moment later. So it is left alone
for a while first (:class:`Nursery`); who ends meanwhile was never looked into. Only so
many are looked into at a time, so that a storm of new processes delays others and never the daemon.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable

from mthp.pacing import Clock

AT_A_TIME = 128
"""Processes looked into between two looks at the other things that the daemon does."""

SETTLE_SHARE = 0.4
"""The part of the time in which a process is to be noticed that it is left alone for."""


class Nursery:
    """New processes, until it is time to look into them.

    Args:
        settle: seconds for which each is left alone.
    """

    def __init__(self, settle: float, clock: Clock = time.monotonic) -> None:
        self.settle = settle
        self._clock = clock
        self._due: dict[int, float] = {}
        self._queue: deque[tuple[float, int]] = deque()

    def add(self, pids: Iterable[int], *, at_once: bool = False) -> None:
        """Look into these when they have settled; who is here already waits anew, since it has changed."""
        due = self._clock() + (0 if at_once else self.settle)
        for pid in pids:
            self._due[pid] = due
            self._queue.append((due, pid))

    def drop(self, pids: Iterable[int]) -> None:
        """These are gone."""
        for pid in pids:
            self._due.pop(pid, None)

    def next_due(self) -> float | None:
        """When there is somebody to look into; None if nobody waits."""
        while self._queue and self._due.get(self._queue[0][1]) != self._queue[0][0]:
            self._queue.popleft()
        return self._queue[0][0] if self._queue else None

    def take(self, limit: int = AT_A_TIME) -> list[int]:
        """Those that have settled, `limit` at most."""
        taken: list[int] = []
        now = self._clock()
        while len(taken) < limit and (due := self.next_due()) is not None and due <= now:
            _, pid = self._queue.popleft()
            del self._due[pid]
            taken.append(pid)
        return taken

    def __len__(self) -> int:
        return len(self._due)
