"""Memory cgroups of the simulated machine."""

from __future__ import annotations

import sys

import numpy as np
from numpy.typing import NDArray

from mthp.errors import UsageError

ROOT = 0
"""Number of the root memory cgroup, which charges nothing and has no limit."""


class Cgroups:
    """Memory cgroups, by number: a tree of them, the frames charged to each, and limits.

    What is charged to a cgroup is charged to those above it, too, and every one of them may be at its limit.

    Attributes:
        usage: int64, shape (groups,): frames charged to the cgroup and to those below it; always 0 for ROOT.
    """

    def __init__(self) -> None:
        self.usage: NDArray[np.int64] = np.zeros(1, np.int64)
        self._limits: list[int | None] = [None]
        self._parents: list[int] = [ROOT]

    def create(self, limit: int | None = None, parent: int = ROOT) -> int:
        """A new cgroup's number.

        Args:
            limit: frames that may be charged to it (``memory.max``); None for any number.
            parent: the cgroup that it lies in.

        Raises:
            UsageError: a limit below 0, or a parent that does not exist.
        """
        if not 0 <= parent < len(self._parents):
            raise UsageError(f"there is no memory cgroup {parent}")
        self.usage = np.append(self.usage, np.int64(0))
        self._limits.append(None)
        self._parents.append(parent)
        self.set_limit(len(self._limits) - 1, limit)
        return len(self._limits) - 1

    def set_limit(self, cgroup: int, limit: int | None) -> None:
        """Change a limit; what is charged already stays.

        Raises:
            UsageError: a limit below 0, or for the root.
        """
        if limit is not None and (limit < 0 or cgroup == ROOT):
            raise UsageError(f"{limit} frames cannot be the limit of memory cgroup {cgroup}")
        self._limits[cgroup] = limit

    def lineage(self, cgroup: int) -> list[int]:
        """A cgroup and all above it, without the root."""
        found = []
        while cgroup != ROOT:
            found.append(cgroup)
            cgroup = self._parents[cgroup]
        return found

    def below(self, cgroup: int) -> NDArray[np.bool_]:
        """Which cgroups are this one or lie in it: bool, shape (groups,)."""
        return np.array([cgroup in (ROOT, *self.lineage(number)) for number in range(len(self._parents))])

    def room(self, cgroup: int) -> int:
        """Frames that can be charged to a cgroup before it, or one above it, is at its limit."""
        return self._room(cgroup)[0]

    def full(self, cgroup: int, frames: int) -> int | None:
        """The cgroup, this one or one above it, that has no room for so many frames; None if all have."""
        room, narrowest = self._room(cgroup)
        return narrowest if frames > room else None

    def _room(self, cgroup: int) -> tuple[int, int]:
        rooms = [
            (max(limit - int(self.usage[group]), 0), group)
            for group in self.lineage(cgroup)
            if (limit := self._limits[group]) is not None
        ]
        return min(rooms, default=(sys.maxsize, ROOT))

    def try_charge(self, cgroup: int, frames: int) -> bool:
        """Charge so many frames, unless that would exceed a limit."""
        if frames > self.room(cgroup):
            return False
        self.usage[self.lineage(cgroup)] += frames
        return True

    def uncharge(self, cgroups: NDArray[np.uint16], frames: int = 1) -> None:
        """Take the charge of folios back.

        Args:
            cgroups: uint16, shape (folios,): the cgroup of each.
            frames: of each.
        """
        if len(self.usage) == 1:
            return
        gone = np.bincount(cgroups, minlength=len(self.usage)) * frames
        # A parent is older than its children: from the youngest up, each hands on what it lost.
        for number in range(len(gone) - 1, ROOT, -1):
            gone[self._parents[number]] += gone[number]
        gone[ROOT] = 0
        self.usage -= gone
