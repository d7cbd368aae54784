"""The children that a target has forked, whose memory is the target's until they begin another program or end.

A collapse in that time copies what parent and child share, for both. What the parent writes to is copied page by page,
which breaks up its folios: so it goes while Redis saves its data. So nothing is collapsed until the last child is gone.
Then all is looked at again, what was broken up first.

A server may have children for good, as PostgreSQL has; they are waited for no longer than `LONGEST_SECONDS`. What is
shared then is left alone by max_ptes_shared as before.
"""

from __future__ import annotations

CHILD = "a child shares its memory since a fork: nothing is collapsed until that ends or begins another program"

LONGEST_SECONDS = 600.0
"""How long a child is waited for: Redis writes some 100 MB a second to its file, so this is 60 GB."""

SHORT_SECONDS = 0.25
"""A child that was there for less, as of system(3), began another program before anything was copied."""


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
        """Note that a child shares nothing any more; return whether memory is to be looked at again because of it.

        A child of before this was watched counts too: nothing is known of how long it was there.
        """
        since = self._children.pop(child, now - SHORT_SECONDS)
        self._over |= now - since >= SHORT_SECONDS
        return self._over and not self.holds(now)

    def holds(self, now: float) -> bool:
        """Return whether nothing may be collapsed now, because a child shares the memory."""
        return any(now - since < LONGEST_SECONDS for since in list(self._children.values()))

    def take_over(self) -> bool:
        """Return whether children ended since the last call, and memory is to be looked at again."""
        over, self._over = self._over, False
        return over
