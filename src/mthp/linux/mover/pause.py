"""How long the target stood still, and how much to do while it does.

A window costs a fixed time (stopping, parking, restoring, and waiting for the worker; it grows with the threads) and a
time for each byte moved, which the worker measures itself. The two are kept apart in every window, also in the first
one, which has one block; and the next one is filled so that it should stay below the limit. What was measured
last counts as much as the average of all before, and the worse of the two is believed, so that a target that has become
slower is noticed at once.

Where the fixed time alone is over the limit, or so near that no block fits, no window can keep to it. The fewer blocks
each had, the more of them there would be, each almost as long: such windows are a part longer than need be
(:data:`UNAVOIDABLE`), and have many blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MARGIN = 0.8
"""The part of the limit that is planned for; the rest is for what cannot be foreseen."""

UNAVOIDABLE = 0.5
"""For how long blocks are moved where the limit cannot be kept to: by so much of the fixed time the pause is longer."""

_WEIGHT = 0.5


@dataclass(frozen=True, slots=True)
class Pause:
    """One window, from the first thread that was stopped to the last that was let go. Times in nanoseconds.

    Attributes:
        blocks: blocks that the worker was given.
        size: bytes in them.
        threads: threads of the target.
        stop_ns: until all threads stood still.
        park_ns: until all were parked and the operations written.
        move_ns: while the worker ran, less what copying took.
        copy_ns: copying bytes back, with the faults that this takes.
        restore_ns: until all threads were let go.
        work_ns: what the worker spent on the blocks by its own clock; a part of moving and copying.
    """

    blocks: int
    size: int
    threads: int
    stop_ns: int
    park_ns: int
    move_ns: int
    copy_ns: int
    restore_ns: int
    work_ns: int

    @property
    def total_ns(self) -> int:
        """All of it."""
        return self.fixed_ns + self.move_ns + self.copy_ns

    @property
    def fixed_ns(self) -> int:
        """All but moving and copying."""
        return self.stop_ns + self.park_ns + self.restore_ns


class PauseBudget:
    """Says how many blocks the next window may have.

    Args:
        max_pause_ns: length of a pause that is not to be exceeded, as far as can be foreseen.
        max_blocks: the most that a window can have.
    """

    def __init__(self, max_pause_ns: int, max_blocks: int) -> None:
        self.limit(max_pause_ns)
        self._max_blocks = max_blocks
        self._fixed_ns = 0.0
        self._ns_per_byte = 0.0
        self._measured = False

    def limit(self, max_pause_ns: int) -> None:
        """Keep to another length from now on."""
        self._limit_ns = MARGIN * max_pause_ns

    def blocks(self, sizes: Sequence[int]) -> int:
        """How many of the next blocks, of `sizes` bytes, fit into a window: at least 1, and at first 1."""
        if not self._measured:
            return 1
        costs = np.cumsum(np.array(sizes[: self._max_blocks]) * self._ns_per_byte)
        fitting = int(np.searchsorted(costs, self._limit_ns - self._fixed_ns, side="right"))
        return fitting or max(1, int(np.searchsorted(costs, UNAVOIDABLE * self._fixed_ns, side="right")))

    def observe(self, pause: Pause) -> None:
        """Learn from a window; one in which nothing was moved says nothing about the cost of moving."""
        self._fixed_ns = self._believe(self._fixed_ns, pause.total_ns - pause.work_ns)
        if pause.size:
            self._ns_per_byte = self._believe(self._ns_per_byte, pause.work_ns / pause.size)
            self._measured = True

    def _believe(self, before: float, now: float) -> float:
        average = now if not self._measured else (1 - _WEIGHT) * before + _WEIGHT * now
        return max(average, now)


def rest_seconds(pause: Pause, duty: float) -> float:
    """How long to let the target run after `pause`, so that it stands still for the part `duty` of the time at most."""
    return pause.total_ns * 1e-9 * (1 - duty) / duty
