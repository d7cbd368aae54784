"""Counters of the daemon's work, of all processes together, of each target and of each service; and the event log.

The log has one JSON object a line, appended. A full disk stops nothing: lost events are counted, the operator is warned
once, and when writing works again a line has their number.
"""

from __future__ import annotations

import bisect
import datetime
import errno
import json
import os
import stat
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from mthp.errors import UsageError
from mthp.geometry import Geometry
from mthp.metrics import Durations
from mthp.results import ScanResult

PAUSE_BUCKETS = (50e-6, 100e-6, 250e-6, 500e-6, 1e-3, 2.5e-3, 5e-3, 10e-3, 25e-3, 50e-3, 100e-3)
"""Upper bounds of the pause histogram, in seconds."""

RECENT_PAUSES = 1024
"""Latest pauses that are kept for percentiles."""


MOST_SERVICES = 256
"""Services that are counted by name: each is a label of metrics, and a process may take any number of names."""

OTHERS = "others"
"""The name of all services beyond :data:`MOST_SERVICES`, for each rule."""


class Pauses:
    """Durations for which threads were stopped, or calls kept memory busy: a histogram, and percentiles of the last."""

    def __init__(self) -> None:
        self.buckets = [0] * (len(PAUSE_BUCKETS) + 1)
        self.total_ns = 0
        self.max_ns = 0
        self._recent: deque[int] = deque(maxlen=RECENT_PAUSES)

    def add(self, pauses_ns: Iterable[int]) -> None:
        """Add pauses, in nanoseconds."""
        for pause in pauses_ns:
            # A bound belongs to its bucket, as Prometheus defines it (`le`).
            self.buckets[bisect.bisect_left(PAUSE_BUCKETS, pause / 1e9)] += 1
            self.total_ns += pause
            self.max_ns = max(self.max_ns, pause)
            self._recent.append(pause)

    @property
    def count(self) -> int:
        """The number of pauses."""
        return sum(self.buckets)

    @property
    def durations(self) -> Durations:
        """Their durations; p50 and p99 are of the last 1024."""
        recent = Durations.of(np.array(self._recent, np.float64) / 1e9)
        return replace(recent, count=self.count, max=self.max_ns / 1e9, total=self.total_ns / 1e9)


@dataclass
class WorkCounters:
    """Work done.

    Attributes:
        collapsed: folios made, by order.
        failed: attempts that failed, by scan result.
        ranges: PMD ranges scanned, by scan result.
        scanned_ptes: PTEs scanned.
        copied_bytes, bloat_bytes: copied by collapses, and added by filling holes.
        trimmed_bytes: given back out of large folios.
        passes: passes through processes.
        looks: cheap checks of processes for changes.
        skipped: PMD ranges not scanned, because they had not changed since they were finished.
        stopped: pauses in which all threads of a process were stopped.
        called: calls of the kernel, in which its memory may have been busy.
    """

    JSON: ClassVar = (
        "collapses=collapsed_by_size collapsed_bytes collapse_failures=failed scanned_ranges=ranges scanned_ptes"
        " copied_bytes bloat_bytes trimmed_bytes passes looks skipped_ranges=skipped pauses=stopped.durations"
        " calls=called.durations"
    )

    collapsed: Counter[int] = field(default_factory=Counter)
    failed: Counter[ScanResult] = field(default_factory=Counter)
    ranges: Counter[ScanResult] = field(default_factory=Counter)
    scanned_ptes: int = 0
    copied_bytes: int = 0
    bloat_bytes: int = 0
    trimmed_bytes: int = 0
    passes: int = 0
    looks: int = 0
    skipped: int = 0
    stopped: Pauses = field(default_factory=Pauses)
    called: Pauses = field(default_factory=Pauses)

    def add(self, other: WorkCounters) -> None:
        """Add other work; its pauses and calls are added apart, one by one."""
        for each in fields(self):
            mine, theirs = getattr(self, each.name), getattr(other, each.name)
            if isinstance(mine, Counter):
                mine.update(theirs)
            elif isinstance(mine, int):
                setattr(self, each.name, mine + theirs)

    def collapsed_bytes(self, geometry: Geometry) -> int:
        """Return the bytes in the folios that were made."""
        # A copy, because other threads read while the worker counts.
        return sum(count * geometry.size_of(order) for order, count in dict(self.collapsed).items())

    def collapsed_by_size(self, geometry: Geometry) -> dict[str, int]:
        """Return how many folios were made, by size, the smallest first."""
        return {geometry.label(order): count for order, count in sorted(dict(self.collapsed).items())}


