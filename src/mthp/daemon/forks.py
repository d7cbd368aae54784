"""The children that a target has forked, which share its memory until they execute another program or exit.

A collapse in that time copies pages that parent and child share, for both. When the parent writes, copy-on-write breaks
up its folios page by page, as while Redis saves its data. So nothing is collapsed until the last child is gone. Then
everything is scanned again, broken folios first.
"""

from __future__ import annotations

CHILD = "a child shares its memory since a fork: nothing is collapsed until that ends or begins another program"

LONGEST_SECONDS = 600.0
"""Longest wait for a child, because a server may have permanent ones (PostgreSQL): Redis writes some 100 MB a second to
its file, so this is 60 GB. Pages that are still shared then are left alone by max_ptes_shared as before.
"""

SHORT_SECONDS = 0.25
"""Seconds below which a child, as of system(3), executed another program before anything was copied."""


class Forks:
    """The children of one target. The caller of each method but :meth:`holds` holds the worker's lock.

    Attributes:
        count: forks seen.
    """

    def __init__(self) -> None:
        self.count = 0
        self._children: dict[int, float] = {}
        self._over = False

    def began(self, child: int, now: float) -> None:
        """Note a child."""
        self.count += 1
        self._children[child] = now

    def ended(self, child: int, now: float) -> bool:
        """Note that a child no longer shares memory; return whether memory must be scanned again because of it.

        A child from before the target was watched counts too, because the duration of its sharing is unknown.
        """
        since = self._children.pop(child, now - SHORT_SECONDS)
        self._over |= now - since >= SHORT_SECONDS
        return self._over and not self.holds(now)

    def holds(self, now: float) -> bool:
        """Return whether a child shares the memory, so that nothing may be collapsed now."""
        return any(now - since < LONGEST_SECONDS for since in list(self._children.values()))

    def take_over(self) -> bool:
        """Return whether children ended since the last call, so that memory must be scanned again."""
        over, self._over = self._over, False
        return over
