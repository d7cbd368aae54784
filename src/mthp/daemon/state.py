"""The used memory of a process, sampled in a separate thread while the worker goes on with other processes."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable

from mthp.abilities import heat_of
from mthp.addrspace import AddressSpace
from mthp.errors import MthpError
from mthp.heat import Heat, HeatRequest

FRESH_SECONDS = 300.0
"""Seconds for which heat is valid. A measurement takes some seconds, so it runs for a hundredth of the time."""


class HeatKeeper:
    """The heat of one process.

    Attributes:
        heat: last measurement; None if there is none.
        failed: reason for which the last measurement failed; ``""`` otherwise.
    """

    def __init__(self) -> None:
        self.heat: Heat | None = None
        self.failed = ""
        self._thread: threading.Thread | None = None
        self._at = -math.inf
        self._closed = False

    @property
    def measuring(self) -> bool:
        """Return whether a measurement is running."""
        return self._thread is not None and self._thread.is_alive()

    def is_there(
        self, now: float, request: HeatRequest | None, opened: Callable[[], AddressSpace], stopping: Callable[[], bool]
    ) -> bool:
        """Return whether heat is measured, or unavailable; if not, begin to measure it.

        Args:
            request: the rule's request; None for no heat.
            opened: opens the address space.
            stopping: returns whether to end early.
        """
        if request is None:
            self.heat = None
            return True
        if self.measuring:
            return False
        if self._thread is not None:
            self._thread, self._at = None, now
        if now - self._at < FRESH_SECONDS:
            return True
        self._thread = threading.Thread(
            target=self._measure, args=(request, opened, stopping), name="mthp-heat", daemon=True
        )
        self._thread.start()
        return False

    def _measure(self, request: HeatRequest, opened: Callable[[], AddressSpace], stopping: Callable[[], bool]) -> None:
        self.heat, self.failed = None, ""
        try:
            with opened() as space:
                self.heat = heat_of(space, request, lambda: self._closed or stopping())
        except MthpError as error:
            self.failed = error.message

    def close(self) -> None:
        """End a measurement as soon as possible."""
        self._closed = True
