"""Measure how long the target was stopped, and limit the blocks of the next window accordingly.

A window costs a fixed time (stopping, parking, restoring, and waiting for the worker; it grows with the threads) and a
time for each byte moved, which the worker measures itself. Every window measures the two separately, and the next one
gets blocks so that it should stay below the limit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MARGIN = 0.8
"""The share of the limit that is planned for; the rest is for unpredicted delays."""

UNAVOIDABLE = 0.5
"""Time for moving blocks where the limit cannot be kept, as a share of the fixed time."""

_WEIGHT = 0.5


@dataclass(frozen=True, slots=True)
class Pause:
    """One window, from the first thread stopped to the last thread released. Times in nanoseconds.

    Attributes:
        blocks: number of blocks that the worker had.
        size: size of these blocks in bytes.
        threads: number of threads of the target.
        stop_ns: time until all threads were stopped.
        park_ns: time until all were parked and the operations written.
        move_ns: time while the worker ran, less the time for copying.
        copy_ns: time for copying bytes back, with the faults in it.
        restore_ns: time until all threads were released.
        work_ns: the worker's time for the blocks by its own clock; a part of moving and copying.
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
        """Return the whole time."""
        return self.fixed_ns + self.move_ns + self.copy_ns

    @property
    def fixed_ns(self) -> int:
        """Return the time without moving and copying."""
        return self.stop_ns + self.park_ns + self.restore_ns


class PauseBudget:
    """A prediction of the number of blocks that the next window may have.

    Args:
        max_pause_ns: limit of a pause in nanoseconds, kept as far as it can be predicted.
        max_blocks: limit of the blocks in a window.
    """

    def __init__(self, max_pause_ns: int, max_blocks: int) -> None:
        self.limit(max_pause_ns)
        self._max_blocks = max_blocks
        self._fixed_ns = 0.0
        self._ns_per_byte = 0.0
        self._measured = False

    def limit(self, max_pause_ns: int) -> None:
        """Set another limit of a pause, in nanoseconds."""
        self._limit_ns = MARGIN * max_pause_ns

    def blocks(self, sizes: Sequence[int]) -> int:
        """Return how many of the next blocks, of `sizes` bytes, fit into a window: at least 1, and at first 1."""
        if not self._measured:
            return 1
        costs = np.cumsum(np.array(sizes[: self._max_blocks]) * self._ns_per_byte)
        fitting = int(np.searchsorted(costs, self._limit_ns - self._fixed_ns, side="right"))
        # The fixed time leaves no time for a block, so that no window can keep the limit. Windows of few blocks would
        # be almost as long, and many: rather longer ones, with many blocks.
        return fitting or max(1, int(np.searchsorted(costs, UNAVOIDABLE * self._fixed_ns, side="right")))

    def observe(self, pause: Pause) -> None:
        """Learn from a window; one in which nothing was moved has no information about the cost of moving."""
        self._fixed_ns = self._believe(self._fixed_ns, pause.total_ns - pause.work_ns)
        if pause.size:
            self._ns_per_byte = self._believe(self._ns_per_byte, pause.work_ns / pause.size)
            self._measured = True

    def _believe(self, before: float, now: float) -> float:
        average = now if not self._measured else (1 - _WEIGHT) * before + _WEIGHT * now
        # The worse of the two, so that a target that has become slower is noticed at once.
        return max(average, now)


def rest_seconds(pause: Pause, duty: float) -> float:
    """Return how long to let the target run after `pause`, so that it is stopped for at most the share `duty`."""
    return pause.total_ns * 1e-9 * (1 - duty) / duty
