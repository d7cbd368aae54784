"""Who looks, at whom, and how often: one thread that keeps the rows up to date and within its share of a processor.

It goes round: everybody with the first look; then the largest few with the second, and those on the screen with the
third, those first that were never looked at, then those whose look is oldest. A budget of processor time
(:mod:`mthp.pacing`) holds it back, so a host with more processes is shown later, not at more cost.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from mthp.engine.select import PlanOptions
from mthp.errors import MthpError, TargetVanishedError
from mthp.pacing import CpuBudget
from mthp.top.looks import Stopped, first_look, second_look, third_look
from mthp.top.model import Row

LARGEST = 64
"""Processes that get the second look without being on the screen."""

ROUND = 2.0
"""Seconds between two first looks at least."""

BURST = 1.0
"""Seconds of processor time that are used before the first rest: who has just started it wants to see something."""

REST = 0.1
"""Seconds for which it rests when all that is wanted is fresh."""

LISTING = 0.25
"""The part of what looking may take that first looks may take."""

FRESH = 10.0
"""Seconds for which a second or third look counts as new."""


class Source(Protocol):
    """Where rows come from."""

    def rows(self) -> Sequence[Row]:
        """What is known now. Takes no time."""

    def show(self, keys: Sequence[int]) -> None:
        """These rows are on the screen now, the most interesting first."""

    def refresh(self, key: int) -> None:
        """Look again at this one soon: it has changed."""

    def close(self) -> None:
        """Look no more."""


@dataclass(slots=True)
class _Known:
    row: Row
    second: float = float("-inf")
    third: float = float("-inf")


class Survey:
    """The live processes of this machine.

    Args:
        cpu: share of one processor that looking may take, above 0, up to 1.
        first, second, third: the looks.
        clock, spent, rest: the time, the processor time of the thread, and how to wait; for tests.
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
        """List everybody once, then go on in a thread."""
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
        """Do the next piece of work: False if everything that is wanted is fresh."""
        if self._clock() - self._listed >= self._round:
            self.list_all()
            return True
        if (known := self._next_second()) is not None:
            return self._look(known, "second", self._second)
        if (known := self._next_third()) is not None:
            return self._look(known, "third", lambda row: self._third(row, self._options, self._closing.is_set))
        return False

    def list_all(self) -> None:
        """The first look at everybody; who is gone is forgotten, and what is known of the others is kept."""
        before = self._spent()
        found = {row.key: row for row in self._first()}
        # With thousands of processes this alone would take all that may be taken.
        self._round = max(ROUND, (self._spent() - before) / (LISTING * self._cpu))
        with self._lock:
            for key in self._known.keys() - found.keys():
                del self._known[key]
            for key, row in found.items():
                known = self._known.get(key)
                if known is None or known.row.name != row.name:
                    # New, or a new program, or a new process under an old number.
                    self._known[key] = _Known(row)
            self._listed = self._clock()

    def _next_second(self) -> _Known | None:
        with self._lock:
            largest = sorted(self._known.values(), key=lambda known: -known.row.anonymous)[:LARGEST]
            wanted = [self._known[key] for key in self._shown if key in self._known] + largest
        return self._stale(wanted, "second", lambda known: not known.row.planned)

    def _next_third(self) -> _Known | None:
        with self._lock:
            wanted = [self._known[key] for key in self._shown if key in self._known]
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
        except Stopped:
            return False
        except MthpError as error:
            row = known.row
            row = Row(row.key, row.name, row.resident, row.anonymous, trouble=error.message)
        with self._lock:
            known.row = row
            setattr(known, which, self._clock())
        return True
