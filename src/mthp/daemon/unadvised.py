"""When to try again to move memory in which no folio could be had (:mod:`mthp.thp_unadvised`)."""

from __future__ import annotations

FIRST_SECONDS, LAST_SECONDS = 60.0, 3600.0
"""Seconds until a target is tried again, at first and in the end: it may take its prctl back, which shows nowhere."""


class Unadvised:
    """What is known of one target."""

    def __init__(self) -> None:
        self._until = 0.0
        self._wait = 0.0

    def holds(self, now: float) -> bool:
        """Return whether memory without advice is to be left alone."""
        return now < self._until

    def found(self, now: float) -> None:
        """Note that a batch came back small; while this holds already, nothing changes."""
        if not self.holds(now):
            self._wait = min(max(2 * self._wait, FIRST_SECONDS), LAST_SECONDS)
            self._until = now + self._wait