@dataclass
class ServiceCounters:
    """Work done in the processes of one service under one rule, also in those that have ended.

    Attributes:
        collapsed_bytes: in folios that were made.
        bloat_bytes, trimmed_bytes: as in :class:`WorkCounters`.
    """

    rule: str
    service: str
    collapsed_bytes: int = 0
    bloat_bytes: int = 0
    trimmed_bytes: int = 0


@dataclass
class RuleCounters:
    """Work done under one rule, by order."""

    collapsed: Counter[int] = field(default_factory=Counter)
    failed: Counter[int] = field(default_factory=Counter)
    bloat_bytes: Counter[int] = field(default_factory=Counter)


class Services:
    """The counters of all services and rules; a thread may read them while another counts.

    Attributes:
        rules: counters by the name of the rule.
    """

    def __init__(self) -> None:
        self._counters: dict[tuple[str, str], ServiceCounters] = {}
        self.rules: dict[str, RuleCounters] = {}

    def of(self, rule: str, service: str) -> ServiceCounters:
        """Return the counters of a service, or those of all others of its rule if too many have their own."""
        if (rule, service) not in self._counters and len(self._counters) >= MOST_SERVICES:
            service = OTHERS
        return self._counters.setdefault((rule, service), ServiceCounters(rule, service))

    def all(self) -> list[ServiceCounters]:
        """Return all counters."""
        return list(self._counters.values())


class EventLog:
    """Appends events to a file.

    Args:
        say: prints a line when events are lost, and when writing works again.

    Attributes:
        lost: events lost since the last one that was written.

    Raises:
        UsageError: the file cannot be opened.
    """

    def __init__(self, path: Path, say: Callable[[str], None]) -> None:
        self.path = path
        self.lost = 0
        self._say = say
        self._turn = threading.Lock()
        self._cut = False
        try:
            self._fd = _open(path)
        except OSError as error:
            raise UsageError(f"event log {path}: {error.strerror}", help="use a file that can be written") from error

    def write(self, event: str, **values: Any) -> None:
        """Append one event. Never fails."""
        with self._turn:
            # A line that a full disk cut short is ended first, so that readers can skip it.
            text = b"\n" if self._cut else b""
            if self.lost:
                text += _line("lost", {"count": self.lost})
            text += _line(event, values)
            try:
                written = os.write(self._fd, text)
            except OSError as error:
                self._missed(error.strerror or str(error))
                return
            if written < len(text):
                self._cut = True
                self._missed("the disk is full")
                return
            self._cut = False
            if self.lost:
                self._say(f"event log {self.path}: written again; {self.lost} events are missing")
            self.lost = 0

    def _missed(self, reason: str) -> None:
        if not self.lost:
            self._say(f"event log {self.path}: {reason}; events are lost")
        self.lost += 1

    def reopen(self) -> None:
        """Open the file again, because logrotate may have moved it away."""
        with self._turn:
            try:
                fd = _open(self.path)
            except OSError as error:
                self._say(f"event log {self.path}: {error.strerror}; events go to the old file")
                return
            os.close(self._fd)
            self._fd = fd

    def close(self) -> None:
        """Close the file."""
        with self._turn:
            os.close(self._fd)
            self._fd = -1


def _open(path: Path) -> int:
    # O_NONBLOCK, because a pipe without a reader would block the daemon.
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK
    # The daemon has all rights, and other users may write to the directory. So links are followed only if they belong
    # to the daemon's user or to root, and a file with several names is not written to.
    try:
        fd = os.open(path, flags | os.O_NOFOLLOW, 0o640)
    except OSError as error:
        if error.errno != errno.ELOOP or path.lstat().st_uid not in (0, os.geteuid()):
            raise
        fd = os.open(path, flags, 0o640)
    status = os.fstat(fd)
    if stat.S_ISREG(status.st_mode) and status.st_nlink > 1:
        os.close(fd)
        raise OSError(errno.EMLINK, "it has several names, and one may belong to another user")
    return fd


def _line(event: str, values: dict[str, Any]) -> bytes:
    time = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
    return json.dumps({"time": time, "event": event} | values).encode() + b"\n"
