"""The mappings of one target as rows: of a process, looked at again and again; of a file, at a chosen step."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from mthp.addrspace import AddressSpace
from mthp.engine.select import PlanOptions
from mthp.errors import MthpError
from mthp.ptes import Segment
from mthp.top.looks import Stopped, mappings
from mthp.top.model import Row

REST = 1.0
"""Seconds between two looks at a process at least."""


class Mapped:
    """The mappings of a target.

    Args:
        opened: opens the target at a step; the step is None if it has none.
        cpu: share of one processor that looking again may take.
        steps: for a recording, the seconds of each step.
        live: look again and again.

    Attributes:
        steps: as given.
        step: the step that is shown, or is about to be.
        trouble: why there is nothing to see, or ``""``.
        label: of the target, once it was looked at.
    """

    def __init__(
        self,
        opened: Callable[[int | None], AddressSpace],
        options: PlanOptions,
        *,
        cpu: float = 0.1,
        steps: Sequence[float] = (),
        live: bool = False,
    ) -> None:
        self._opened, self._options, self._cpu, self._live = opened, options, cpu, live
        self.steps = tuple(steps)
        self.step = 0
        self.trouble = ""
        self.label = ""
        self._rows: Sequence[Row] = ()
        self._ranges: Sequence[Segment] = ()
        self._shown: int | None = None
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Look once, then go on in a thread."""
        self.look()
        self._thread = threading.Thread(target=self._run, name="mthp-mappings", daemon=True)
        self._thread.start()

    def rows(self) -> Sequence[Row]:
        with self._lock:
            return self._rows

    def range_of(self, key: int) -> Segment:
        """The addresses of the mapping that begins at `key`, as it was last seen; an empty range if it is gone."""
        return next(((start, end) for start, end in self._ranges if start == key), (key, key))

    def show(self, keys: Sequence[int]) -> None:
        """All mappings are looked at together; nothing depends on which are on the screen."""

    def refresh(self, key: int) -> None:
        self._shown = None
        self._wake.set()

    def go(self, step: int) -> None:
        """Show another step of a recording, the nearest that there is."""
        self.step = max(0, min(step, len(self.steps) - 1))
        self._wake.set()

    @property
    def arrived(self) -> bool:
        """Whether the rows are those of `step`."""
        return self._shown == self.step

    def close(self) -> None:
        self._closing.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join(timeout=5)

    def look(self) -> None:
        """Look at the target at the step that is chosen now."""
        step = self.step
        try:
            with self._opened(step if self.steps else None) as space:
                label, rows = space.label, mappings(space, self._options, self._moved_on(step))
                ranges = space.mapped()
        except Stopped:
            return
        except MthpError as error:
            # The rows of the last look stay: they are what is known of one that has exited.
            self.trouble = error.message
            self._shown = step
            return
        with self._lock:
            self._rows, self._ranges, self.label, self.trouble, self._shown = rows, ranges, label, "", step

    def _moved_on(self, step: int) -> Callable[[], bool]:
        return lambda: self._closing.is_set() or self.step != step

    def _run(self) -> None:
        pause = REST
        while not self._closing.is_set():
            self._wake.wait(pause if self._live and not self.trouble else None)
            self._wake.clear()
            if self._closing.is_set():
                return
            if self._live or not self.arrived:
                before = time.thread_time()
                self.look()
                pause = max(REST, (time.thread_time() - before) / self._cpu)
