"""Memory cgroups of the simulated machine."""

from __future__ import annotations

import sys

import numpy as np
from numpy.typing import NDArray

from mthp.errors import UsageError

ROOT = 0
"""Number of the root memory cgroup, which charges nothing and has no limit."""


class Cgroups:
    """A tree of memory cgroups, identified by number, with the frames charged to each, and limits.

    A charge to a cgroup is a charge to all its ancestors too, and each of them may be at its limit.

    Attributes:
        usage: int64, shape (groups,): frames charged to the cgroup and its descendants; always 0 for ROOT.
    """

    def __init__(self) -> None:
        self.usage: NDArray[np.int64] = np.zeros(1, np.int64)
        self._limits: list[int | None] = [None]
        self._parents: list[int] = [ROOT]

    def create(self, limit: int | None = None, parent: int = ROOT) -> int:
        """Create a cgroup; return its number.

        Args:
            limit: frames that may be charged to it (``memory.max``); None for no limit.
            parent: number of its parent.

        Raises:
            UsageError: the limit is below 0, or the parent does not exist.
        """
        if not 0 <= parent < len(self._parents):
            raise UsageError(f"memory cgroup {parent} does not exist")
        self.usage = np.append(self.usage, np.int64(0))
        self._limits.append(None)
        self._parents.append(parent)
        self.set_limit(len(self._limits) - 1, limit)
        return len(self._limits) - 1

    def set_limit(self, cgroup: int, limit: int | None) -> None:
        """Change a limit; existing charges stay.

        Raises:
            UsageError: the limit is below 0, or the cgroup is the root.
        """
        # memory.max does not exist in the root cgroup (cgroup-v2.rst).
        if limit is not None and (limit < 0 or cgroup == ROOT):
            raise UsageError(f"{limit} frames cannot be the limit of memory cgroup {cgroup}")
        self._limits[cgroup] = limit

    def lineage(self, cgroup: int) -> list[int]:
        """Return a cgroup and its ancestors, without the root."""
        found = []
        while cgroup != ROOT:
            found.append(cgroup)
            cgroup = self._parents[cgroup]
        return found

    def below(self, cgroup: int) -> NDArray[np.bool_]:
        """Return a mask of the cgroup and its descendants: bool, shape (groups,)."""
        return np.array([cgroup in (ROOT, *self.lineage(number)) for number in range(len(self._parents))])

    def room(self, cgroup: int) -> int:
        """Return the frames that can be charged to a cgroup before it, or an ancestor, reaches its limit."""
        return self._room(cgroup)[0]

    def full(self, cgroup: int, frames: int) -> int | None:
        """Return the cgroup or ancestor that has no room for `frames` frames; None if all have."""
        room, narrowest = self._room(cgroup)
        return narrowest if frames > room else None

    def _room(self, cgroup: int) -> tuple[int, int]:
        rooms = [
            (max(limit - int(self.usage[group]), 0), group)
            for group in self.lineage(cgroup)
            if (limit := self._limits[group]) is not None
        ]
        # A charge counts against every ancestor, so the narrowest of them decides.
        return min(rooms, default=(sys.maxsize, ROOT))

    def try_charge(self, cgroup: int, frames: int) -> bool:
        """Charge `frames` frames, unless that would exceed a limit; return whether they were charged."""
        if cgroup == ROOT:
            return True
        if frames > self.room(cgroup):
            return False
        self.usage[self.lineage(cgroup)] += frames
        return True

    def uncharge(self, cgroups: NDArray[np.uint16], frames: int = 1) -> None:
        """Uncharge folios.

        Args:
            cgroups: uint16, shape (folios,): cgroup of each.
            frames: size of each folio.
        """
        # Without cgroups there is nothing to subtract, and this is called for every page that is freed.
        if len(self.usage) == 1:
            return
        gone = np.bincount(cgroups, minlength=len(self.usage)) * frames
        # A parent has a lower number than its children: from the highest down, each adds its loss to its parent's.
        for number in range(len(gone) - 1, ROOT, -1):
            gone[self._parents[number]] += gone[number]
        gone[ROOT] = 0
        self.usage -= gone
