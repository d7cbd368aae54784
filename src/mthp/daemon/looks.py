"""The interval of looks at targets, from a small share of a core, on this machine and with these targets.

A look is one read of ``/proc/PID/stat``. Targets in which folios may be made, and those in which no mapping allows it,
have a share each: a thousand idle shells do not delay the look that notices new memory of an advised process.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from mthp.pacing import Clock

LOOK_SHARE = 0.0015
"""The part of a core that the looks at one kind of targets may take. Waking up and choosing the target cost two to
three times as much as the look (measured, with warm and with cold caches), so all of it costs half a percent.
"""

SHORTEST_ROUND = 0.5
"""Least seconds between two looks at the same idle target: new memory is then worked on within a second."""

FIRST_LOOK = 0.5
"""Seconds until the next look after a change. They double up to the interval of :mod:`mthp.daemon.looks`, or to
scan_sleep_millisecs if that is shorter.
"""

WAKE_GRID = 0.25
"""Seconds: the looks of idle targets begin at multiples of this, because each wake costs more than a look."""

_WEIGHT = 1 / 64
"""Weight of the last look in the mean duration of a look."""


@dataclass(frozen=True, slots=True)
class Sign:
    """The fields of ``/proc/PID/stat`` that change when memory may have been mapped.

    Attributes:
        faults: page faults so far.
        mapped: bytes of its mappings.
        resident: pages; not compared.
        comm: name of the process.
    """

    faults: int
    mapped: int
    resident: int = field(compare=False)
    comm: bytes

    @classmethod
    def parse(cls, text: bytes) -> Sign:
        """Return the fields in the text of ``/proc/PID/stat`` (proc_pid_stat(5))."""
        end = text.rindex(b")")
        fields = text[end + 2 :].split(maxsplit=23)
        return cls(int(fields[7]) + int(fields[9]), int(fields[20]), int(fields[21]), text[text.index(b"(") + 1 : end])


class Looks:
    """The mean cost of a look, and the targets that share the looks.

    Args:
        spent: CPU seconds of the calling thread.
    """

    def __init__(self, spent: Clock = time.thread_time) -> None:
        self.spent = spent
        self._mean = 0.0
        self._targets: dict[bool, set[object]] = {True: set(), False: set()}

    def took(self, seconds: float) -> None:
        """Note the CPU time of one look."""
        self._mean += (seconds - self._mean) * _WEIGHT

    def put(self, target: object, *, eligible: bool) -> None:
        """Note whether folios may be made in a target."""
        self._targets[not eligible].discard(target)
        self._targets[eligible].add(target)

    def drop(self, target: object) -> None:
        """Forget a target."""
        for kind in self._targets.values():
            kind.discard(target)

    def interval(self, target: object) -> float:
        """Return the seconds between two looks at an idle target."""
        kind = self._targets[target in self._targets[True]]
        return max(SHORTEST_ROUND, len(kind) * self._mean / LOOK_SHARE)


def on_grid(at: float, interval: float) -> float:
    """Return `at`, or a little later, so that many idle targets wake the daemon together."""
    return -(-at // WAKE_GRID) * WAKE_GRID if interval >= FIRST_LOOK else at
