"""A forecast of a long duration, in one line on standard error, also where no progress bar is shown."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import click


class Forecast:
    """Prints the remaining time on standard error, once, if it is long.

    Args:
        what: subject of the sentence.
        end: effect of Ctrl-C.
    """

    AFTER = 2.0
    """Seconds of work before the estimate."""

    LONG = 30.0
    """Seconds that are long enough for a line."""

    def __init__(self, what: str, end: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._what, self._end, self._clock = what, end, clock
        self._begin = clock()
        self._due = self._begin + self.AFTER

    def __call__(self, done: float, total: float) -> None:
        """Note that `done` of `total` are done, and print the forecast when it is due."""
        if (now := self._clock()) < self._due or done <= 0:
            return
        self._due = math.inf
        rest = (now - self._begin) * (total - done) / done
        if rest >= self.LONG:
            click.echo(f"mthp: {self._what} takes about {about(rest)} more; {self._end}", err=True)


def about(seconds: float) -> str:
    """Return a long time in its largest unit: ``"40 s"``, ``"12 min"``, ``"3 h"``, ``"20 days"``."""
    for unit, name in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:,.0f} {name}"
    return f"{seconds:.0f} s"
