"""A collapse that runs beside the screen, can be watched, and can be told to stop."""

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
        done, total: how far it is, in bytes.
        report: what came of it; None until it ends, and if it could not be done.
        error: why it could not be done.
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
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """Begin nothing more; what is being done is finished and accounted for."""
        self._stopping.set()

    @property
    def stopping(self) -> bool:
        """Whether it was told to stop."""
        return self._stopping.is_set()

    @property
    def running(self) -> bool:
        """Whether it has not ended yet."""
        return self._thread.is_alive()

    def wait(self, seconds: float | None = None) -> None:
        """Wait until it has ended, for so long at most."""
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
        """How far it is, for a person."""
        return f"{self._what} folios: {format_size(self.done)} of {format_size(self.total)}" if self._what else ""
