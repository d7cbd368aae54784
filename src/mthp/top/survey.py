"""The schedule of looks: one thread keeps the rows up to date within its share of a processor.

The thread repeats: the first look at all processes; then the second at the largest and the third at those on the
screen, first those without one, then those with the oldest. A budget of processor time (:mod:`mthp.pacing`) limits it,
so more processes take more time, not more of a processor.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from mthp.addrspace import AddressSpace
from mthp.engine.select import PlanOptions
from mthp.errors import MthpError, TargetVanishedError
from mthp.geometry import Geometry
from mthp.pacing import CpuBudget
from mthp.top.looks import NotWantedError, first_look, second_look, third_look
from mthp.top.model import Row

LARGEST = 64
"""Processes that get the second look without being on the screen."""

ROUND = 2.0
"""Least seconds between two first looks."""

BURST = 1.0
"""Seconds of processor time used before the first rest, so that a new screen fills quickly."""

REST = 0.1
"""Seconds of rest when every wanted look is fresh."""

LISTING = 0.25
"""The part of the processor time that first looks may take."""

FRESH = 10.0
"""Seconds for which a second or third look counts as fresh."""


class RowSource(Protocol):
    """A source of rows."""

    def rows(self) -> Sequence[Row]:
        """Return the rows that are known now, without waiting."""

    def show(self, keys: Sequence[int]) -> None:
        """Note that these rows are on the screen now, the most interesting first."""

    def refresh(self, key: int) -> None:
        """Read this row again soon, because it has changed."""

    def close(self) -> None:
        """Stop reading."""


Opened = Callable[[int], AddressSpace]
DaemonStatus = Callable[[], Mapping[str, Any] | None]


@dataclass(frozen=True, slots=True)
class View:
    """Input of the screen.

    Attributes:
        title: title of the screen.
        source: source of the rows.
        geometry: geometry of the machine.
        options: options of plans and collapses.
        opened: opens a process by its PID, to collapse it; None where nothing can be collapsed.
        status: requests the daemon's status; returns None if there is no daemon.
        switches: the system's switches, in words.
    """

    title: str
    source: RowSource
    geometry: Geometry
    options: PlanOptions
    opened: Opened | None = None
    status: DaemonStatus = lambda: None
    switches: str = ""


@dataclass(slots=True)
class _Known:
    row: Row
    second: float = float("-inf")
    third: float = float("-inf")


class Survey:
    """The live processes of this machine.

    Args:
        cpu: share of one processor that looks may take, above 0, up to 1.
        first, second, third: the looks.
        clock, spent: the time, and the processor time of the thread, in seconds; for tests.
    """

    def __init__(
        self,
        options: PlanOptions,
        cpu: float = 0.1,
        *,
        first: Callable[[], Iterable[Row]] = first_look,
        second: Callable[[Row], Row] = second_look,
        third: Callable[[Row, PlanOptions, Callable[[], bool]], Row] = third_look,
        clock: Callable[[], float] = time.monotonic,
        spent: Callable[[], float] = time.thread_time,
    ) -> None:
        self._options, self._cpu = options, cpu
        self._first, self._second, self._third = first, second, third
        self._clock, self._spent = clock, spent
        self._known: dict[int, _Known] = {}
        self._shown: Sequence[int] = ()
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._listed = float("-inf")
        self._round = ROUND
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """List all processes once, then go on in a thread."""
        self.list_all()
        self._thread = threading.Thread(target=self._run, name="mthp-survey", daemon=True)
        self._thread.start()

    def rows(self) -> Sequence[Row]:
        with self._lock:
            return [known.row for known in self._known.values()]

    def show(self, keys: Sequence[int]) -> None:
        with self._lock:
            self._shown = tuple(keys)

    def refresh(self, key: int) -> None:
        with self._lock:
            if known := self._known.get(key):
                known.second = known.third = float("-inf")

    def close(self) -> None:
        self._closing.set()
        if self._thread is not None:
            self._thread.join(timeout=5)

    def _run(self) -> None:
        budget = CpuBudget(self._cpu, self._clock, self._spent, BURST)
        while not self._closing.is_set():
            if pause := budget.wait():
                self._closing.wait(pause)
            elif not self.work():
                self._closing.wait(REST)

    def work(self) -> bool:
        """Do the next piece of work. Return False if every wanted look is fresh."""
        # The cheapest first: later looks need the rows of earlier ones.
        if self._clock() - self._listed >= self._round:
            self.list_all()
            return True
        if (known := self._next_second()) is not None:
            return self._look(known, "second", self._second)
        if (known := self._next_third()) is not None:
            return self._look(known, "third", lambda row: self._third(row, self._options, self._closing.is_set))
        return False

    def list_all(self) -> None:
        """Take the first look at all processes: forget those that are gone, keep known values of the others."""
        before = self._spent()
        found = {row.key: row for row in self._first()}
        # With thousands of processes, first looks alone would use the whole share, so they become rarer.
        self._round = max(ROUND, (self._spent() - before) / (LISTING * self._cpu))
        with self._lock:
            for key in self._known.keys() - found.keys():
                # It has exited, and another process may get its PID.
                del self._known[key]
            for key, row in found.items():
                known = self._known.get(key)
                if known is None or known.row.name != row.name:
                    # A new process, a new program, or a new process under a reused PID.
                    self._known[key] = _Known(row)
            self._listed = self._clock()

    def _next_second(self) -> _Known | None:
        with self._lock:
            largest = sorted(self._known.values(), key=lambda known: -known.row.anonymous)[:LARGEST]
            wanted = [self._known[key] for key in self._shown if key in self._known] + largest
        # A plan has these values, too.
        return self._stale(wanted, "second", lambda known: not known.row.planned)

    def _next_third(self) -> _Known | None:
        with self._lock:
            wanted = [self._known[key] for key in self._shown if key in self._known]
        # A second look clears the error if the process can be read by now.
        return self._stale(wanted, "third", lambda known: not known.row.trouble)

    def _stale(self, wanted: Iterable[_Known], which: str, fit: Callable[[_Known], bool]) -> _Known | None:
        old = [known for known in wanted if fit(known) and self._clock() - getattr(known, which) > FRESH]
        return min(old, key=lambda known: float(getattr(known, which)), default=None)

    def _look(self, known: _Known, which: str, look: Callable[[Row], Row]) -> bool:
        key = known.row.key
        try:
            row = look(known.row)
        except TargetVanishedError:
            with self._lock:
                self._known.pop(key, None)
            return True
        except NotWantedError:
            return False
        except MthpError as error:
            row = known.row
            # Without the values of earlier looks, which hold no longer.
            row = Row(row.key, row.name, row.resident, row.anonymous, trouble=error.message)
        with self._lock:
            known.row = row
            setattr(known, which, self._clock())
        return True
