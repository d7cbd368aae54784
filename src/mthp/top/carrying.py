"""A collapse in a thread beside the screen, which can watch it and stop it."""

from __future__ import annotations

import threading
from collections.abc import Callable

from mthp.addrspace import AddressSpace
from mthp.engine.collapse import collapse_space
from mthp.engine.report import CollapseReport
from mthp.engine.select import PlanOptions
from mthp.errors import MthpError
from mthp.units import format_size


class Carrying:
    """One collapse, in a thread of its own.

    Args:
        opened: opens the target.

    Attributes:
        done, total: progress, in bytes.
        report: the result; None until the thread ends, and after an error.
        error: the reason for which the collapse failed, or None.
    """

    def __init__(self, opened: Callable[[], AddressSpace], choice: PlanOptions) -> None:
        self._opened, self._choice = opened, choice
        self._stopping = threading.Event()
        self.done, self.total = 0, 0
        self._what = ""
        self.report: CollapseReport | None = None
        self.error: MthpError | None = None
        self._thread = threading.Thread(target=self._run, name="mthp-collapse", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Begin no further blocks; the current ones are finished and reported."""
        self._stopping.set()

    @property
    def stopping(self) -> bool:
        """Whether :meth:`stop` was called."""
        return self._stopping.is_set()

    @property
    def running(self) -> bool:
        """Whether the thread is running."""
        return self._thread.is_alive()

    def wait(self, seconds: float | None = None) -> None:
        """Wait until the thread has ended, for at most `seconds`."""
        # Joining a thread that was not started is an error.
        if self._thread.ident is not None:
            self._thread.join(seconds)

    def _run(self) -> None:
        try:
            with self._opened() as space:
                self.report = collapse_space(space, self._choice, progress=self._progress, stop=self._stopping.is_set)
        except MthpError as error:
            self.error = error

    def _progress(self, done: int, total: int, what: str) -> None:
        self.done, self.total, self._what = done, total, what

    @property
    def progress(self) -> str:
        """The progress in words."""
        return f"{self._what} folios: {format_size(self.done)} of {format_size(self.total)}" if self._what else ""
