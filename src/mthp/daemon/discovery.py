"""From changes of processes to targets: what is new is let settle, looked into, matched against the rules.

A process that was just forked is about to become another program, and most are gone a moment later. So it is left alone
for a while first (:class:`Nursery`); who ends meanwhile was never looked into. What is found out of a process is only
what some rule asks for, and only so many are looked into at a time, so that a storm of new processes delays others and
never the daemon.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterable

from mthp.daemon.rules import ProcessFacts
from mthp.linux import abi
from mthp.linux.process import ProcStat
from mthp.pacing import Clock

AT_A_TIME = 128
"""Processes looked into between two looks at the other things that the daemon does."""

SETTLE_SHARE = 0.4
"""The part of the time in which a process is to be noticed that it is left alone for."""


class Nursery:
    """New processes, until it is time to look into them.

    Args:
        settle: seconds for which each is left alone.
    """

    def __init__(self, settle: float, clock: Clock = time.monotonic) -> None:
        self.settle = settle
        self._clock = clock
        self._due: dict[int, float] = {}
        self._queue: deque[tuple[float, int]] = deque()

    def add(self, pids: Iterable[int], *, at_once: bool = False) -> None:
        """Look into these when they have settled; who is here already waits anew, since it has changed."""
        due = self._clock() + (0 if at_once else self.settle)
        for pid in pids:
            self._due[pid] = due
            self._queue.append((due, pid))

    def drop(self, pids: Iterable[int]) -> None:
        """These are gone."""
        for pid in pids:
            self._due.pop(pid, None)

    def next_due(self) -> float | None:
        """When there is somebody to look into; None if nobody waits."""
        while self._queue and self._due.get(self._queue[0][1]) != self._queue[0][0]:
            self._queue.popleft()
        return self._queue[0][0] if self._queue else None

    def take(self, limit: int = AT_A_TIME) -> list[int]:
        """Those that have settled, `limit` at most."""
        taken: list[int] = []
        now = self._clock()
        while len(taken) < limit and (due := self.next_due()) is not None and due <= now:
            _, pid = self._queue.popleft()
            del self._due[pid]
            taken.append(pid)
        return taken

    def __len__(self) -> int:
        return len(self._due)


def read_facts(pid: int, properties: frozenset[str], proc: str = "/proc") -> ProcessFacts | None:
    """What is known of a process; None if it is gone, a zombie or a kernel thread.

    Args:
        properties: what has to be found out besides the name: ``uid``, ``exe``, ``cgroup``.
    """
    directory = f"{proc}/{pid}"
    try:
        with open(f"{directory}/stat", "rb") as file:
            text = file.read()
        stat = ProcStat.parse(text)
        if stat.flags & abi.PF_KTHREAD or stat.state in "ZX":
            return None
        comm = text[text.index(b"(") + 1 : text.rindex(b")")].decode(errors="replace")
        return ProcessFacts(
            pid,
            stat.starttime,
            uid=_uid(directory) if "uid" in properties else -1,
            comm=comm,
            exe=_exe(directory) if "exe" in properties else "",
            cgroup=_cgroup(directory) if "cgroup" in properties else "",
        )
    except (OSError, ValueError, IndexError):
        return None


def _uid(directory: str) -> int:
    with open(f"{directory}/status", "rb") as file:
        for line in file:
            if line.startswith(b"Uid:"):
                return int(line.split()[1])
    return -1


def _exe(directory: str) -> str:
    try:
        return os.readlink(f"{directory}/exe").removesuffix(" (deleted)")  # noqa: PTH115
    except OSError:
        return ""


def _cgroup(directory: str) -> str:
    with open(f"{directory}/cgroup", errors="replace", newline="\n") as file:
        for line in file:
            if line.startswith("0::"):
                return line[3:].removesuffix("\n")
    return ""
