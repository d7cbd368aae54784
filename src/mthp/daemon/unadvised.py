"""The time of the next try to move memory for which no folio could be allocated (:mod:`mthp.thp_unadvised`)."""

from __future__ import annotations

FIRST_SECONDS, LAST_SECONDS = 60.0, 3600.0
"""Seconds until a target is tried again, at first and in the end, because it may undo its prctl, which is not visible.
"""


class Unadvised:
    """The state of one target."""

    def __init__(self) -> None:
        self._until = 0.0
        self._wait = 0.0

    def holds(self, now: float) -> bool:
        """Return whether memory without advice must be left alone."""
        return now < self._until

    def found(self, now: float) -> None:
        """Note that the folios of a batch came out small; does nothing while :meth:`holds` is true."""
        if not self.holds(now):
            self._wait = min(max(2 * self._wait, FIRST_SECONDS), LAST_SECONDS)
            self._until = now + self._wait
