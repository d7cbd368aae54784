"""Processes that share memory since a fork, and the time for which a target is left alone because of them.

After fork(2), parent and child have the same pages until one of them writes or begins another program. A collapse in
that time copies shared pages for both, and each later write breaks up a folio again, as while Redis saves its data. So
nothing is collapsed in a target while an ancestor or a descendant shares its memory; then everything is scanned again,
broken folios first.

Some processes always have such a child: servers with a process for each connection, pools of workers. So there is one
bound: a target is left alone for :data:`LONGEST_WAIT_SECONDS` at most, for one child or for several that follow each
other with pauses below :data:`PAUSE_SECONDS`. Then a child that stays counts no more; if there are new ones all the
time, one pass is made before the next wait, because each of them breaks up the folios that the target writes to.
max_ptes_shared protects what is still shared: a range with more shared pages fails with EXCEED_SHARED_PTE.

:class:`Lineage` learns of forks of all processes from the kernel's events; :class:`Forks` belongs to one target.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

from mthp.linux.procevents import SharingEvent

LONGEST_WAIT_SECONDS = 600.0
"""Longest time for which a target is left alone. Redis writes some 100 MB a second to its file, so this is 60 GB."""

PAUSE_SECONDS = 10.0
"""Least seconds without a child after which the full wait is possible again: khugepaged's default
scan_sleep_millisecs, because khugepaged would not come by in a shorter pause either.
"""

SHORT_CHILD_SECONDS = 0.25
"""Seconds below which a child, as of system(3), executed another program before anything was copied."""

GENERATIONS = 64
"""Most generations of forks that are followed, so that a long chain of processes does not stop the daemon."""


class Forks:
    """The processes that share the memory of one target. The caller holds the worker's lock, except for `reason`."""

    def __init__(self) -> None:
        self._since: dict[int, float] = {}
        self._waits_since = self._waited_until = -math.inf
        self._over = False

    def began(self, other: int, now: float) -> None:
        """Note that process `other` shares the memory."""
        waits_until = (since + LONGEST_WAIT_SECONDS for since in self._since.values())
        if now - max(self._waited_until, *waits_until, -math.inf) >= PAUSE_SECONDS:
            self._waits_since = now
        self._since[other] = now

    def ended(self, other: int, now: float) -> bool:
        """Note that `other` no longer shares memory; return whether memory must be scanned again because of it.

        A process that shared it before the target was watched counts too, because the duration is unknown.
        """
        since = self._since.pop(other, now - SHORT_CHILD_SECONDS)
        if now - since >= SHORT_CHILD_SECONDS:
            self._over = True
            self._waited_until = max(self._waited_until, min(now, since + LONGEST_WAIT_SECONDS))
        return self._over and not self._recent(now)

    def _recent(self, now: float) -> list[int]:
        """Return the processes that are not yet waited for too long."""
        # A copy, because the main thread notes processes meanwhile.
        return [other for other, since in list(self._since.items()) if now - since < LONGEST_WAIT_SECONDS]

    def _waits(self, now: float) -> bool:
        """Return whether a process is waited for, and not yet for too long."""
        return now - self._waits_since < LONGEST_WAIT_SECONDS and bool(self._recent(now))

    def pass_done(self, now: float) -> None:
        """Note that a pass is complete: where one child follows another, the next wait begins."""
        if self._recent(now):
            self._waits_since = now

    def reason(self, now: float) -> str:
        """Return why nothing may be collapsed now, or an empty text."""
        recent = self._recent(now)
        if not recent or not self._waits(now):
            return ""
        return (
            f"it shares memory with process {recent[-1]} since a fork: nothing is collapsed until one of the two ends"
            f" or executes another program, for {LONGEST_WAIT_SECONDS / 60:.0f} minutes at most"
        )

    def take_over(self, now: float) -> bool:
        """Return whether sharing ended since the last call, so that memory must be scanned again."""
        if self._waits(now):
            return False
        over, self._over = self._over, False
        return over

    def put_back(self, over: bool) -> None:
        """Return from the next call of :meth:`take_over` what this one did, because nothing was scanned."""
        self._over |= over


class Lineage:
    """The processes that were forked, or began another program, since the daemon listens.

    A process that ends or begins another program leaves its ancestors, and its children become those of its parent,
    because they still share the parent's memory: programs that become daemons fork twice.

    Args:
        forks_of: returns the sharing of the target with a PID; None if that process is not a target.
    """

    def __init__(self, forks_of: Callable[[int], Forks | None]) -> None:
        self._forks_of = forks_of
        self._parents: dict[int, int] = {}
        self._children: dict[int, set[int]] = {}
        self._since: dict[int, float] = {}

    def __iter__(self) -> Iterator[int]:
        """Iterate over the processes that are known."""
        return iter(self._parents)

    def take(self, events: Iterable[SharingEvent], now: float) -> set[int]:
        """Apply events; return the targets whose memory must be scanned again."""
        again: set[int] = set()
        for event in events:
            if event.kind == "fork":
                # Its number may be that of a process whose end was lost.
                again |= self._leave(event.pid, 0, now)
                self._put(event.pid, event.parent)
                self._since[event.pid] = now
                for ancestor in self._ancestors(event.pid):
                    if (forks := self._forks_of(ancestor)) is not None:
                        forks.began(event.pid, now)
                continue
            # What happened before the daemon listened is known only by the parent at the end.
            stranger = event.kind == "exit" and event.pid not in self._parents
            again |= self._leave(event.pid, event.parent if stranger else 0, now)
            if event.kind == "exec":
                self._put(event.pid, 0)
        return again

    def sharing(self, pid: int) -> dict[int, float]:
        """Return the processes that share the memory of `pid`, each with the time of the fork."""
        descendants = {other: self._since[other] for other in self._descendants(pid)}
        return dict.fromkeys(self._ancestors(pid), self._since.get(pid, 0.0)) | descendants

    def _leave(self, pid: int, parent: int, now: float) -> set[int]:
        """End all sharing of `pid`, and forget it; return the targets whose memory must be scanned again."""
        again: set[int] = set()
        own = self._forks_of(pid)
        others = {*self._ancestors(pid), *self._descendants(pid), parent} - {0}
        for other in others:
            if (forks := self._forks_of(other)) is not None and forks.ended(pid, now):
                again.add(other)
            if own is not None and own.ended(other, now):
                again.add(pid)
        self._remove(pid)
        return again

    def _put(self, pid: int, parent: int) -> None:
        self._parents[pid] = parent
        if parent:
            self._children.setdefault(parent, set()).add(pid)

    def _remove(self, pid: int) -> None:
        parent = self._parents.pop(pid, 0)
        self._since.pop(pid, None)
        if parent:
            siblings = self._children[parent]
            siblings.discard(pid)
            if not siblings:
                del self._children[parent]
        for child in self._children.pop(pid, ()):
            self._put(child, parent)

    def _ancestors(self, pid: int) -> Iterator[int]:
        for _ in range(GENERATIONS):
            if not (pid := self._parents.get(pid, 0)):
                break
            yield pid

    def _descendants(self, pid: int) -> Iterator[int]:
        generation = [pid]
        for _ in range(GENERATIONS):
            generation = [child for each in generation for child in self._children.get(each, ())]
            yield from generation
