"""The mappings of one target as rows: of a process, read repeatedly; of a file, at a chosen step."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from mthp.addrspace import AddressSpace
from mthp.engine.select import PlanOptions
from mthp.errors import MthpError
from mthp.ptes import Segment
from mthp.top.looks import NotWantedError, mappings
from mthp.top.model import Row

REST = 1.0
"""Least seconds between two looks at a process."""


class Mapped:
    """The mappings of a target.

    Args:
        opened: opens the target at a step; the step is None if it has none.
        cpu: share of one processor that repeated looks may take.
        steps: the seconds of each step of a recording.
        live: read the target repeatedly.

    Attributes:
        steps: as in the arguments.
        step: the step that is shown, or that will be next.
        trouble: the reason for which there are no rows, or ``""``.
        label: label of the target, ``""`` until it was read.
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
        """Read the target once, then go on in a thread."""
        # In the caller's thread, so that the first screen has rows.
        self.look()
        self._thread = threading.Thread(target=self._run, name="mthp-mappings", daemon=True)
        self._thread.start()

    def rows(self) -> Sequence[Row]:
        with self._lock:
            return self._rows

    def range_of(self, key: int) -> Segment:
        """Return the last known range of the mapping that begins at `key`, empty if the mapping is gone."""
        return next(((start, end) for start, end in self._ranges if start == key), (key, key))

    def show(self, keys: Sequence[int]) -> None:
        """Do nothing: all mappings are read together, whichever are on the screen."""

    def refresh(self, key: int) -> None:
        # So `arrived` is false, and the thread looks again.
        self._shown = None
        self._wake.set()

    def go(self, step: int) -> None:
        """Show another step of a recording, the nearest to `step` that exists."""
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
        """Read the target at the chosen step."""
        # The screen may choose another meanwhile, which ends this look.
        step = self.step
        try:
            with self._opened(step if self.steps else None) as space:
                label, rows = space.label, mappings(space, self._options, self._moved_on(step))
                ranges = space.mapped()
        except NotWantedError:
            return
        except MthpError as error:
            # Keep the rows of the last look, which are the last known ones of a process that has exited.
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
            # A file does not change, and a process with an error has most likely exited: both wait for a key.
            self._wake.wait(pause if self._live and not self.trouble else None)
            self._wake.clear()
            if self._closing.is_set():
                return
            if self._live or not self.arrived:
                # The rest is in proportion to the work, so that looks keep within their share of a processor.
                before = time.thread_time()
                self.look()
                pause = max(REST, (time.thread_time() - before) / self._cpu)
