"""The main thread's loop: it waits for the first of files to read, timers and a given moment."""

from __future__ import annotations

import selectors
import time
from collections.abc import Callable


class Loop:
    """Files and timers, with the function to call for each.

    Attributes:
        selector: the data of a registration is a function that is called with the events.
    """

    def __init__(self) -> None:
        self.selector = selectors.DefaultSelector()
        self._timers: dict[str, tuple[float, Callable[[], None]]] = {}

    def after(self, name: str, seconds: float, act: Callable[[], None]) -> None:
        """Call `act` once after `seconds`, in place of an earlier timer with that name."""
        self._timers[name] = time.monotonic() + seconds, act

    def every(self, name: str, seconds: float, act: Callable[[], None]) -> None:
        """Call `act` repeatedly, every `seconds`."""

        def again() -> None:
            self.after(name, seconds, again)
            act()

        self.after(name, seconds, again)

    def once(self, due: float | None = None) -> None:
        """Wait for the first event, `due` at the latest (of the monotonic clock), and handle all pending ones."""
        moments = [at for at, _ in self._timers.values()]
        if due is not None:
            moments.append(due)
        timeout = max(min(moments) - time.monotonic(), 0) if moments else None
        for key, events in self.selector.select(timeout):
            key.data(events)
        now = time.monotonic()
        # A copy, because actions start timers.
        for name, timer in list(self._timers.items()):
            at, act = timer
            # Unless an earlier action has put another timer in its place.
            if at <= now and self._timers.get(name) is timer:
                del self._timers[name]
                act()

    def close(self) -> None:
        """Close the selector; registered files stay open."""
        self.selector.close()
