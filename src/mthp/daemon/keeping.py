"""Keeps max_ptes_none of the kernel's khugepaged at a number while the daemon runs, and puts it back.

At its default khugepaged makes huge folios of the small ones that the daemon makes (:mod:`mthp.engine.lasting`). The
daemon puts the number back at its end; the watcher of the journal does if the daemon is killed; the next mthp does if
both are killed (:mod:`mthp.linux.journal`). The daemon itself continues to use the number from before.
"""

from __future__ import annotations

from collections.abc import Callable

from mthp.daemon.loop import Loop
from mthp.daemon.system import SystemKnobs
from mthp.errors import MthpError, NotPermittedError, UnsupportedError, UsageError
from mthp.linux.journal.switches import SwitchJournal

TUNABLE = "khugepaged/max_ptes_none"

RETRY_SECONDS = 5.0
"""Seconds between two tries while another mthp is in a window."""


class Keeping:
    """The kept tunable.

    Args:
        knobs: receives the value from before.
        loop: schedules the next try.
        say: prints a line for the operator.
        journal: journal of the switches; the system's if not given.
    """

    def __init__(
        self, knobs: SystemKnobs, loop: Loop, say: Callable[[str], None], journal: SwitchJournal | None = None
    ) -> None:
        self._knobs, self._loop, self._say = knobs, loop, say
        self._journal = journal or SwitchJournal()
        self._wanted: int | None = None
        self._kept: int | None = None
        self._delayed_by = ""

    def keep(self, number: int | None) -> None:
        """Keep the tunable at `number` from now on, or soon; None to put back the value from before."""
        self._wanted = number
        if number == self._kept:
            return
        try:
            self._put_back()
            if number is not None:
                self._set(number)
        except (NotPermittedError, UnsupportedError, UsageError) as error:
            self._say(f"{TUNABLE} stays as it is: {error.message}")
        except MthpError as error:
            if error.message != self._delayed_by:
                self._say(f"{TUNABLE} is set later: {error.message}")
            self._delayed_by = error.message
            self._loop.after("keep", RETRY_SECONDS, lambda: self.keep(self._wanted))

    def _set(self, number: int) -> None:
        """Set the tunable.

        Raises:
            MthpError: another process keeps it, or does not finish its window in time.
        """
        was = self._knobs.word(TUNABLE)
        # Before the write, because from then on the worker reads a value that the operator did not choose.
        self._knobs.keep(TUNABLE, str(number), was)
        try:
            self._journal.keep({TUNABLE: str(number)})
        except MthpError:
            self._knobs.keep(TUNABLE, None, "")
            raise
        self._kept = number
        self._say(f"{TUNABLE} is {number} for as long as this daemon runs; it was {was}")

    def _put_back(self) -> None:
        """Put back the value from before.

        Raises:
            MthpError: another process does not finish its window in time.
        """
        if self._kept is None:
            return
        restored = self._journal.release()
        self._kept = None
        self._knobs.keep(TUNABLE, None, "")
        for each in restored:
            self._say(str(each))

    def close(self) -> None:
        """Put back the value from before, or leave that to the watcher of the journal if it fails now."""
        self._wanted = None
        try:
            self._put_back()
        except MthpError as error:
            self._say(f"{TUNABLE} is put back when this process has ended: {error.message}")
