"""The machine's switches and tunables: read before every piece of work, parsed when they changed.

One tunable may be set, too: :class:`Keeping` keeps max_ptes_none of the kernel's khugepaged at a number while the
daemon runs, and puts it back. At its default khugepaged makes huge folios of the small ones that the daemon makes
(:mod:`mthp.engine.lasting`). The daemon puts the number back at its end; the watcher of the journal does if the daemon
is killed; the next mthp does if both are killed (:mod:`mthp.linux.journal`). The daemon itself uses the old number.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from mthp.daemon.loop import Loop
from mthp.errors import MthpError, NotPermittedError, UnsupportedError, UsageError
from mthp.geometry import Geometry
from mthp.linux.journal.switches import SwitchJournal
from mthp.linux.sysfs import ThpSysfs
from mthp.tunables import Switches, Tunables

TUNABLES = "khugepaged/"
"""Directory of khugepaged's tunables, below that of the switches."""

TUNABLE = f"{TUNABLES}max_ptes_none"
"""The tunable that the daemon may keep."""

RETRY_SECONDS = 5.0
"""Seconds between two tries to set it while another mthp is in a window."""


class SystemKnobs:
    """Switches and tunables of this machine.

    Args:
        lock: the lock file of windows; None to check no lock.
    """

    def __init__(self, sysfs: ThpSysfs, geometry: Geometry, lock: Path | None = None) -> None:
        self._geometry, self._lock = geometry, lock
        sizes = [f"{path.name}/enabled" for path in sysfs.size_directories(geometry.page_size).values()]
        tunables = [f"{TUNABLES}{knob.name}" for knob in dataclasses.fields(Tunables)]
        # Kept open: reading an open file of sysfs again takes about a microsecond.
        self._files: dict[str, int] = {}
        for path in ("enabled", *sizes, *tunables):
            # A kernel without the file has the default.
            with contextlib.suppress(OSError):
                self._files[path] = os.open(sysfs.root / path, os.O_RDONLY | os.O_CLOEXEC)
        self._texts: dict[str, str] = {}
        self._words: dict[str, str] = {}
        self._kept = ("", "")
        self.switches = Switches.defaults(geometry)
        self.tunables = Tunables.defaults(geometry)
        self.version = 0
        """Number of changes so far."""
        self.refresh()

    def refresh(self) -> bool:
        """Read the files again, and return whether anything changed."""
        with _unless_locked(self._lock) as undisturbed:
            if not undisturbed:
                # Another mthp is in a window: it has set switches to make folios of one order (mthp.linux.journal),
                # and the operator did not choose these values.
                return False
            texts = {}
            for path, fd in self._files.items():
                with contextlib.suppress(OSError):
                    texts[path] = os.pread(fd, 256, 0).decode(errors="replace").strip()
        if texts == self._texts:
            return False
        self._texts = texts
        ours, was = self._kept
        # Unless another program has written it since: that is then the operator's choice.
        self._words = words = texts | ({TUNABLE: was} if ours and texts.get(TUNABLE) == ours else {})
        # An unknown word of a newer kernel, or a number out of range, must not stop the daemon: keep the last values.
        with contextlib.suppress(MthpError):
            self.switches = Switches.from_sysfs(words, self._geometry)
        with contextlib.suppress(MthpError):
            knobs = {path.removeprefix(TUNABLES): word for path, word in words.items() if path.startswith(TUNABLES)}
            self.tunables = Tunables.from_sysfs(knobs, self._geometry)
        self.version += 1
        return True

    @property
    def max_ptes_none(self) -> str:
        """The operator's choice of max_ptes_none, as last read; ``""`` if it was never read."""
        return self._words.get(TUNABLE, "")

    def keep(self, ours: str, was: str) -> None:
        """Read the word `ours` of max_ptes_none as `was`, the operator's choice; empty words to read it as it is."""
        self._kept = ours, was
        # So that the next refresh() finds a change.
        self._texts = {}

    def close(self) -> None:
        """Close the files."""
        for fd in self._files.values():
            os.close(fd)
        self._files = {}


@contextlib.contextmanager
def _unless_locked(path: Path | None) -> Iterator[bool]:
    """Hold the shared lock of a file, and yield False if another process holds it exclusively."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC) if path else -1
    except OSError:
        # The first window of any mthp makes the file.
        fd = -1
    try:
        if fd >= 0:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        yield True
    except BlockingIOError:
        yield False
    finally:
        if fd >= 0:
            os.close(fd)


class Keeping:
    """The kept tunable.

    Args:
        knobs: receives the value from before.
        loop: schedules the next try.
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
            self._say(f"{TUNABLE} is not changed: {error.message}")
        except MthpError as error:
            # Every try may fail for the same reason, which is printed once.
            if error.message != self._delayed_by:
                self._say(f"{TUNABLE} is set later: {error.message}")
            self._delayed_by = error.message
            self._loop.after("keep", RETRY_SECONDS, lambda: self.keep(self._wanted))

    def _set(self, number: int) -> None:
        """Set the tunable; raise MthpError if another process keeps it, or does not finish its window in time."""
        # The files may have changed since the worker last read them.
        self._knobs.refresh()
        was = self._knobs.max_ptes_none
        # Before the write, because from then on the worker reads a value that the operator did not choose.
        self._knobs.keep(str(number), was)
        try:
            self._journal.keep({TUNABLE: str(number)})
        except MthpError:
            # It was not set.
            self._knobs.keep("", "")
            raise
        self._kept = number
        self._say(f"{TUNABLE} is {number} while this daemon runs; it was {was}")

    def _put_back(self) -> None:
        if self._kept is None:
            return
        restored = self._journal.release()
        self._kept = None
        self._knobs.keep("", "")
        for each in restored:
            self._say(str(each))

    def close(self) -> None:
        """Put back the value from before, or leave that to the watcher of the journal if it fails now."""
        self._wanted = None
        try:
            self._put_back()
        except MthpError as error:
            self._say(f"{TUNABLE} is put back when this process has ended: {error.message}")
